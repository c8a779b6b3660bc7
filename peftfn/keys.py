"""Tensor names in PEFT's files, both ways.

| what | key, after `base_model.model.` |
|---|---|
| a layer's leaf | `<path>.lora_A.weight` |
| the `out_proj` of an `nn.MultiheadAttention` at `<path>` | `<path>.base_layer.out_proj.lora_A.weight` |
| bare parameters of the module at `<path>`, in the module's order | the last one `<path>.lora_A.weight`, the one before it `<path>.base_layer.lora_A.weight`, and so on |
| a trained bias of an adapted layer | `<path>.base_layer.bias` (0.21), `<path>.bias` (0.5.0) |
| any other trained bias, a head | `<path>.bias`, `<path>.weight` |
| an embedding saved along with its adapter | `<path>.base_layer.weight` |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftfn import attach, graft, layers, methods, targets
from peftfn.adapter import Adapter, Leaf, Tree, sorted_tree
from peftfn.config import PeftConfig
from peftfn.methods import Method

PREFIX = "base_model.model."
_BASE = ".base_layer"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def to_keys(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors by their keys in PEFT's latest layout."""
    method = methods.of(adapter.config)
    found: dict[str, Tensor] = {}
    sites = {path: _site_key(adapter, path) for path in adapter.params}
    for path, leaf in adapter.params.items():
        own = {name: tensor for name, tensor in leaf.items() if not method.replaces(name)}
        for name, tensor in (method.to_file(own) if own else {}).items():
            found[f"{PREFIX}{sites[path]}.{method.names[name]}"] = tensor
    for tree in (adapter.params, adapter.buffers):
        for path, leaf in tree.items():
            adapted = any(not method.replaces(name) for name in adapter.params.get(path, {}))
            for name in filter(method.replaces, leaf):
                found[f"{PREFIX}{path}{_BASE if adapted else ''}.{name}"] = leaf[name]
    return dict(sorted(found.items()))


def _site_key(adapter: Adapter, path: str) -> str:
    parent, _, name = path.rpartition(".")
    if layers.pattern_path(path, adapter.params) == parent and parent:
        return f"{parent}{_BASE}.{name}"
    if not _is_parameter(adapter.config, path):
        return path
    siblings = _ordered(adapter.config, [other for other in adapter.params if other.rpartition(".")[0] == parent])
    return parent + _BASE * (len(siblings) - 1 - siblings.index(path))


def _names(config: PeftConfig) -> Sequence[str]:
    return cast("Sequence[str]", getattr(config, "target_parameters", None) or ())


def _is_parameter(config: Any, path: str) -> bool:
    return targets.ends_with(path, _names(config)) and not targets.is_target(config, path)


def _ordered(config: PeftConfig, paths: Sequence[str]) -> list[str]:
    # `init` and `load` keep target_parameters in the order in which the modules hold the parameters.
    names = _names(config)
    found = [path for path in paths if _is_parameter(config, path)]
    return sorted(found, key=lambda path: next(i for i, name in enumerate(names) if targets.ends_with(path, [name])))


def from_keys(
    tensors: Mapping[str, Tensor], config: PeftConfig, source: str, *, ordered: bool, model: nn.Module | None
) -> Adapter:
    """The adapter whose tensors have these keys, in the layout of any version of PEFT.

    Args:
        tensors: a file's content.
        config: its config.
        source: the file, for messages.
        ordered: whether the config's `target_parameters` are in the model's order, as this library writes them.
        model: settles that order otherwise.
    """
    if not tensors:
        raise ValueError(f"{source} holds no tensor; it is not the weights of an adapter.")
    method = methods.of(config)
    if hasattr(config, "modules_to_save"):
        config = dataclasses.replace(config, modules_to_save=targets.with_heads(cast("Any", config)))  # type: ignore[call-arg]
    if model is not None and _names(config):
        config = dataclasses.replace(config, target_parameters=targets.in_model_order(model, _names(config)))  # type: ignore[call-arg]
    own: Tree = {}
    params: Tree = {}
    buffers: Tree = {}
    for key, tensor in tensors.items():
        site, name = _split(method, key, source)
        if name in method.names:
            own.setdefault(site, {})[name] = tensor
        else:
            path = site.removesuffix(_BASE)
            home = params if _is_trained(config, path, name, site) else buffers
            home.setdefault(path, {})[name] = tensor
    paths = _paths(config, own, source, ordered or model is not None)
    for site, leaf in own.items():
        at = layers.pattern_path(paths[site], set(paths.values()))
        params.setdefault(paths[site], {}).update(method.from_file(_whole(leaf, site, source)))
        buffers.setdefault(paths[site], {}).update(method.buffers(config, at, leaf))
    return Adapter(sorted_tree(params), sorted_tree(buffers), config)


