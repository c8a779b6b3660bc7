"""Places in a weight that a seed decides: a part of what a trained file means, and so the numbers that PEFT draws."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from peftfn.core import transforms


@transforms.constant_result
def drawn(seed: int, total: int, count: int, device: torch.device) -> Tensor:
    """The first `count` of `torch.randperm(total)` by a CPU generator of this seed, (count,).

    More of them begin with the same ones, so adapters with unlike many share their places as far as they go.
    """
    return _drawn(seed, total, count, device)


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
