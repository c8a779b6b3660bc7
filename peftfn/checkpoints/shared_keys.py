"""Tensors that several sites have in common, in PEFT's files: their keys are those of the model that PEFT wraps.

Of some methods a file has one more copy at each site (`Slot.at_sites`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import SHARED, Adapter, Leaf, Tree, is_shared, leaf_of, sorted_tree
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


def copies(method: Method, adapter: Adapter, path: str) -> Leaf:
    """Those shared tensors of a site of which a file has a copy there."""
    names = [name for name, slot in method.slots.items() if slot.at_sites and slot.stored(adapter.config)]
    whole = leaf_of(adapter, path) if names else {}
    return {name: whole[name] for name in names}


def taken(method: Method, left: dict[str, Tensor], source: str) -> Tree:
    """The shared tensors of a file, by path and name; their keys are taken out of those that are left.

    Raises:
        ValueError: a site's copy has other numbers than the model's.
    """
    shared = {name: slot for name, slot in method.slots.items() if slot.shared}
    marks = {name: f"{_ROOT}{slot.key or name}" for name, slot in shared.items()}
    endings = {name: f".{slot.key or name}" for name, slot in shared.items() if slot.at_sites}
    found: Tree = {}
    for key in list(left):
        for name, mark in marks.items():
            if key == mark or key.startswith(f"{mark}."):
                found.setdefault(SHARED + key.removeprefix(mark), {})[name] = left.pop(key)
    for key in list(left):
        for name in [name for name, ending in endings.items() if key.endswith(ending)]:
            copy = left.pop(key)
            if not torch.equal(copy, found.setdefault(SHARED, {}).setdefault(name, copy)):
                raise ValueError(
                    f"{source}: {key!r} has other numbers than {marks[name]!r}, which all its layers share."
                )
    return found


def joined(adapter: Adapter, shared: Tree, model: nn.Module | None, source: str) -> Adapter:
    """The adapter with what its sites have in common, of which `shared` is what the file holds.

    Raises:
        KeyError: the file lacks a tensor.
        ValueError: it is made of what only the model can tell, and there is none.
    """
    config, method = adapter.config, methods.of(adapter.config)
    assert method.sharing is not None, "of a method that shares"
    there = _sites(adapter, model)
    homes = {path: info.shares for path, info in adapter.sites.items()}  # of this library's own files a note may say it
    if not all(homes.values()):
        homes = method.sharing.homes(config, list(there or adapter.sites), there)
    sites = {path: info._replace(shares=homes.get(path, "")) for path, info in adapter.sites.items()}
    params: Tree = {path: dict(leaf) for path, leaf in adapter.params.items()}
    buffers: Tree = {path: dict(leaf) for path, leaf in adapter.buffers.items()}
    derived: Tree = {}
    if method.sharing.derived is not None:
        known = [params, buffers, shared]
        whole = {path: {k: v for tree in known for k, v in tree.get(path, {}).items()} for one in known for path in one}
        derived = method.sharing.derived(config, whole, there)
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
    """The adapter's sites in the model, in its order; of one that it lacks speaks what holds the two together."""
    if model is None:
        return {}
    found: dict[str, Site] = {}
    for path in [path for path, _ in layers.named_modules(model) if path in adapter.sites]:
        place = layers.find(model, path)
        if place is not None:
            found[path] = layers.site_of(model.get_submodule(place.owner), place, path, adapter.sites[path])
    return found