def _split(method: Method, key: str, source: str) -> tuple[str, str]:
    if not key.startswith(PREFIX):
        raise KeyError(f"{source} has the key {key!r}; expected keys that start with {PREFIX!r}, as PEFT writes them.")
    rest = key.removeprefix(PREFIX).removeprefix("_orig_mod.")
    for name, ending in method.names.items():
        if rest.endswith(f".{ending}"):
            return rest.removesuffix(f".{ending}"), name
    site, _, name = rest.rpartition(".")
    if name in ("weight", "bias") and site.rpartition(".")[2].startswith(("lora_", "ia3_", "hada_", "vera_", "oft_")):
        raise KeyError(
            f"{source} has the key {key!r}, which {method.config.__name__} does not know; is the config this file's?"
        )
    return site, name


def _is_trained(config: Any, path: str, name: str, site: str) -> bool:
    if name in _STATISTICS:
        return False
    if name == "bias" and getattr(config, "bias", "none") != "none":
        return True
    return not site.endswith(_BASE) and any(
        path.endswith(head) or f"{head}." in path for head in config.modules_to_save or ()
    )


def _whole(leaf: Leaf, site: str, source: str) -> Leaf:
    names = {name.removesuffix("_A").removesuffix("_B") for name in leaf}
    for name in names:
        for half in (f"{name}_A", f"{name}_B"):
            if half not in leaf:
                raise KeyError(f"{source} has {sorted(leaf)} for {site!r}, but no {half}; the file is incomplete.")
    return leaf


def _paths(config: Any, own: Mapping[str, Leaf], source: str, ordered: bool) -> dict[str, str]:
    """The site path of each key: attention's output projection and bare parameters are nested in PEFT's keys."""
    paths: dict[str, str] = {}
    for site in own:
        if site.endswith(f"{_BASE}.out_proj"):
            paths[site] = site.removesuffix(f"{_BASE}.out_proj") + ".out_proj"
            continue
        owner = _owner(site)
        nested = sorted((one for one in own if _owner(one) == owner), key=len, reverse=True)  # in the module's order
        names = [name for name in _names(config) if _owns(name, owner)]
        if nested == [owner] and (not names or targets.is_target(config, owner)):
            paths[site] = owner
        elif len(names) != len(nested) or (len(nested) > 1 and not ordered):
            raise ValueError(
                f"{source}: {owner!r} has {len(nested)} adapted parameters of {names or 'unknown names'}, and PEFT's keys do "
                "not say which is which without the model; pass it: peftfn.load(folder, model=model)."
            )
        else:
            paths[site] = f"{owner}.{names[nested.index(site)].rpartition('.')[2]}"
    return paths


def _owner(site: str) -> str:
    while site.endswith(_BASE):
        site = site.removesuffix(_BASE)
    return site


def _owns(name: str, owner: str) -> bool:
    suffix = name.rpartition(".")[0]
    return not suffix or targets.ends_with(owner, [suffix])


def check_against(adapter: Adapter, model: nn.Module, source: str) -> None:
    """Hold an adapter against the model it is for.

    Raises:
        KeyError: it has sites that the model has not, or lacks sites that its config names in the model.
        ValueError: a shape does not fit.
    """
    method = methods.of(adapter.config)
    expected = method.sites(model, adapter.config)
    missing = [path for path in expected if path not in adapter.params]
    unexpected = [path for path in adapter.params if layers.find(model, path) is None and not _has_module(model, path)]
    if missing or unexpected:
        raise KeyError(
            f"{source} does not fit this {type(model).__name__}: missing sites {_few(missing)}, unexpected sites "
            f"{_few(unexpected)}. It was made for another architecture, or its config was changed."
        )
    twins = graft.Twins(model)
    attach.attach(twins.root, twins.by_path, attach.parts([adapter]), lambda twin, name, compute: None, armed=False)


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _few(paths: Sequence[str], most: int = 4) -> str:
    return f"{len(paths)} ({', '.join(paths[:most])}{', ...' if len(paths) > most else ''})" if paths else "none"
