"""Keys of companions, of copies of a base's tensors and of tied tables, without the prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftfn import methods
from peftfn.core.adapter import Adapter, Tree
from peftfn.core.config import PeftConfig, TargetedConfig
from peftfn.methods import Method, companions
from peftfn.models import matching


def to_keys(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of a companion, by key."""
    method = methods.of(adapter.config)
    return {
        f"{path}.{method.files.inside}.{key}": leaf[name]
        for path, leaf in adapter.params.items()
        for name, key in method.names.items()
        if name in leaf
    }


def from_keys(left: dict[str, Tensor], config: PeftConfig, prefix: str, source: str) -> Adapter:
    """The companion of this config; its keys, which have the prefix, are taken out of `left`."""
    method = methods.of(config)
    marks = {name: f".{method.files.inside}.{key}" for name, key in method.names.items()}
    params: Tree = {}
    for key in list(left):
        for name, mark in marks.items():
            path = key.removeprefix(prefix).removesuffix(mark)
            if key.endswith(mark) and companions.is_named(config, path):
                params.setdefault(path, {})[name] = left.pop(key)
    if not params:
        raise KeyError(f"{source} has no key that ends in {next(iter(marks.values()))!r}, which its config asks for.")
    return Adapter(params, {path: method.constants(config, path, leaf) for path, leaf in params.items()}, config)


def taken_copies(config: PeftConfig, own: Tree) -> dict[str, tuple[str, ...]]:
    """The copies of each table's tensors, of layers that are tied to it: they are taken out of `own`.

    PEFT writes one for each such layer. They are at sites that the config does not name.
    """
    named = {path for path in own if matching.is_named(cast("TargetedConfig", config), path)}
    found: dict[str, tuple[str, ...]] = {}
    for path in [path for path in own if path not in named]:
        home = next((one for one in sorted(named) if _is_same(own[one], own[path])), None)
        if home is not None:
            found[home] = (*found.get(home, ()), path)
            del own[path]
    return found


def _is_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def copied(method: Method, config: Any, path: str) -> str:
    """The path of a module of which copies are trained: PEFT puts them into the outermost module that is a target."""
    parts = path.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts) + 1)) if method.files.copies else ()
    home = next((one for one in outer if matching.is_target(config, one)), None)
    if home is None:
        return path
    inside = path.removeprefix(home)
    return f"{home}.{method.files.copies}" + (f".default{inside}" if inside else "")


def without_mark(method: Method, site: str) -> tuple[str, bool]:
    """The path of a module without what marks a copy of its tensors, and whether it was marked."""
    home, mark, named = f"{site}.".partition(f".{method.files.copies}.")
    inside = named.removesuffix(".").partition(".")[2]
    return (f"{home}.{inside}" if inside else home) if mark else site, bool(mark)
