"""Places in a weight that a seed decides: a part of what a trained file means, and so the numbers that PEFT draws."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor


def drawn(seed: int, total: int, count: int, device: torch.device) -> Tensor:
    """The first `count` of `torch.randperm(total)` by a CPU generator of this seed, (count,).

    A larger `count` begins with the places of a smaller one: a stack can pad the smaller adapter.
    """
    if torch.compiler.is_compiling():
        return _traced(seed, total, count, device)
    return _drawn(seed, total, count, device)


# Dynamo cannot follow a generator, and of what a function gives it as a constant it keeps one tensor for each function:
# to it the draw is an operation, with a result of its own at each call.
@torch.library.custom_op("peftfn::places", mutates_args=())
def _traced(seed: int, total: int, count: int, device: torch.device) -> Tensor:
    return _drawn(seed, total, count, device).clone()


@_traced.register_fake
def _without_numbers(seed: int, total: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(min(total, count), dtype=torch.int64, device=device)


# Every layer of one shape has the same places, and each call asks for them: a permutation of 16 million takes 0.3 s.
@functools.lru_cache(maxsize=64)
def _drawn(seed: int, total: int, count: int, device: torch.device) -> Tensor:
    found: list[Tensor] = []
    # In a thread of its own: transforms of torch.func and torch's default device are a thread's, and under `torch.vmap`
    # a random number is another one for each slice, or an error.
    thread = threading.Thread(target=_draw, args=(found, seed, total, count, device))
    thread.start()
    thread.join()
    return found[0]


def _draw(found: list[Tensor], seed: int, total: int, count: int, device: torch.device) -> None:
    # A copy: the slice would keep the whole permutation.
    found.append(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].to(device, copy=True))
