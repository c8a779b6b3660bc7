"""In which dtype an adapter's tensors take part in what a layer computes; they keep the one that they came in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from peftfn.methods.method import Method


def is_narrower(leaf: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether tensors of the leaf have less precision than the layer's weight, or than each other.

    A packed weight has no dtype of its own and counts as float32.
    """
    found = {tensor.dtype for tensor in leaf.values() if tensor.dim()}
    if found == {dtype}:
        return False
    held = [one for one in found if _is_held(one)]
    wide = _widest([*held, dtype if _is_held(dtype) else torch.float32])
    return any(one is not wide for one in held)


def widened(leaf: Mapping[str, Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The leaf in one dtype, the widest of its own and this one: so wide are its products."""
    wide = _widest([one.dtype for one in leaf.values() if one.dim() and _is_held(one.dtype)] + [dtype])
    return {name: one.to(wide) if one.dim() and _is_held(one.dtype) else one for name, one in leaf.items()}


def _is_held(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    held = [one for one in dtypes if _is_held(one)]
    return functools.reduce(torch.promote_types, held) if held else torch.float32


def in_place_of(own: Tensor, tensor: Tensor, method: Method) -> Tensor:
    """A tensor that takes the place of `own`, in its dtype: what the module is given has that one.

    Copies that PEFT keeps apart from the base's own, in float32 over a half-precision base (of norms), stay as they
    are.
    """
    if method.files.copies or not own.is_floating_point() or not tensor.is_floating_point():
        return tensor
    return tensor.to(own.dtype)


def held_as(module: nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """What the module holds under that name now, in this dtype."""
    return cast("Tensor", module._parameters[name]).to(dtype)
