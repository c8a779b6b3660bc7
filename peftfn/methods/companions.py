"""Companions: adapters of other methods that a config asks for, taken apart and put together.

An adapter of LoRA with `trainable_token_indices` holds LoRA's tensors at some sites and trained tokens at others. What
runs, merges, checks or writes adapters takes them apart here, and sees adapters of one method each.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peftfn import methods
from peftfn.core.adapter import Adapter, Tree
from peftfn.core.config import PeftConfig
from peftfn.models import matching


def pieces(adapter: Adapter) -> tuple[Adapter, ...]:
    """The adapter, or those that it consists of: its own method's first, which also has its saved modules."""
    others = methods.companion_configs(adapter.config)
    if not others:
        return (adapter,)
    found: list[Adapter] = []
    rest = adapter
    for number, config in enumerate(others):
        names = methods.of(config).slots
        paths = [path for path, leaf in rest.params.items() if leaf.keys() & names.keys() and is_named(config, path)]
        own = [{path: _only(tree.get(path, {}), names) for path in paths} for tree in (rest.params, rest.buffers)]
        members = rest.members
        if members is not None:
            configs = tuple(methods.companion_configs(one)[number] for one in members.configs)
            members = members._replace(configs=configs, paths=tuple(tuple(paths) for _ in configs))
        sites = {path: info for path, info in rest.sites.items() if path in paths}
        found.append(Adapter(own[0], own[1], config, sites, members))
        rest = rest.replace(params=_without(rest.params, own[0]), buffers=_without(rest.buffers, own[1]))
    return (rest, *found)


def united(first: Adapter, others: tuple[Adapter, ...]) -> Adapter:
    """The adapter that consists of these, with the config of the first."""
    params, buffers, sites = dict(first.params), dict(first.buffers), dict(first.sites)
    for other in others:
        for tree, more in ((params, other.params), (buffers, other.buffers)):
            tree.update({path: dict(sorted({**tree.get(path, {}), **leaf}.items())) for path, leaf in more.items()})
        sites = {**other.sites, **sites}
    return first.replace(params=dict(sorted(params.items())), buffers=dict(sorted(buffers.items())), sites=sites)


def is_named(config: PeftConfig, path: str) -> bool:
    """Whether a companion's config means the site at a path; one that names no modules means every site of its own."""
    names = getattr(config, "target_modules", None)
    return names is None or matching.ends_with(path, names)


def _only(leaf: Mapping[str, Tensor], names: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in leaf.items() if name in names}


def _without(tree: Tree, gone: Tree) -> Tree:
    left = {path: {n: t for n, t in leaf.items() if n not in gone.get(path, {})} for path, leaf in tree.items()}
    return {path: leaf for path, leaf in left.items() if leaf}
