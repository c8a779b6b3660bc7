"""Tensors that several sites have in common, in PEFT's files: their keys are those of the model that PEFT wraps."""

from __future__ import annotations

from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import SHARED, Adapter, Tree, is_shared, sorted_tree
from peftfn.methods import Method
from peftfn.models import layers
from peftfn.models.layers import Site

_ROOT = "base_model."


def to_keys(adapter: Adapter) -> dict[str, Tensor]:
    """The shared tensors of an adapter by their keys."""
    method = methods.of(adapter.config)
    names = method.in_files(adapter.config)
    return {
        f"{_ROOT}{names[name]}{path.removeprefix(SHARED)}": tensor
        for tree in (adapter.params, adapter.buffers)
        for path, leaf in tree.items()
        for name, tensor in leaf.items()
        if is_shared(path) and name in names
    }


def taken(method: Method, left: dict[str, Tensor]) -> Tree:
    """The shared tensors of a file, by path and name; their keys are taken out of those that are left."""
    marks = {name: f"{_ROOT}{slot.key or name}" for name, slot in method.slots.items() if slot.shared}
    found: Tree = {}
    for key in list(left):
        for name, mark in marks.items():
            if key == mark or key.startswith(f"{mark}."):
                found.setdefault(SHARED + key.removeprefix(mark), {})[name] = left.pop(key)
    return found


def joined(adapter: Adapter, shared: Tree, model: nn.Module | None, source: str) -> Adapter:
    """The adapter with what its sites have in common, of which `shared` is what the file holds.

    Raises:
        KeyError: the file lacks a tensor.
        ValueError: it is made of what only the model can tell, and there is none.
    """
    config, method = adapter.config, methods.of(adapter.config)
    assert method.sharing is not None, "of a method that shares"
    homes = method.sharing.homes(config, list(adapter.sites))
    sites = {path: info._replace(shares=homes[path]) for path, info in adapter.sites.items()}
    params: Tree = {path: dict(leaf) for path, leaf in adapter.params.items()}
    buffers: Tree = {path: dict(leaf) for path, leaf in adapter.buffers.items()}
    derived: Tree = {}
    if method.sharing.derived is not None:
        there = {path: {**params.get(path, {}), **leaf} for path, leaf in {**params, **shared}.items()}
        derived = method.sharing.derived(config, there, _sites(adapter, model))
    for tree in (derived, shared):
        for path, leaf in tree.items():
            for name, tensor in leaf.items():
                (buffers if method.is_held(name) else params).setdefault(path, {})[name] = tensor
    for home in sorted({*homes.values()}):
        have = {**params.get(home, {}), **buffers.get(home, {})}
        if lost := [name for name, slot in method.slots.items() if slot.shared and name not in have]:
            key = f"{_ROOT}{method.slots[lost[0]].key or lost[0]}{home.removeprefix(SHARED)}"
            raise KeyError(f"{source} has no key {key!r}, which all its layers need; expected a whole adapter.")
    return adapter.replace(params=sorted_tree(params), buffers=sorted_tree(buffers), sites=sites)


def _sites(adapter: Adapter, model: nn.Module | None) -> dict[str, Site]:
    found: dict[str, Site] = {}
    for path, info in adapter.sites.items():
        place = None if model is None else layers.find(model, path)
        if model is not None and place is not None:
            found[path] = layers.site_of(model.get_submodule(place.owner), place, path, info)
    return found
