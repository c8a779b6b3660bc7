"""Whether an adapter fits a model: its tensors against the layers that they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import UNKNOWN, Adapter, is_shared, leaf_of, site_paths
from peftfn.core.config import PeftConfig
from peftfn.core.config_values import patterns_of
from peftfn.core.transforms import is_traced
from peftfn.methods import Method, companions
from peftfn.models import layers, matching, targets
from peftfn.models.layers import Site
from peftfn.weights import codecs


def refuse_leaf(method: Method, config: Any, leaf: Mapping[str, Tensor], site: Site) -> None:
    """A `ValueError` if one adapter's tensors do not fit the site."""
    wrong = method.check(config, leaf, site)
    if wrong:
        name = site.path or type(site.layer).__name__
        raise ValueError(f"{name}: the adapter {wrong}. It was made for a model of another size.")


def no_such_site(model: nn.Module, path: str, known: Iterable[str]) -> KeyError:
    """The error about a site that the model does not have, with paths that end alike."""
    last = path.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last][:3]
    hint = f"; paths that end in {last!r} here: {', '.join(near)}" if near else ""
    return KeyError(
        f"the adapter has a site {path!r}, which {type(model).__name__} does not have{hint}. It was made for another "
        "architecture, or for this one inside a wrapper."
    )


def refuse_replacement(layer: nn.Module, path: str, name: str, shape: torch.Size, fixed: bool) -> None:
    """A `KeyError` or `ValueError` if a tensor cannot take the place of one of the layer's.

    Args:
        layer: the module at `path`.
        path: where it is.
        name: the tensor's name there.
        shape: what the adapter has for it.
        fixed: whether it is not trained: then it may have any number of rows (an embedding saved along).
    """
    full, old = f"{path}.{name}", _shape(layer, name)
    if old is None:
        raise KeyError(f"the adapter replaces {full}, which this {type(layer).__name__} does not have.")
    if shape == old or (fixed and shape[1:] == old[1:]):
        return
    raise ValueError(
        f"{full}: the adapter has shape {tuple(shape)}, the model {tuple(old)}; build the model as it was when "
        "the adapter was made (num_labels, vocabulary size)."
    )


def _shape(layer: nn.Module, name: str) -> torch.Size | None:
    codec = codecs.of(layer)  # a packed weight has another shape, and perhaps no tensor of that name
    if name == "weight" and codec is not codecs.DENSE:
        return codec.shape(layer, name)
    home: dict[str, Any] = layer._parameters if name in layer._parameters else layer._buffers
    return getattr(codecs.bias(layer) if name == "bias" else home.get(name), "shape", None)


def against(adapter: Adapter, model: nn.Module, source: str) -> None:
    """Hold an adapter against the model it is for.

    Raises:
        KeyError: it has sites that the model has not, or lacks sites that its config names in the model.
        ValueError: a shape does not fit.
    """
    for piece in companions.pieces(adapter) if methods.companion_configs(adapter.config) else (adapter,):
        _against(piece, model, source)


def _against(adapter: Adapter, model: nn.Module, source: str) -> None:
    method = methods.of(adapter.config)
    try:
        places = method.targets.sites(model, _without_patterns(adapter.config))
        replaced = _replaced(model, adapter.config, places)
    except ValueError as error:
        raise ValueError(f"{source} does not fit this {type(model).__name__}: {error}") from error
    adapted = [one for one in site_paths(adapter) if not all(map(method.replaces, adapter.params.get(one, ())))]
    missing = [path for path, place in places.items() if path not in adapted and place.kind != layers.MODULE]
    missing += [path for path, names in replaced.items() if names - adapter.params.get(path, {}).keys()]
    unexpected = [path for path in adapted if path not in places]
    others = [path for path in adapter.params if path not in adapted and not is_shared(path)]
    unexpected += [path for path in others if layers.module_at(model, path) is None]
    if missing or unexpected:
        raise KeyError(
            f"{source} does not fit this {type(model).__name__}: missing sites {_few(missing)}, unexpected sites "
            f"{_few(unexpected)}. It was made for another architecture, or its config was changed."
        )
    for path in adapted:
        place, info = places[path], adapter.sites.get(path, UNKNOWN)
        leaf = {name: one for name, one in leaf_of(adapter, path).items() if not method.replaces(name)}
        refuse_leaf(method, adapter.config, leaf, layers.site_of(model.get_submodule(place.owner), place, path, info))
    for tree in (adapter.params, adapter.buffers):
        for path, name in [(path, name) for path, leaf in tree.items() for name in filter(method.replaces, leaf)]:
            module = layers.module_at(model, path)
            if module is None:
                raise no_such_site(model, path, (name for name, _ in layers.named_modules(model)))
            refuse_replacement(module, path, name, tree[path][name].shape, tree is adapter.buffers)


def _without_patterns(config: PeftConfig) -> PeftConfig:
    """The config without patterns: one that matches nothing is an error where it is written, not where it is read."""
    return dataclasses.replace(config, **dict[str, Any].fromkeys(patterns_of(config)))


def _replaced(model: nn.Module, config: Any, places: Mapping[str, layers.Place]) -> dict[str, set[str]]:
    """The parameters that the config trains beside the method's own (heads, biases), by module path."""
    heads = targets.saved_modules(
        model, getattr(config, "modules_to_save", None) or (), optional=matching.HEADS.get(config.task_type, ())
    )
    whole = {path: model.get_submodule(path) for path, place in places.items() if place.kind == layers.MODULE}
    found = {path: codecs.replaceable(part) for path, part in {**whole, **heads}.items()}
    for path in targets.biased(model, config, places):
        in_attention = isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention)
        # PEFT 0.17 leaves the bias of an attention's out_proj out of its files.
        if codecs.bias(model.get_submodule(path)) is not None and not in_attention:
            found.setdefault(path, set()).add("bias")
    return found


def _few(paths: Sequence[str], most: int = 4) -> str:
    return f"{len(paths)} ({', '.join(paths[:most])}{', ...' if len(paths) > most else ''})" if paths else "none"


def refuse_other_than_mapping(params: Any) -> None:
    """A `TypeError` if what is to be merged into is no mapping of tensors by name: a module, as a rule."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"merge was given a {type(params).__name__} in place of the base's parameters; expected a mapping by name: "
            "peftfn.merge(dict(model.named_parameters()), adapter). It returns such a mapping, with which "
            "torch.func.functional_call(model, merged, batch) runs; peftfn.merge_folder writes a model's files."
        )


def refuse_not_finite(adapter: Adapter) -> None:
    """A `ValueError` if a tensor of the adapter holds NaN or infinity."""
    for path, leaf in adapter.params.items():
        for name, tensor in leaf.items():
            if not tensor.is_floating_point() or tensor.is_meta or is_traced(tensor):
                continue
            if not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise ValueError(
                    f"{path}.{name} has {count} of {tensor.numel()} values that are NaN or infinite; merging would "
                    "spoil the weights. Was the training step stable?"
                )
