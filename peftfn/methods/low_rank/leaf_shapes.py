"""Low-rank leaves of other shapes: padded to one rank for a stack, or laid out as PEFT's files have them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods import slots


def pair(leaf: Leaf) -> tuple[str, str]:
    """The names of A and B in a leaf."""
    first = next(name for name in sorted(leaf) if name.endswith("_A"))
    return first, first.removesuffix("_A") + "_B"


def resized(leaf: Leaf, old: int, new: int) -> Leaf:
    """The leaf with another rank: zero rows in A and zero columns in B are added, or the last ones are taken away.

    The product of a zero row of A and a zero column of B has a zero gradient for both, so training never fills them.

    Args:
        leaf: A and B of one site.
        old: its rank, per expert where the leaf is one of experts (A is (E*r, in)).
        new: the wanted one.
    """
    if old == new:
        return leaf
    first, second = pair(leaf)
    a, b = _with_rank_axis(leaf[first], leaf[second], old)
    a, b = (slots.sized(one, 1, a.shape[1] * new // old) for one in (a, b))
    return {**leaf, **dict(zip((first, second), _without_rank_axis(a, b, leaf[first].dim()), strict=True))}


def _with_rank_axis(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # Axis 1 becomes the rank: A is (r, in), (g, r/g, in/g, *k) or (E*r, in); B is (out, r), (out, r/g, 1...) or
    # (out, r*E) with the expert as the fastest axis.
    if a.dim() > b.dim():
        return a, b
    if b.dim() > 2:  # a convolution; PEFT's dense A has its rank in groups, as B has
        return _unflatten(a, 0, (-1, b.shape[1])), b
    return _unflatten(a, 0, (-1, rank)), _unflatten(b, 1, (rank, -1))


def _unflatten(tensor: Tensor, axis: int, sizes: tuple[int, int]) -> Tensor:
    return cast("Tensor", tensor.unflatten(axis, sizes))  # torch does not say what it returns


def _without_rank_axis(a: Tensor, b: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    if a.dim() == dims:
        return a, b
    a = a.flatten(0, 1)
    return a, b if a.dim() > 2 else b.flatten(1)


def to_file(leaf: Leaf) -> Leaf:
    """The leaf with PEFT's shapes: A of a convolution with groups dense, zero outside each group's channels."""
    first, second = pair(leaf)
    a, b = leaf[first], leaf[second]
    if a.dim() <= b.dim():
        return leaf
    groups = a.shape[0]
    dense = a.new_zeros(groups, a.shape[1], groups, *a.shape[2:])  # (g, r/g, g, in/g, *k)
    for group, block in enumerate(a):
        dense[group, :, group] = block
    return {**leaf, first: dense.flatten(2, 3).flatten(0, 1)}


def from_file(leaf: Leaf) -> Leaf:
    """The inverse of `to_file`.

    A dense A that really reads other groups' channels, as PEFT trains it, stays dense.
    """
    first, second = pair(leaf)
    a, b = leaf[first], leaf[second]
    groups = a.shape[0] // b.shape[1] if a.dim() > 2 else 1
    if groups == 1 or a.shape[1] % groups:
        return leaf
    blocks = _unflatten(_unflatten(a, 1, (groups, -1)), 0, (groups, -1))  # (g, r/g, g, in/g, *k)
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if int(blocks.count_nonzero()) != int(own.count_nonzero()):
        return leaf
    return {**leaf, first: own}
