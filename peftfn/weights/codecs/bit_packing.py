"""Small integers in 32-bit words, one after the other from each word's lowest bit on, as GPTQ packs them.

Of 2, 4 or 8 bits, each word holds a whole number of them; of 3 bits, three words hold 32, two of which straddle words.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 32


class _Layout(NamedTuple):
    """Where the values of the shortest run of words that holds a whole number of them lie.

    Attributes:
        words: how many words that is.
        first: the word in which each value begins.
        last: the word in which it ends.
        shift: the bit at which it begins.
        kept: how many of its bits are in the first word.
    """

    words: int
    first: list[int]
    last: list[int]
    shift: list[int]
    kept: list[int]


def _layout(bits: int) -> _Layout:
    words = bits // math.gcd(bits, _WORD)
    begins = range(0, words * _WORD, bits)
    shift = [begin % _WORD for begin in begins]
    return _Layout(
        words,
        [begin // _WORD for begin in begins],
        [(begin + bits - 1) // _WORD for begin in begins],
        shift,
        [min(bits, _WORD - one) for one in shift],
    )


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The integers along axis 0, (words, n) int32 -> (values, n) int16, values being 32 · words / bits.

    Example:
        >>> import torch
        >>> unpacked(torch.tensor([[0x76543210]], dtype=torch.int32), 4).flatten().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    at = _layout(bits)
    runs = packed.reshape(-1, at.words, packed.shape[1])  # (runs, words, n)
    shift = _column(at.shift, packed)
    mask = 2**bits - 1
    if at.words == 1:
        values = (runs >> shift) & mask
    else:
        kept = _column(at.kept, packed)
        # A right shift of a negative word brings in ones: only the bits that were there count.
        low = (runs[:, at.first] >> shift) & ((1 << kept) - 1)
        values = low | ((runs[:, at.last] << kept) & mask)
    return values.to(torch.int16).flatten(0, 1)


def packed(values: Tensor, bits: int) -> Tensor:
    """The words, (values, n) -> (words, n) int32: what `unpacked` undoes. Values fill up whole words.

    Example:
        >>> import torch
        >>> packed(torch.arange(8).view(8, 1), 4).tolist() == [[0x76543210]]
        True
    """
    at = _layout(bits)
    runs = values.to(torch.int64).reshape(-1, len(at.shift), values.shape[1])  # (runs, values, n)
    made = runs.new_zeros(runs.shape[0], at.words, runs.shape[2])
    made.index_add_(1, torch.tensor(at.first, device=values.device), runs << _column(at.shift, runs))
    made.index_add_(1, torch.tensor(at.last, device=values.device), runs >> _column(at.kept, runs))
    return made.to(torch.int32).flatten(0, 1)  # what is above 32 bits is in the next word already


def _column(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, 1)
