"""What the tensors in a model's folder are called in the model, as transformers has it.

Mostly the same. But a folder saved from the bare model lacks the prefix that the model with a head has, a class may
have renamed its layers since, and experts that lie one by one in the files are one parameter in memory.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn.checkpoints import load_with_model
from peftfn.core.adapter import Adapter
from peftfn.models import tied_weights

Tensors = Mapping[str, Tensor]


class Group(NamedTuple):
    """Tensors of the files that become parameters together: the experts of a layer, a fused projection.

    Attributes:
        keys: of the files.
        to_model: the parameters, by name, from the tensors by key.
        to_files: the tensors by key again.
    """

    keys: tuple[str, ...]
    to_model: Callable[[Tensors], dict[str, Tensor]]
    to_files: Callable[[Tensors], dict[str, Tensor]]


class Names(NamedTuple):
    """How the parameters of a model are called in its files.

    Attributes:
        keys: a parameter's key in the files, by its name.
        groups: the group that a parameter comes from, by its name.
        written: what a key becomes where that is something else: with a prefix that the model wants.
        tied: names that share one parameter.
        missing: names of parameters that are not in the files.
        model: the model, if one was needed.
    """

    keys: Mapping[str, str]
    groups: Mapping[str, Group]
    written: Mapping[str, str]
    tied: Sequence[Sequence[str]]
    missing: Sequence[str]
    model: Any


def plain(shapes: Tensors) -> Names:
    """The names of a folder whose keys are the model's own."""
    return Names({key: key for key in shapes}, {}, {}, (), (), None)


def of_model(model: nn.Module, shapes: Tensors) -> Names:
    """The names of a folder that the model's class can load.

    Args:
        model: on any device; only its names are read.
        shapes: tensors on the meta device, by their keys in the files.
    """
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    rename, group = _transforms(model, state)
    keys: dict[str, str] = {}
    written: dict[str, str] = {}
    together: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key in sorted(shapes, key=_natural):
        name, pattern, prefix = rename(key)
        if name not in state:
            continue  # the class does not know it: it is copied as it is
        if pattern is None:
            keys[name] = key
        else:
            together.setdefault((name, group(pattern)), []).append((key, pattern))
        if prefix:
            written[key] = f"{prefix}.{key}"
    groups: dict[str, Group] = {}
    for (name, _), members in together.items():
        made = _group(model, name, members)
        groups.update(dict.fromkeys(made.to_model({key: shapes[key] for key in made.keys}), made))
    tied = tied_weights.names(model)
    found = {*keys, *groups}
    found |= {name for names in tied if found & set(names) for name in names}
    missing = [name for name, _ in model.named_parameters() if name not in found]
    return Names(keys, groups, written, tied, missing, model)


Rename = Callable[[str], tuple[str, str | None, str]]
"""`key -> (name, pattern of the converter that it goes through, prefix that was added)`."""


def _transforms(model: Any, state: Tensors) -> tuple[Rename, Callable[[str], str]]:
    prefix: str = getattr(model, "base_model_prefix", "")
    loading = _loading()
    if loading is None or not prefix:
        return functools.partial(_with_prefix, prefix, state), str
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    every = mapping.get_model_conversion_mapping(model)
    renamings = [one for one in every if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in every if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: str(id(one)) for one in converters for pattern in one.source_patterns}

    def rename(key: str) -> tuple[str, str | None, str]:
        name, pattern = loading.rename_source_key(key, renamings, converters)
        full, _, added = _with_prefix(prefix, state, name)
        if full not in state and key in state:  # a name that only looks like an old one
            return key, None, ""
        return full, pattern, added

    return rename, by_pattern.__getitem__


def _with_prefix(prefix: str, state: Tensors, name: str) -> tuple[str, None, str]:
    if name in state or not prefix:
        return name, None, ""
    bare = name.removeprefix(f"{prefix}.")
    return (bare, None, "") if bare in state else (f"{prefix}.{name}", None, prefix)


def _loading() -> Any:
    try:
        return importlib.import_module("transformers.core_model_loading")
    except ImportError:  # transformers 4, whose models have the names of their files
        return None


def _natural(key: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def _group(model: Any, name: str, members: Iterable[tuple[str, str]]) -> Group:
    """The group of keys that one converter of transformers turns into the parameter of that name (and its like)."""
    loading, members = _loading(), tuple(members)
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    converters = [one for one in mapping.get_model_conversion_mapping(model) if hasattr(one, "operations")]
    converter = next(one for one in converters if members[0][1] in one.source_patterns)
    keys = tuple(key for key, _ in members)

    def to_model(tensors: Tensors) -> dict[str, Tensor]:
        own = copy.deepcopy(converter)
        for key, pattern in members:
            own.add_tensor(name, key, pattern, tensors[key])
        made: dict[str, Any] = own.convert(name, model=model, config=model.config)
        return {one: value[0] if isinstance(value, list) else value for one, value in made.items()}

    def to_files(tensors: Tensors) -> dict[str, Tensor]:
        made = cast("dict[str, Tensor]", loading.revert_weight_conversion(model, dict(tensors)))
        if made.keys() != set(keys):
            raise ValueError(
                f"{name} is made of {keys[0]!r} and others of the files, and transformers would write it as "
                f"{next(iter(made))!r}; load the model and merge in memory: peftfn.bind(model, adapter)"
                ".save_pretrained(folder)."
            )
        return {key: tensor.contiguous() for key, tensor in made.items()}

    return Group(keys, to_model, to_files)


def model_of(folder: str, adapters: Sequence[Adapter]) -> Any:
    """The model that the adapters are for, on the meta device, from the folder's config: no weight is read.

    Raises:
        ValueError: nothing says which class it is.
    """
    import transformers

    own = adapters[0].config
    loaded: Any = transformers.AutoConfig
    config: Any = loaded.from_pretrained(folder)
    labels = {
        leaf["weight"].shape[0]
        for one in adapters
        for path, leaf in one.params.items()
        if "weight" in leaf and load_with_model.LABELS.search(f".{path}.weight")
    }
    if own.task_type in ("SEQ_CLS", "TOKEN_CLS") and len(labels) == 1 and (count := labels.pop()) != config.num_labels:
        config.num_labels = count
    named: list[Any] = [
        load_with_model.CLASSES.get(own.task_type or ""),
        (own.auto_mapping or {}).get("base_model_class"),
        *(config.architectures or ()),
    ]
    found = (getattr(transformers, name, None) for name in named if name)
    loader: Any = next((one for one in found if one is not None and _is_for(one, config)), None)
    if loader is None:
        raise ValueError(
            f"{folder}: neither the adapter's config (task_type, auto_mapping) nor config.json (architectures) names a "
            "class of transformers; pass model=..., the base on the meta device."
        )
    with torch.device("meta"):
        model: nn.Module = loader.from_config(config) if hasattr(loader, "from_config") else loader(config)
    return model


def _is_for(loader: Any, config: Any) -> bool:
    """Whether a class of transformers makes models of this config; an Auto class finds out itself."""
    own = getattr(loader, "config_class", None)
    return own is None or isinstance(config, own)
