"""Dropout whose mask is kept as bits: an eighth of a byte a value for the backward pass, in place of torch's float.

What stays is decided by torch's own random state, nine random bits a value where torch takes 32. Seven of them are a
number, which is compared with 128 p rounded down or up; another such number for each 8 values says which of the two.
So each value is dropped with the probability p, to 1 in 16384, and the scaling is that of the rounded p; the covariance
of two of those 8 values is less than 1 / 128². The draw is an operation of torch like any other: `torch.vmap` gives
each slice a mask of its own, or all the same one, as its `randomness` says, and a checkpointed block that runs again
draws the same bits again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level  # torch has no public question for this

ROWS = 8  # that share a byte of a column
_STEPS = 128  # of a number of 7 bits
_MIDDLE = 64  # 7 bits are read from -64 to 63


class Kept(NamedTuple):
    """Which values of a (tokens, n) matrix stay.

    Attributes:
        bits: (tokens / 8 rounded up, n), uint8; bit j of row k is for token 8 k + j, 1 where the value stays.
        scale: what the values that stay are multiplied by, 1 / (1 - p).
    """

    bits: Tensor
    scale: float


def draw(tokens: int, n: int, p: float, device: torch.device) -> Kept:
    """A mask that drops each value of a (tokens, n) matrix with probability p."""
    groups = -(-tokens // ROWS)
    whole, part = divmod(round(p * _STEPS * _STEPS), _STEPS)
    random = _bytes(groups * n * (ROWS + 1), device) >> 1
    coins, values = random[: groups * n].view(groups, 1, n), random[groups * n :].view(groups, ROWS, n)
    up = (coins - (part - _MIDDLE)) >> 7  # -1 in `part` of 128 cases, else 0
    stays = ((whole - _MIDDLE - 1) - up - values) >> 7  # -1, all bits set, where the value stays; else 0
    bits = (stays & _places(device)).sum(1, dtype=torch.int8).view(torch.uint8)
    kept = _STEPS * _STEPS - whole * _STEPS - part
    return Kept(bits, _STEPS * _STEPS / kept if kept else 0.0)


def mask(bits: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """(tokens, n): 1 where a value stays and 0 where not."""
    places = torch.arange(ROWS, dtype=torch.uint8, device=bits.device).view(1, ROWS, 1)
    return ((bits.unsqueeze(1) >> places) & 1).reshape(-1, bits.shape[1])[:tokens].to(dtype)


def _bytes(count: int, device: torch.device) -> Tensor:
    """Random bytes, (count,), int8."""
    size, low = (-(-count // 8),), -(2**63)
    if maybe_current_level() is None:
        random = torch.empty(size, dtype=torch.int64, device=device).random_(low, None)
    else:
        # In place `vmap` draws for its slices only where they differ already. The bits are the same, with the upper one
        # turned back: `randint` adds `low`.
        random = torch.randint(low, 2**63 - 1, size, dtype=torch.int64, device=device) ^ low
    return random.view(torch.int8)[:count]


def _places(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, -128], dtype=torch.int8, device=device).view(1, ROWS, 1)
