"""Which adapters were found to fit which models, so that the next call need not check again.

A check reads the classes and shapes of layers, and the names and shapes of leaves. These are remembered and compared at
each call, which costs a tenth of the check. So a layer that was replaced or resized since is checked again; a new
adapter whose tensors have the same shapes, which each step of functional training makes, is not.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import Adapter, site_paths
from peftfn.core.config import PeftConfig
from peftfn.methods import companions
from peftfn.models import layers
from peftfn.models.layers import Place


class _Layer(NamedTuple):
    """A layer at the time of the check: its path, its weight's name there, its class and the weight's shape."""

    owner: str
    name: str
    cls: type[nn.Module]
    shape: torch.Size


class _Fit(NamedTuple):
    """An adapter that fitted: its config, its layers at the time of the check, and the shapes of its tensors."""

    config: PeftConfig
    layers: Sequence[_Layer]
    shapes: Mapping[str, torch.Size]


@dataclasses.dataclass(eq=False)
class _Memory:
    """The adapters that fitted one model, the one that did last, and the calls that were watched.

    Of a call (by its arguments' names) it has the objects that may lead to the base, as they were.
    """

    fits: weakref.WeakKeyDictionary[Adapter, _Fit] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary[Adapter, _Fit]
    )
    last: _Fit | None = None
    calls: dict[Hashable, list[weakref.ref[Any]]] = dataclasses.field(
        default_factory=dict[Hashable, "list[weakref.ref[Any]]"]
    )


_MEMORIES: weakref.WeakKeyDictionary[nn.Module, _Memory] = weakref.WeakKeyDictionary()


def are_known(model: nn.Module, adapters: Sequence[Adapter], twins: Mapping[str, nn.Module]) -> bool:
    """Whether these adapters were checked against these layers before, and no class or shape has changed since.

    Args:
        model: the base.
        adapters: what is to act on it.
        twins: its layers by path, as they are now.
    """
    memory = _MEMORIES.get(model)
    on_weights = [adapter for adapter in adapters if _acts_on_weights(adapter)]
    return not on_weights or (memory is not None and all(_is_known(memory, one, twins) for one in on_weights))


def _acts_on_weights(adapter: Adapter) -> bool:
    return methods.of(adapter.config).on_weights is not None


def _is_known(memory: _Memory, adapter: Adapter, twins: Mapping[str, nn.Module]) -> bool:
    fit = memory.fits.get(adapter)
    if fit is None:
        fit = memory.last
        if fit is None or fit.config is not adapter.config or fit.shapes != _shapes(adapter):
            return False
        memory.fits[adapter] = fit
    return all(_is_as_it_was(one, twins.get(one.owner)) for one in fit.layers)


def _is_as_it_was(layer: _Layer, now: nn.Module | None) -> bool:
    if now is None or type(now) is not layer.cls:
        return False
    weight = now._parameters.get(layer.name)
    is_plain = type(cast("object", weight)) in (nn.Parameter, Tensor)
    return (cast("Tensor", weight).shape if is_plain else layers.shape_of(now, layer.name)) == layer.shape


def remember(model: nn.Module, adapters: Sequence[Adapter], twins: Mapping[str, nn.Module]) -> None:
    """Remember that these adapters fit the model; not those that change no weight: they have few sites to check."""
    for adapter in filter(_acts_on_weights, adapters):
        sites = [path for piece in companions.pieces(adapter) for path in _adapted(piece)]
        fit = _Fit(adapter.config, [_layer(layers.find(model, path), twins) for path in sites], _shapes(adapter))
        memory = _MEMORIES.setdefault(model, _Memory())
        memory.fits[adapter] = memory.last = fit


def _adapted(adapter: Adapter) -> list[str]:
    method = methods.of(adapter.config)
    return [one for one in site_paths(adapter) if not all(map(method.replaces, adapter.params.get(one, ())))]


def _layer(place: Place | None, twins: Mapping[str, nn.Module]) -> _Layer:
    assert place is not None, "an adapter that fits has no other sites"
    twin = twins[place.owner]
    return _Layer(place.owner, place.weight, type(twin), layers.shape_of(twin, place.weight))


def _shapes(adapter: Adapter) -> dict[str, torch.Size]:
    return {
        f"{path}.{name}": tensor.shape
        for tree in (adapter.params, adapter.buffers)
        for path, leaf in tree.items()
        for name, tensor in leaf.items()
    }


def is_known_call(model: nn.Module, call: Hashable, led_by: Sequence[Any]) -> bool:
    """Whether such a call was watched (`runtime.escaped`), and the objects that may lead to the base are the same."""
    memory = _MEMORIES.get(model)
    known = None if memory is None else memory.calls.get(call)
    if known is None or len(known) != len(led_by):
        return False
    return all(ref() is one for ref, one in zip(known, led_by, strict=True))


def remember_call(model: nn.Module, call: Hashable, led_by: Iterable[Any]) -> None:
    """Remember that such a call was watched, and nothing was found; where an object cannot be told again, it is not."""
    try:
        _MEMORIES.setdefault(model, _Memory()).calls[call] = [weakref.ref(one) for one in led_by]
    except TypeError:
        return
