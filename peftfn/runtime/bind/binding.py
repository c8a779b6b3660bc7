"""What a bound module knows of its adapters, and the adapters as it has them now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from peftfn.core.adapter import Adapter, Tree, sorted_tree
from peftfn.models import layers
from peftfn.runtime.bind import parameters

KEY = "_peftfn_binding"
"""The attribute of a bound module that is its `Binding`."""


class Binding(NamedTuple):
    """What a bound module knows of its adapters.

    Attributes:
        slots: where each adapter is.
        added: full names of what `bind` put beside the base's own parameters and buffers.
        tied: groups of names that share one parameter in the base.
        single: whether one adapter was given, and not a tuple.
        buffers: the base's buffers, of which the module has copies that a forward may write to.
    """

    slots: tuple[parameters.Slots, ...]
    added: frozenset[str]
    tied: tuple[tuple[str, ...], ...]
    single: bool
    buffers: Mapping[str, Tensor]


def of(bound: nn.Module) -> Binding:
    """The binding of a bound module."""
    return bound.__dict__[KEY]


def named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each under all of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names that share one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def full_names(slots: parameters.Slots) -> Iterator[str]:
    """The names in the bound module of one adapter's tensors."""
    for names in (slots.params, slots.buffers):
        for here in names.values():
            yield from here.values()


def adapters(bound: nn.Module, state: Mapping[str, Tensor]) -> tuple[Adapter, ...]:
    """The adapters that the module was bound with, with their tensors from these of the module, by full name."""

    def tree(names: parameters.Names) -> Tree:
        return sorted_tree(
            {path: {leaf: state[name].detach() for leaf, name in here.items()} for path, here in names.items()}
        )

    return tuple(one.adapter.replace(params=tree(one.params), buffers=tree(one.buffers)) for one in of(bound).slots)


def own_names(bound: nn.Module) -> frozenset[str]:
    """All names in the bound module of its adapters' tensors: a layer at two paths has its own under both."""
    every = dict(named(bound))
    slots = {name for one in of(bound).slots for name in full_names(one)}
    tensors = {id(every[name]) for name in slots & every.keys()}
    return frozenset(slots | {name for name, tensor in every.items() if id(tensor) in tensors})


def lasting(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names, without the buffers that a state dict does not have."""
    gone = {
        f"{path}.{name}" if path else name
        for path, inner in layers.named_modules(module, remove_duplicate=False)
        for name in inner._non_persistent_buffers_set
    }
    return {name: tensor for name, tensor in named(module) if name not in gone}
