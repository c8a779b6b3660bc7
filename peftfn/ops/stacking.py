"""Stacks: K adapters as one, every tensor with a leading axis K."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from peftfn import methods
from peftfn.core import stack_slices
from peftfn.core.adapter import (
    PRESENT,
    UNKNOWN,
    Adapter,
    Leaf,
    Members,
    SiteInfo,
    Tree,
    as_tuple,
    is_shared,
    sorted_tree,
)
from peftfn.core.config import LayeredConfig
from peftfn.methods import Method
from peftfn.models import layers
from peftfn.ops import common_sites


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose tensors have a leading axis K = len(adapters).

    Adapters may differ in rank (the smaller ones are padded with zeros, exact in training too), in alpha, and in
    which sites they have. `torch.vmap(lambda a: pf.apply(model, a, batch))(stacked)` runs all of them, and
    `pf.apply(model, stacked, batch, index=i)` runs adapter `i[n]` on row n.

    Args:
        adapters: single adapters of one method, for one base; at least one.

    Raises:
        ValueError: there is none, one is a stack itself, they are of unlike methods or bases, or differ in what a
            forward reads (dropout), or one of them lacks a whole module that another one replaces.
        TypeError: one is no adapter.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> made = [pf.init(model, pf.LoraConfig(r=r, target_modules=["0"])) for r in (2, 3)]
        >>> pf.stack(made).params["0"]["lora_A"].shape
        torch.Size([2, 3, 4])
    """
    adapters = as_tuple(adapters)
    if not adapters:
        raise ValueError("stack was given no adapter; expected at least one.")
    method = _common_method(adapters)
    sites: dict[str, SiteInfo] = {}
    params: Tree = {}
    buffers: Tree = {}
    for path in sorted({path for adapter in adapters for path in (*adapter.params, *adapter.buffers)}):
        sites[path], own = _stack_own(method, adapters, path)
        params[path] = {name: tensor for name, tensor in own.items() if name in method.names}
        params[path] |= _stack_rest(method, [adapter.params.get(path) for adapter in adapters], path)
        buffers[path] = {name: tensor for name, tensor in own.items() if method.is_held(name) or name == PRESENT}
        buffers[path] |= _stack_rest(method, [adapter.buffers.get(path) for adapter in adapters], path)
    params, buffers = sorted_tree(params), sorted_tree(buffers)
    members = Members(
        configs=tuple(adapter.config for adapter in adapters),
        paths=tuple((*adapter.params, *_shared_constants(adapter)) for adapter in adapters),
        sites=tuple(adapter.sites for adapter in adapters),
        axes=_first(params).dim(),
        buffer_axes=_first(buffers).dim() if buffers else 0,
    )
    return Adapter(params, buffers, method.stacking.shared(members.configs), sites, members)


def unstack(stacked: Adapter) -> list[Adapter]:
    """The adapters of a stack, as they went in: ranks, sites and configs restored.

    A stack that `torch.vmap` or `tree_map` changed keeps its config, so trained stacks come apart the same way. The
    tensors are views of the stack's.

    Args:
        stacked: what `stack` returned.

    Raises:
        TypeError: it is a single adapter.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> made = [pf.init(model, pf.LoraConfig(r=r, target_modules=["0"])) for r in (2, 3)]
        >>> [one.params["0"]["lora_A"].shape for one in pf.unstack(pf.stack(made))]
        [torch.Size([2, 4]), torch.Size([3, 4])]
    """
    if stacked.members is None:
        raise TypeError(
            f"unstack was given a single adapter ({type(stacked.config).__name__}); expected peftfn.stack(...)."
        )
    return [_slice(stacked, stacked.members, number) for number in range(size(stacked))]


def is_whole(adapter: Adapter) -> bool:
    """Whether this is a stack with its axis K: inside a `torch.vmap` that maps over it, it has none."""
    return adapter.members is not None and _first(adapter.params).dim() == adapter.members.axes


def is_half(adapter: Adapter) -> bool:
    """Whether the parameters of a stack are mapped and its buffers are not, or the other way round."""
    members = adapter.members
    if members is None or not any(adapter.buffers.values()):
        return False
    return (_first(adapter.params).dim() == members.axes) != (_first(adapter.buffers).dim() == members.buffer_axes)


def _first(tree: Tree) -> Tensor:
    return next(iter(next(iter(tree.values())).values()))


def size(stacked: Adapter) -> int:
    """K, the number of adapters in a stack."""
    assert stacked.members is not None
    return len(stacked.members.configs)


def _common_method(adapters: Sequence[Adapter]) -> Method:
    if any(adapter.members is not None for adapter in adapters):
        raise ValueError("stack was given a stack; expected single adapters: [*peftfn.unstack(stacked), another].")
    kinds = sorted({methods.of(adapter.config).called for adapter in adapters})
    if len(kinds) > 1:
        raise ValueError(f"stack was given adapters of {kinds}; expected single adapters of one method.")
    method = methods.of(adapters[0].config)
    free = {*(field.name for field in dataclasses.fields(LayeredConfig)), *method.stacking.varies}
    free.add(
        "fan_in_fan_out"
    )  # how layers store their weights is the base's own; peft says it of the first adapter alone
    for field in [field.name for field in dataclasses.fields(method.config) if field.name not in free]:
        values = {getattr(adapter.config, field) for adapter in adapters}
        if len(values) > 1:
            way = ""
            if field.endswith("dropout"):
                way = f" To serve them: a.replace(config=dataclasses.replace(a.config, {field}=0)) for each."
            raise ValueError(
                f"stack was given adapters with {field} of {sorted(map(str, values))}; expected one value.{way}"
            )
    return method


