"""Methods that change a weight, out of one or two functions: what is added to it, or what it becomes.

Functions see every weight as (out, in, *kernel), whatever the layer (`peftfn.models.layouts`). From the weight follow
what the layer computes, also over a packed one, and what merging gives; a method gives its own forward to be faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods import slots as slot_table
from peftfn.methods.action import Merge, OnWeights
from peftfn.methods.method import like_weight
from peftfn.methods.slots import Slots
from peftfn.models import layers, layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

MATRICES = (layers.LINEAR, layers.TRANSPOSED)
LAYERS = (*MATRICES, layers.EMBEDDING, layers.CONVOLUTION)

NewTensor = Callable[[Any, Mapping[str, Tensor], WeightShape, Tensor], Tensor]
Delta = Callable[[Any, Mapping[str, Tensor], WeightShape], Tensor]
Forward = Callable[..., Tensor]


def filled(slots: Slots, value: float) -> Callable[..., Leaf]:
    """An `init` that gives every tensor of a method without a rank one value."""
    return functools.partial(_filled, (slots, value))


def _filled(
    what: tuple[Slots, float],
    config: Any,
    path: str,
    site: Site,
    generator: torch.Generator,
    dtype: torch.dtype | None,
) -> Leaf:
    slots, value = what
    shapes = slot_table.shapes(slots, config, layouts.of_site(site), 0)
    return {name: like_weight(torch.full(shape, value), site.stored, dtype) for name, shape in shapes.items()}


def in_float32(site: Site, why: str) -> Tensor:
    """The base's weight, dense, (out, in, *kernel), in float32, in which PEFT decomposes; refused without values."""
    if site.stored.is_meta:
        raise ValueError(f"{site.path}: {why}, and the model is on the meta device; load it with its weights first.")
    return layouts.seen(site.kind, site.weight.detach().float())


def needs_base(name: str) -> ValueError:
    """The error about an adapter that is read without the base of whose weights a part of it is made."""
    return ValueError(
        f"{name}: a part of this adapter is made of the base's weights, and its file does not hold it; pass the base: "
        "peftfn.load(folder, model)."
    )


_HALVES = (torch.float16, torch.bfloat16)


def _wide(leaf: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The leaf with float32 in place of half precision, which torch decomposes and solves nothing in."""
    if not any(one.dtype in _HALVES for one in leaf.values()):
        return leaf
    return {name: one.float() if one.dtype in _HALVES else one for name, one in leaf.items()}


# What the builders give are partials of functions of this file, and no closures: a bound module can be pickled.


def reweighted(
    weight: NewTensor, *, bias: NewTensor | None = None, forward: Forward | None = None, kinds: Sequence[str] = LAYERS
) -> OnWeights:
    """A method that makes another weight of a layer's, and perhaps another bias.

    Args:
        weight: `(config, leaf, shape of W, W) -> W'`, both (out, in, *kernel).
        bias: `(config, leaf, shape of W, b) -> b'`, (out,); by default it stays.
        forward: `(config, leaf, site, x, ...) -> y`, where there is a faster way than to run the layer with W' and b'.
        kinds: the kinds of layer that it acts on.
    """
    merge = functools.partial(_reweighted, weight, bias)
    run = functools.partial(_run_merged, merge) if forward is None else functools.partial(_run_wide, forward)
    return OnWeights(kinds, run, merge, ("weight",) if bias is None else ("weight", "bias"))


def _reweighted(
    weight: NewTensor,
    bias: NewTensor | None,
    config: Any,
    leaf: Mapping[str, Tensor],
    shape: WeightShape,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    old, kind, leaf = tensors["weight"], shape.kind, _wide(leaf)
    changed = {"weight": layouts.stored(kind, weight(config, leaf, shape, layouts.seen(kind, old))).to(old.dtype)}
    if bias is not None and "bias" in tensors:
        changed["bias"] = bias(config, leaf, shape, tensors["bias"]).to(tensors["bias"].dtype)
    return changed


def _run_wide(
    forward: Forward, config: Any, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    return forward(config, _wide(leaf), site, x, *args, **kwargs)


def _run_merged(
    merge: Merge, config: Any, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    own = site.tensors
    given = {name: one for name, one in own.items() if one is not None}
    return site.run_with({**own, **merge(config, leaf, layouts.of_site(site), given)}, x, *args, **kwargs)


def additive(delta: Delta, *, forward: Forward | None = None, kinds: Sequence[str] = LAYERS) -> OnWeights:
    """A method that adds to a layer's weight, which is never read: any packed base will do.

    Args:
        delta: `(config, leaf, shape of W) -> ΔW`, (out, in, *kernel).
        forward: as in `reweighted`; by default the layer's output plus that of the layer with ΔW and no bias.
        kinds: the kinds of layer that it acts on.
    """
    run = functools.partial(_run_wide, functools.partial(_run_added, delta) if forward is None else forward)
    return OnWeights(kinds, run, functools.partial(_merged_sum, delta), ("weight",))


def _merged_sum(
    delta: Delta, config: Any, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    old = tensors["weight"]
    return {"weight": (old + layouts.stored(shape.kind, delta(config, _wide(leaf), shape))).to(old.dtype)}


def _run_added(
    delta: Delta, config: Any, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    y = site(x, *args, **kwargs)
    return added(site, y, delta(config, leaf, layouts.of_site(site)), x, *args, **kwargs)


def added(site: Site, y: Tensor, change: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y + the layer's output with the change (out, in, *kernel) for its weight and no bias, in the dtype of y."""
    stored = layouts.stored(site.kind, change)
    return (y + site.run_with({"weight": stored, "bias": None}, x, *args, **kwargs)).to(y.dtype)
