"""Dropout whose mask is kept as bits: an eighth of a byte a value for the backward pass, in place of torch's float.

What stays is decided by torch's own random state, eight random bits a value where torch takes 32. Seven of them are a
number, which is compared with 128 p rounded down or up; another such number for each 8 values says which of the two.
So each value is dropped with the probability p, to 1 in 16384, and the scaling is that of the rounded p; the covariance
of two of those 8 values is less than 1 / 128². The numbers lie in planes, their lowest bits together and so on, and 64
of them are compared at once: from the lowest bit to the highest, a number is less if this bit says so, or if it says
nothing and the bits below did. The draw is an operation of torch like any other: `torch.vmap` gives each slice a mask
of its own, or all the same one, as its `randomness` says, and a checkpointed block that runs again draws the same bits
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftfn.core import transforms

ROWS = 8  # tokens whose bits share a byte
_PLANES = 7  # random bits that decide about a value
_STEPS = 2**_PLANES


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
    dropped = round(p * _STEPS * _STEPS)
    whole = min(dropped // _STEPS, _STEPS - 1)
    *planes, coins = _words(_PLANES + 1, -(-groups * n // 8), device)
    # A coin from -64 to 63 for each 8 values: where it is below the threshold, the shift by 7 makes a byte of ones, and
    # those of the 8 whose number equals `whole` are dropped too.
    less = transforms.as_words(((transforms.as_bytes(coins) >> 1) - (dropped - whole * _STEPS - _STEPS // 2)) >> 7)
    for place, plane in enumerate(planes):  # planes hold the random bits inverted
        less = less | plane if whole >> place & 1 else less & plane
    bits = transforms.as_uint8(transforms.as_bytes(~less))[: groups * n].view(groups, n)
    kept = _STEPS * _STEPS - dropped
    return Kept(bits, _STEPS * _STEPS / kept if kept else 0.0)


def mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8, of the shape (..., n) that the bits are for: 1 where a value stays and 0 where not."""
    stays = (bits.unsqueeze(1) & _places(bits.device)).bool()
    return transforms.as_uint8(stays).reshape(-1, bits.shape[1])[: math.prod(shape[:-1])].view(shape)


def _words(rows: int, count: int, device: torch.device) -> Tensor:
    """Random bits, (rows, count), int64."""
    size, low = (rows, count), -(2**63)
    if not transforms.is_transforming():
        return torch.empty(size, dtype=torch.int64, device=device).random_(low, None)
    # In place `vmap` draws for its slices only where they differ already. The bits are the same, with the upper one
    # turned back: `randint` adds `low`.
    return torch.randint(low, 2**63 - 1, size, dtype=torch.int64, device=device) ^ low


def _places(device: torch.device) -> Tensor:
    """1, 2, 4, ..., 128; made where they are needed, as a copy to a GPU would wait for it."""
    return torch.bitwise_left_shift(1, torch.arange(ROWS, dtype=torch.uint8, device=device)).view(1, ROWS, 1)
