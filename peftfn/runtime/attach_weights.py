"""Weights as adapters make them, for whoever reads one past the layer's forward, as a part of the plan.

A bare parameter is always read so; a layer's weight by some models, and by a layer class with a forward of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftfn.core.config import PeftConfig
from peftfn.models import twins
from peftfn.models.layers import Place
from peftfn.models.surgery import Plan
from peftfn.runtime import site_adapters
from peftfn.runtime.routing import vmapped_module
from peftfn.runtime.site_adapters import SiteAdapter
from peftfn.weights import codecs

Found = Mapping[str, Sequence[SiteAdapter]]
Twins = Mapping[str, nn.Module]


def runs_its_own(layer: nn.Module, place: Place) -> bool:
    """Whether the layer is adapted through its weight, because its class computes something of its own with it."""
    return bool(place.weight) and codecs.has_own_forward(layer)


def adapt_reads(plan: Plan, layer: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter]) -> None:
    """Let whoever reads the layer's weight past its forward find the adapted one."""
    held = layer._parameters
    if not place.weight or place.weight not in held or codecs.of(layer) is not codecs.DENSE:
        return  # a hook or a property makes it, each time
    if twins.has_set_forward(layer):
        return  # it reads the module itself
    acting = [part for part in here if part.leaf]
    names = {"weight"}
    for part in acting:
        names.update(part.method.on_weights.reads if part.method.on_weights else ())
    for name in names:
        if held.get(name) is not None:
            plan.reads[place.owner, name] = functools.partial(_read, layer, place, path, acting, name)


def _read(layer: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter], name: str) -> Tensor:
    """A layer's tensor as the adapters make it."""
    if any(part.rows is not None for part in here):
        raise ValueError(
            f"{path}: the model reads this layer's {name} itself, and each row has an adapter of its own: there is no "
            "one value. Leave the layer out of routed adapters (exclude_modules), or apply them one at a time."
        )
    if any(part.invocations for part in here):
        raise ValueError(
            f"{path}: the model reads this layer's {name} itself, and the adapter acts on some tokens alone "
            "(alora_invocation_tokens): there is no one value. Leave the layer out (exclude_modules)."
        )
    if layer.training and (dropout := [field for part in here for field in _dropouts(part.config)]):
        raise ValueError(
            f"{path}: the model reads this layer's {name} itself, where {dropout[0]} has no meaning: it drops what "
            f"goes into a layer. Set {dropout[0]}=0, or leave the layer out (exclude_modules)."
        )
    return cast("Tensor", tensors(layer, place, here)[name])


def _dropouts(config: PeftConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    return [name for name in names if getattr(config, name)]


def adapt_weight(plan: Plan, by_path: Twins, place: Place, here: Sequence[SiteAdapter]) -> None:
    """Adapt a tensor that the base reads itself."""
    here = [part for part in here if part.leaf]
    plan.computed[place.owner, place.weight] = functools.partial(_merged, by_path[place.owner], place, here)


def reader(by_path: Twins, place: Place) -> str:
    """The path of the module that reads a tensor itself: its owner, or the attention around it."""
    parent = place.owner.rpartition(".")[0]
    return parent if isinstance(by_path.get(parent), nn.MultiheadAttention) else place.owner


def adapt_reader(
    plan: Plan,
    reader: nn.Module,
    found: Found,
    path: str,
    sites: Sequence[tuple[str, Place, Sequence[SiteAdapter]]],
) -> None:
    """Adapt tensors that a module of the base reads itself, each row's by its own adapter."""
    inside = f"{path}." if path else ""
    others = [one for one in found if one.startswith(inside) and one not in {site for site, _, _ in sites}]
    if others or path in plan.forwards or "forward" in reader.__dict__:
        raise ValueError(
            f"{path}: {type(reader).__name__} reads an adapted weight itself, so it runs a row at a time, and the "
            f"adapters act on {', '.join(others[:3]) or 'it'} in another way too. Leave one of them out of routed "
            "adapters, or apply them one at a time."
        )
    read: list[vmapped_module.Read] = []
    for _, place, here in sites:
        relative = place._replace(owner=place.owner.removeprefix(path).removeprefix("."))
        read.append(vmapped_module.Read(relative, [part for part in here if part.leaf]))
    plan.then(path, functools.partial(_read_by_row, path, read))


def _read_by_row(
    path: str, read: Sequence[vmapped_module.Read], layer: nn.Module, _run: Callable[..., Any]
) -> Callable[..., Any]:
    return vmapped_module.by_row(layer, path, read)


def _merged(twin: nn.Module, place: Place, here: Sequence[SiteAdapter]) -> Tensor:
    weight = codecs.of(twin).read(twin, place.weight)
    for part in here:
        weight = site_adapters.merged(part, part.leaf, place.kind, {"weight": weight})["weight"]
    return weight


def tensors(layer: nn.Module, place: Place, before: Sequence[SiteAdapter]) -> dict[str, Tensor | None]:
    """A layer's weight and bias as the adapters before another one leave them."""
    weight, bias = codecs.of(layer).read(layer, place.weight), codecs.bias(layer)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for part in before:
        if part.rows is not None:
            raise ValueError(
                f"{place.name}: an adapter of one row each acts here before one that reads the weight, which then has "
                "no one value. Put the other adapter first, or apply them apart."
            )
        tensors |= site_adapters.merged(part, part.leaf, place.kind, tensors)
    return {"bias": None, **tensors}
