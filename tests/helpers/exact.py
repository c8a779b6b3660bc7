"""Rounding out of the way: a float64 that float32 cannot enter, and float32 held to it.

Two ways to compute one number differ in their last bits, and by how much depends on the CPU: its kernels add up in
another order. So a law is checked in float64, where what is left would be another formula; and a float32 result is
held to the float64 truth, by a multiple of what the reference itself is off on the same input. No test says how many
bits a machine may lose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

# Float64 sums in another order, relative to the largest value: 1e-16 for each of a few hundred additions, times what
# a few layers and a division by a small norm make of it.
EXACT = 1e-11
# How much further from the truth than the reference one library may be by chance. Each is off by a random walk of
# roundings, of which the largest is compared: 3.3 times was the most in all cases, however their sums were ordered.
TIMES = 8
FLOAT32 = torch.finfo(torch.float32).eps


class Float64(TorchFunctionMode):
    """Wherever a model asks for float32 (norms, rotations, softmax), it gets float64."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if isinstance(function, OpOverload | OpOverloadPacket):  # bitsandbytes' say which dtypes they know
            return function(*args, **given)
        if function is Tensor.float:
            function = Tensor.double
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        if given.get("dtype") is torch.float32:
            given = {**given, "dtype": torch.float64}
        return function(*args, **given)


def in_float64(tree: Any) -> Any:
    """A tree with its floats in float64, or the module made so in place."""
    if isinstance(tree, nn.Module):
        if hasattr(tree, "set_experts_implementation"):
            tree.set_experts_implementation("eager")  # torch's grouped product has no float64
        return tree.double()
    return tree_map(_double, tree)


def _double(one: Any) -> Any:
    return one.double() if isinstance(one, Tensor) and one.is_floating_point() else one


def a_rounding_away(tree: Any) -> Any:
    """A float64 tree, or a copy of a module, with each number one rounding of float32 away, up or down by chance.

    What a packed layer of a module holds stays as it is.
    """
    by_chance = torch.Generator().manual_seed(0)

    def moved(one: Any) -> Any:
        if not isinstance(one, Tensor) or one.dtype is not torch.float64:
            return one
        return one.detach() * (1 + FLOAT32 * (torch.randint(2, one.shape, generator=by_chance) * 2 - 1))

    if not isinstance(tree, nn.Module):
        return tree_map(moved, tree)
    copied = copy.deepcopy(tree)
    for weight in copied.parameters():
        if type(weight) is nn.Parameter:
            weight.data = moved(weight.data)
    return copied


def off(found: Any, truth: Any) -> float:
    """How far from the truth: the largest difference of all tensors over the largest value of the truth."""
    ours, theirs = named(found), named(truth)
    assert {name: one.shape for name, one in ours.items()} == {name: one.shape for name, one in theirs.items()}
    pairs = [(one.detach().double(), theirs[name].detach().double()) for name, one in ours.items() if one.numel()]
    return float(max((one - other).abs().max() for one, other in pairs) / max(other.abs().max() for _, other in pairs))


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their places in it."""
    return {keystr(path): one for path, one in tree_flatten_with_path(tree)[0]}


def allowed(theirs: Any, truth: Any, times: float = TIMES, least: float = 0.0) -> float:
    """How far off another computation of the same may be: so many times as far as the reference, or as one rounding.

    Args:
        theirs: what the reference computed, a tree of tensors of one dtype.
        truth: the same in float64.
        times: how many times as far.
        least: how large a rounding is at least; that of the reference's dtype by default.
    """
    eps = max(torch.finfo(one.dtype).eps for one in named(theirs).values() if one.is_floating_point())
    return times * max(off(theirs, truth), eps, least)


def assert_close_to_truth(ours: Any, theirs: Any, truth: Any, times: float = TIMES, least: float = 0.0) -> None:
    """Ours is as close to the float64 truth as the reference's, or nearly; the last two are of `allowed`."""
    found, most = off(ours, truth), allowed(theirs, truth, times, least)
    assert found <= most, f"{found:.2e} of the largest value off; {times} times the reference is {most:.2e}"
