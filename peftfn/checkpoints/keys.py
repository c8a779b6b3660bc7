"""Tensor names in PEFT's files, both ways.

| what | key, after `base_model.model.` |
|---|---|
| a layer's leaf | `<path>.lora_A.weight` |
| the `out_proj` of an `nn.MultiheadAttention` at `<path>` | `<path>.base_layer.out_proj.lora_A.weight` |
| a bare parameter of the module at `<path>` | `<path>.lora_A.weight` |
| several of them | the last one so, the one before it `<path>.base_layer.lora_A.weight`, and so on |
| a trained bias of an adapted layer | `<path>.base_layer.bias` (0.21), `<path>.bias` (0.5.0) |
| any other trained bias, a head | `<path>.bias`, `<path>.weight` |
| a copy of a site's own tensor | `<path>.ln_tuning_layers.weight` |
| of a module inside it, with the adapter's name | `<path>.ln_tuning_layers.default.fc1.weight` |
| an embedding saved along with its adapter | `<path>.base_layer.weight` |
| a prompt, a prefix | `prompt_embeddings`, with nothing before it; heads beside it follow `base_model.` alone |
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftfn import methods
from peftfn.checkpoints import companion_keys, key_paths, prompt_keys, shared_keys, site_notes
from peftfn.core.adapter import UNKNOWN, Adapter, SiteInfo, Sites, Tree, site_paths, sorted_tree
from peftfn.core.config import PeftConfig
from peftfn.methods import companions
from peftfn.models import layers, matching, targets
from peftfn.models.layers import Site
from peftfn.ops import common_sites
from peftfn.weights import codecs

PREFIX = "base_model.model."
_BASE = ".base_layer"


def to_keys(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors by their keys in PEFT's latest layout.

    Raises:
        ValueError: PEFT has one key for two of them.
    """
    first, *others = companions.pieces(adapter)
    more = {f"{PREFIX}{key}": one for other in others for key, one in companion_keys.to_keys(other).items()}
    return dict(sorted({**_to_keys(first), **more, **shared_keys.to_keys(first)}.items()))


def _to_keys(adapter: Adapter) -> dict[str, Tensor]:
    method = methods.of(adapter.config)
    if method.on_call is not None:
        return prompt_keys.to_keys(method, adapter)
    found: list[tuple[str, Tensor]] = []
    adapted: list[str] = []
    names = method.in_files(adapter.config)
    for path in site_paths(adapter):
        leaf = adapter.params.get(path, {})
        own = {name: tensor for name, tensor in leaf.items() if not method.replaces(name)}
        if own and "." not in path and _is_parameter(adapter.config, path):
            raise ValueError(
                f"{path!r} is a parameter of the model itself, and PEFT's files have keys for those of modules inside "
                "it only. Put the model into another module (torch.nn.Sequential(model)) and adapt that."
            )
        if own:
            adapted += [path.rpartition(".")[0] if _is_parameter(adapter.config, path) else path]
            held = {name: tensor for name, tensor in adapter.buffers.get(path, {}).items() if method.is_held(name)}
            info = adapter.sites.get(path, UNKNOWN)
            here = common_sites.on_all_rows(method, {**own, **held}, info)
            whole = {**method.files.write(adapter.config, here), **shared_keys.copies(method, adapter, path)}
            pairs = [(key, whole[name]) for name, key in names.items() if name in whole]
            found += [(f"{at}.{key}", tensor) for at in (_site_key(adapter, path), *info.tied) for key, tensor in pairs]
    for tree in (adapter.params, adapter.buffers):
        for path, leaf in tree.items():
            module = companion_keys.copied(method, adapter.config, _nested(adapter, path) + _BASE * adapted.count(path))
            found += [(f"{module}.{name}", leaf[name]) for name in filter(method.replaces, leaf)]
    keyed = {f"{PREFIX}{key}": tensor for key, tensor in sorted(found, key=lambda pair: pair[0])}
    if len(keyed) < len(found):
        raise ValueError(
            "two tensors of the adapter have one key in PEFT's files: target_modules and target_parameters name the "
            "same layer. Name it in one of them."
        )
    return keyed


def fixed_keys(adapter: Adapter) -> list[str]:
    """The keys of the buffers of saved modules whose names do not say that they are buffers."""
    adapter = companions.pieces(adapter)[0]
    replaces = methods.of(adapter.config).replaces
    tree = {path: {name: leaf[name] for name in filter(replaces, leaf)} for path, leaf in adapter.buffers.items()}
    found = to_keys(adapter.replace(params={}, buffers=tree))
    return [key for key in found if key.rpartition(".")[2] not in prompt_keys.STATISTICS]


def _is_buffer(model: nn.Module | None, path: str, name: str) -> bool:
    module = None if model is None else layers.module_at(model, path)
    return module is not None and name in module._buffers and codecs.of(module) is codecs.DENSE


def _nested(adapter: Adapter, path: str) -> str:
    """The path of a module, which PEFT moves where its parent is an adapted attention."""
    parent, _, name = path.rpartition(".")
    return path if layers.pattern_path(path, adapter.params) == path else f"{parent}{_BASE}.{name}"


def _site_key(adapter: Adapter, path: str) -> str:
    parent = path.rpartition(".")[0]
    if not _is_parameter(adapter.config, path):
        return _nested(adapter, path)
    siblings = _ordered(adapter.config, [other for other in adapter.params if other.rpartition(".")[0] == parent])
    return parent + _BASE * (len(siblings) - 1 - siblings.index(path))


def _is_parameter(config: Any, path: str) -> bool:
    return matching.ends_with(path, key_paths.parameter_names(config)) and not matching.is_target(config, path)