def _stack_own(method: Method, adapters: Sequence[Adapter], path: str) -> tuple[SiteInfo, Leaf]:
    found = [_own(method, adapter, path) or None for adapter in adapters]
    info, own = common_sites.together("stack", method, path, found, adapters)
    if not any(own):
        return info, {}
    at = layers.pattern_path(path, {path for adapter in adapters for path in adapter.params})
    column_major = frozenset(name for name, slot in method.slots.items() if slot.column_major)
    padded = method.pad([adapter.config for adapter in adapters], at, own)
    stacked = _stack_plain(padded, path, column_major=column_major)
    present = _present(method, found, [adapter.sites.get(path, UNKNOWN) for adapter in adapters], info)
    return info, stacked if present is None else {**stacked, PRESENT: present}


def _present(
    method: Method, found: Sequence[Leaf | None], infos: Sequence[SiteInfo], wanted: SiteInfo
) -> Tensor | None:
    """Which of the adapters act at a site, or on which of its outputs, where training would else go past that."""
    parts = common_sites.rows_of_each(found, infos, wanted)
    if parts is not None:
        return torch.stack(parts)
    there = next(leaf for leaf in found if leaf)
    if None not in found or not method.trains_neutral(there):
        return None
    one = next(tensor for tensor in there.values() if tensor.is_floating_point())
    return one.new_tensor([float(leaf is not None) for leaf in found])


def _shared_constants(adapter: Adapter) -> list[str]:
    """The paths of what its sites have in common where none of that is trained."""
    return [path for path in adapter.buffers if is_shared(path) and path not in adapter.params]


def _own(method: Method, adapter: Adapter, path: str) -> Leaf:
    """The method's tensors of an adapter at one site, params and buffers together."""
    both = {**adapter.params.get(path, {}), **adapter.buffers.get(path, {})}
    return {name: tensor for name, tensor in both.items() if name in method.slots}


def _stack_rest(method: Method, leaves: Sequence[Leaf | None], path: str) -> Leaf:
    """The tensors that replace the base's, stacked."""
    rest = [{n: t for n, t in (leaf or {}).items() if method.replaces(n)} or None for leaf in leaves]
    return _stack_plain(rest, path) if any(rest) else {}


def _stack_plain(leaves: Sequence[Leaf | None], path: str, column_major: frozenset[str] = frozenset()) -> Leaf:
    model = next(leaf for leaf in leaves if leaf is not None)
    filled = [leaf for leaf in leaves if leaf is not None]
    if len(filled) < len(leaves):
        raise ValueError(
            f"stack: only some of the adapters replace {path} ({', '.join(model)}); expected all of them, or none. An "
            "embedding that PEFT saved beside an adapter and that is the base's own may be left out of its file "
            "(save_embedding_layers=False)."
        )
    if any(leaf.keys() != model.keys() for leaf in filled):
        raise ValueError(
            f"stack: the adapters hold different tensors at {path}: {sorted({n for f in filled for n in f})}."
        )
    return {
        name: _stack_tensors([leaf[name] for leaf in filled], f"{path}.{name}", name in column_major) for name in model
    }


def _stack_tensors(tensors: Sequence[Tensor], name: str, column_major: bool) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"stack: {name} has shapes {sorted(shapes)}; expected adapters of one base.")
    return stack_slices.stacked(tensors, column_major)


def _slice(stacked: Adapter, members: Members, number: int) -> Adapter:
    config, paths, sites = members.configs[number], set(members.paths[number]), members.sites[number]
    method = methods.of(config)
    params, buffers = (
        {
            path: {name: tensor[number] for name, tensor in leaf.items()}
            for path, leaf in tree.items()
            if path in paths or not (path in stacked.params or is_shared(path))
        }
        for tree in (stacked.params, stacked.buffers)
    )
    for path in sorted(paths):
        own = _own(method, Adapter(params, buffers, config), path)
        if own:
            there = [c for c, has in zip(members.configs, members.paths, strict=True) if path in has]
            own = method.trim(config, there, layers.pattern_path(path, set(stacked.params)), own)
            own = common_sites.on_own_rows(method, own, sites.get(path, UNKNOWN), stacked.sites.get(path, UNKNOWN))
            trained = {name: tensor for name, tensor in own.items() if name in method.names}
            params.setdefault(path, {}).update(trained)
            rest = {name: tensor for name, tensor in buffers.get(path, {}).items() if method.replaces(name)}
            buffers[path] = rest | {name: tensor for name, tensor in own.items() if method.is_held(name)}
    return Adapter(sorted_tree(params), sorted_tree(buffers), config, sites)