def _ordered(config: PeftConfig, paths: Sequence[str]) -> list[str]:
    # `init` and `load` keep target_parameters in the order in which the modules hold the parameters.
    names = key_paths.parameter_names(config)
    found = [path for path in paths if _is_parameter(config, path)]
    return sorted(found, key=lambda path: next(i for i, name in enumerate(names) if matching.ends_with(path, [name])))


def from_keys(
    tensors: Mapping[str, Tensor],
    config: PeftConfig,
    source: str,
    *,
    ordered: bool,
    model: nn.Module | None,
    noted: Sites | None = None,
    fixed: Collection[str] = (),
) -> Adapter:
    """The adapter whose tensors have these keys, in the layout of any version of PEFT.

    Args:
        tensors: a file's content.
        config: its config.
        source: the file, for messages.
        ordered: whether the config's `target_parameters` are in the model's order, as this library writes them.
        model: settles that order otherwise.
        noted: what a note beside the tensors says of the sites (`peftfn.checkpoints.site_notes`).
        fixed: keys of buffers of saved modules, as `fixed_keys` gives them.
    """
    if not tensors:
        raise ValueError(f"{source} holds no tensor; it is not the weights of an adapter.")
    left = dict(tensors)
    others = [companion_keys.from_keys(left, other, PREFIX, source) for other in methods.companion_configs(config)]
    method = methods.of(config)
    shared = shared_keys.taken(method, left, source) if method.sharing is not None else {}
    first = _from_keys(left, config, source, ordered=ordered, model=model, noted=noted, fixed=fixed)
    if method.sharing is not None:
        first = shared_keys.joined(first, shared, model, source)
    return companions.united(first, tuple(others)) if others else first


def _from_keys(
    tensors: Mapping[str, Tensor],
    config: PeftConfig,
    source: str,
    *,
    ordered: bool,
    model: nn.Module | None,
    noted: Sites | None,
    fixed: Collection[str],
) -> Adapter:
    method = methods.of(config)
    if "modules_to_save" in {field.name for field in dataclasses.fields(config)}:
        config = dataclasses.replace(config, modules_to_save=matching.with_heads(config))
    if method.on_call is not None:
        return prompt_keys.from_keys(method, tensors, config, source)
    if model is not None and key_paths.parameter_names(config):
        config = dataclasses.replace(
            config, target_parameters=targets.in_model_order(model, key_paths.parameter_names(config))
        )
    keyed: Tree = {}
    params: Tree = {}
    buffers: Tree = {}
    sites: dict[str, SiteInfo] = {}
    names = method.in_files(config)
    for key, tensor in _without_copies(tensors).items():
        site, name = key_paths.split(method, config, key, PREFIX, source)
        site, is_copy = companion_keys.without_mark(method, site) if method.files.copies else (site, False)
        if name in names:
            key_paths.refuse_other_tensor(method, name, tensor, key, source)
            keyed.setdefault(site, {})[name] = tensor
        else:
            path = key_paths.owner(config, site)
            is_buffer = key in fixed or not tensor.is_floating_point() or _is_buffer(model, path, name)
            is_trained = (is_copy and name not in prompt_keys.STATISTICS) or _is_trained(config, path, name, site)
            (params if is_trained and not is_buffer else buffers).setdefault(path, {})[name] = tensor
    tied = companion_keys.taken_copies(config, keyed) if method.of_tables else {}
    on_inputs = method.targets.input_side
    paths = key_paths.paths(config, keyed, source, ordered, model)
    for site, leaf in keyed.items():
        at = layers.pattern_path(paths[site], set(paths.values()))
        try:
            method.files.check(config, at, leaf)
        except (KeyError, ValueError) as error:
            raise type(error)(f"{source} has {error.args[0]} for {paths[site]!r}; expected a whole adapter.") from None
        side = on_inputs is not None and on_inputs(config, at)
        info = (noted or {}).get(paths[site], UNKNOWN)._replace(input_side=side, tied=tied.get(site, ()))
        sites[paths[site]] = info
        whole = method.files.read(config, leaf)
        info = site_notes.fitting(info, whole, paths[site], source)
        own = dict(whole) if info.rows is None else common_sites.on_own_rows(method, whole, info)
        if method.files.derived is not None:
            own |= method.files.derived(config, at, own, _site(model, paths[site], info))
        trained, held = method.parted(config, at, own)
        params.setdefault(paths[site], {}).update(trained)
        buffers.setdefault(paths[site], {}).update(held)
    return Adapter(sorted_tree(params), sorted_tree(buffers), config, sites)


def _without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that PEFT writes again, with bias="all", from inside the wrapper of a saved module."""
    plain = {key: re.sub(r"\.(original_module|modules_to_save(\.[^.]+)?)\.", ".", key) for key in tensors}
    return {key: tensor for key, tensor in tensors.items() if plain[key] == key or plain[key] not in tensors}


def _site(model: nn.Module | None, path: str, info: SiteInfo) -> Site | None:
    place = None if model is None else layers.find(model, path)
    if model is None or place is None:  # that the model has no such site is said by what holds the two together
        return None
    return layers.site_of(model.get_submodule(place.owner), place, path, info)


def _is_trained(config: Any, path: str, name: str, site: str) -> bool:
    if name in prompt_keys.STATISTICS:
        return False
    if name.endswith("bias") and getattr(config, "bias", "none") != "none":
        return True
    return not site.endswith(_BASE) and any(
        path.endswith(head) or f"{head}." in path for head in getattr(config, "modules_to_save", None) or ()
    )
