"""Which modules and parameters a config names, by PEFT's rules."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from peftfn.core.config import TargetedConfig
from peftfn.models import expert_targets, fused_projections, layers, matching, renamed_modules

ALL_LINEAR = "all-linear"
Config = TypeVar("Config", bound=TargetedConfig)


def model_type(model: nn.Module) -> str | None:
    """`config.model_type` of a transformers-like model."""
    config = getattr(model, "config", None)
    read = cast("dict[str, Any]", config).get if isinstance(config, dict) else functools.partial(getattr, config)
    found: object = read("model_type", None)
    return found if isinstance(found, str) else None


def check_task(model: nn.Module, task_type: str | None) -> None:
    """Refuse a task for an encoder-decoder where transformers' config says that the model is none."""
    is_one = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    if task_type == "SEQ_2_SEQ_LM" and is_one is False:
        raise ValueError(
            f"task_type='SEQ_2_SEQ_LM' is for an encoder-decoder, and {type(model).__name__} is none; expected "
            "'CAUSAL_LM' for a decoder."
        )


def default_targets(model: nn.Module, table: Mapping[str, Sequence[str] | str]) -> Sequence[str] | str:
    """The target modules that PEFT takes for this model type, or a `ValueError` that says to name them."""
    kind = model_type(model)
    found = table.get(kind or "")
    if found is None:
        what = f"model type {kind!r}" if kind else f"a {type(model).__name__}"
        raise ValueError(
            f"target_modules is not given and there is no default for {what}; pass target_modules=[...] "
            f"(linear layers here: {_examples(_linear_names(model)) or 'none'}) or 'all-linear'."
        )
    return found


def resolved(model: nn.Module, config: Config, table: Mapping[str, Sequence[str] | str]) -> Config:
    """The config with what the model decides filled in: target modules, heads, names that transformers changed."""
    config = expert_targets.present(
        model, config, model_type(model), functools.partial(all_linear, model, config.task_type)
    )
    names = config.target_modules
    if names is None and (not parameters_of(config) or model_type(model) in table):
        names = in_present_names(model, default_targets(model, table))
    elif isinstance(names, str) and names.lower() == ALL_LINEAR:
        names = all_linear(model, config.task_type)
    else:
        names = in_present_names(model, names)
        refuse_lost_names(model, names)
    changes: dict[str, Any] = {
        "target_modules": names,
        "exclude_modules": in_present_names(model, config.exclude_modules),
        "modules_to_save": matching.with_heads(config),
    }
    if parameters_of(config):
        changes["target_parameters"] = in_model_order(model, parameters_of(config))
    return dataclasses.replace(config, **changes)


def without_exclusions(model: nn.Module, config: Config) -> Config:
    """The config with its targets as a regex of all paths, if it excludes some, for PEFT's that has no such field."""
    if not config.exclude_modules:
        return config
    named = "|".join(map(re.escape, sites(model, config)))
    layers_too: dict[str, Any] = {
        field: None for field in ("layers_to_transform", "layers_pattern") if hasattr(config, field)
    }
    return dataclasses.replace(config, target_modules=named, exclude_modules=None, **layers_too)


def parameters_of(config: TargetedConfig) -> Sequence[str]:
    """The names of bare parameters in a config, none for a method that has no such field."""
    return cast("Sequence[str]", getattr(config, "target_parameters", None) or ())


def all_linear(model: nn.Module, task_type: str | None) -> tuple[str, ...]:
    """Every linear layer's path, without the output embedding or, for `SEQ_CLS`, the classification head."""
    spared = _output_layer(model, task_type)
    return tuple(path for path in _linear_names(model) if model.get_submodule(path) is not spared)


def sites(
    model: nn.Module,
    config: TargetedConfig,
    places: Callable[[nn.Module, str], Mapping[str, layers.Place]] = layers.places,
    expected: str = "a linear, embedding, convolution or attention layer",
) -> dict[str, layers.Place]:
    """Every site that the config names in the model, by site path, in the model's order.

    Args:
        model: the base.
        config: names modules and parameters.
        places: `(model, path) -> the sites that the module there stands for`; none where no method can act.
        expected: what it takes, for messages.

    Raises:
        ValueError: nothing matched (the message offers near names), or a named module is of a kind that no
            method can act on.
    """
    paths = [path for path, _ in layers.named_modules(model) if path]
    named = [path for path in paths if matching.is_target(config, path)]
    found: dict[str, layers.Place] = {}
    for path in named:
        at = places(model, path)
        if not at:
            kind = type(model.get_submodule(path)).__name__
            if type(model.get_submodule(path)).__module__.startswith("peft."):
                raise ValueError(
                    f"{path!r} is a layer of peft's, put around the base's own ({kind}): the model has an adapter of "
                    "peft's in it already. Pass the base without it: peft_model.unload(), or load the base again."
                )
            raise ValueError(
                f"target_modules={_shown(config.target_modules)} names {path!r}, a {kind}; expected "
                f"{expected}. Name a more specific path, or "
                f"exclude_modules=[{path!r}]."
            )
        found.update(at)
    if matching.may_name_parts(config.target_modules):
        found = {**fused_projections.places(model, lambda path: matching.names_part(config, path)), **found}
    matching.refuse_lost_layers(config, paths)
    for name in _parameters(model, parameters_of(config)):
        found[name] = layers.place_of_parameter(model, name)
    _refuse_unmatched(model, config, paths, found)
    return found


def biased(model: nn.Module, config: Any, places: Mapping[str, layers.Place]) -> list[str]:
    """The modules whose biases the config trains: all, or (`lora_only` and its like) those that its sites are of."""
    bias: str = getattr(config, "bias", "none")
    if bias == "all":
        return [path for path, _ in layers.named_modules(model)]
    return [place.owner for place in places.values()] if bias.endswith("_only") else []


def saved_modules(model: nn.Module, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names (a path that ends with the name), by path, with what is in them."""
    found: dict[str, nn.Module] = {}
    missed = set(names) - set(optional)
    for path, module in layers.named_modules(model):
        hits = {name for name in names if path.endswith(name)}
        missed -= hits
        if hits:
            found |= {f"{path}.{inner}" if inner else path: part for inner, part in layers.named_modules(module)}
    if missed:
        near = _near(missed, (path for path, _ in layers.named_modules(model)))
        raise ValueError(f"modules_to_save names {sorted(missed)}, which match no module{near}.")
    return found


def in_model_order(model: nn.Module, names: Sequence[str] | None) -> Sequence[str] | None:
    """`target_parameters` in the order in which the model has them, which PEFT's file keys depend on."""
    if names is None:
        return None
    every = [name for name, _ in model.named_parameters()]
    first = {
        name: next((i for i, one in enumerate(every) if matching.ends_with(one, [name])), len(every)) for name in names
    }
    return sorted(names, key=lambda name: first[name])


def refuse_unused_patterns(field: str, patterns: Mapping[str, Any] | None, paths: Iterable[str]) -> None:
    """A `ValueError` if a pattern of `rank_pattern` or `alpha_pattern` matches no site."""
    paths = list(paths)
    for pattern in patterns or {}:
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            raise ValueError(
                f"{field} has {pattern!r}, which matches none of the {len(paths)} sites{_near([pattern], paths)}."
            )


def _parameters(model: nn.Module, names: Sequence[str]) -> list[str]:
    every = [name for name, _ in model.named_parameters()]
    for name in names:
        if not any(matching.ends_with(one, [name]) for one in every):
            raise ValueError(f"target_parameters names {name!r}, which matches no parameter{_near([name], every)}.")
    return [one for one in every if matching.ends_with(one, names)]


def _refuse_unmatched(model: nn.Module, config: TargetedConfig, paths: list[str], found: Mapping[str, object]) -> None:
    names = config.target_modules
    shown = f"target_modules={_shown(names)}"
    if not found:
        if any(matching.is_named(config, path) for path in paths):
            raise ValueError(f"{shown} matched only modules that exclude_modules or modules_to_save takes away.")
        limits = "".join(
            f", {field}={_shown(value)}"
            for field in ("layers_to_transform", "layers_pattern")
            if (value := getattr(config, field, None)) is not None
        )
        wanted = [names] if isinstance(names, str) else list(names or ())
        if limits and names and any(matching.ends_with(path, wanted) for path in paths):
            raise ValueError(
                f"{shown}{limits} matched no module of {type(model).__name__}: modules of these names are there, and "
                "none in such a layer. The number of a layer is looked for after two names (model.layers.0), so in a "
                "model that is itself the list's parent say layers_pattern=['layers'], or name whole paths."
            )
        raise ValueError(f"{shown}{limits} matched no module of {type(model).__name__}{_near(wanted, paths)}.")


def in_present_names(model: nn.Module, names: Sequence[str] | str | None) -> Sequence[str] | str | None:
    """The names, with old names of transformers replaced by what it calls these modules now."""
    paths = [path for path, _ in layers.named_modules(model) if path]
    if not names or (isinstance(names, str) and any(re.fullmatch(names, path) for path in paths)):
        return names
    lost = [names] if isinstance(names, str) else _lost(names, paths)
    old = renamed_modules.old_paths(model) if lost else {}
    present: list[str] = []
    for name in lost if isinstance(names, str) else names:
        hits = {path for path, before in old.items() if _is_called(name, before, names)} if name in lost else set[str]()
        others = [path for path in paths if path not in hits]
        present += dict.fromkeys(_short(path, others) for path in sorted(hits)) if hits else [name]
    return names if isinstance(names, str) and present == [names] else tuple(present)


def _is_called(name: str, path: str, names: Sequence[str] | str) -> bool:
    return re.fullmatch(name, path) is not None if isinstance(names, str) else matching.ends_with(path, [name])


def _short(path: str, others: Sequence[str]) -> str:
    """The shortest ending of a path that none of the others has."""
    parts = path.split(".")
    endings = (".".join(parts[-count:]) for count in range(1, len(parts)))
    return next(
        (ending for ending in endings if not any(matching.ends_with(other, [ending]) for other in others)), path
    )


def _lost(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    return [name for name in names if not any(matching.ends_with(path, [name]) for path in paths)]


def refuse_lost_names(model: nn.Module, names: Sequence[str] | str | None) -> None:
    """A `ValueError` if a name of a list that the user gave matches no module (PEFT ignores it in silence)."""
    paths = [path for path, _ in layers.named_modules(model) if path]
    fused_too = (
        [f"{path}.{part}" for path in paths for part in fused_projections.parts(model, path)]
        if matching.may_name_parts(names)
        else []
    )
    lost = _lost(names, [*paths, *fused_too]) if names and not isinstance(names, str) else []
    if lost:
        raise ValueError(
            f"target_modules={_shown(names)}: {lost} matched no module of {type(model).__name__}{_near(lost, paths)}."
        )


def _near(wanted: Iterable[str], paths: Iterable[str]) -> str:
    # Names are compared as they are written, and by their last part, which is what people misspell.
    paths = [path for path in paths if path]
    endings = sorted({path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()})
    near: list[str] = []
    for name in wanted:
        last = re.sub(r"[^\w.\-]", "", name).rpartition(".")[2]
        near += difflib.get_close_matches(last, endings, n=3, cutoff=0.6)
    if near:
        counts = (f"{one!r} ({sum(matching.ends_with(path, [one]) for path in paths)})" for one in dict.fromkeys(near))
        return f"; names that end in these exist: {', '.join(counts)}"
    return f"; its names end in: {_examples(endings)}" if endings else ""


def _examples(names: Sequence[str], most: int = 12) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(endings[:most]) + (", ..." if len(endings) > most else "")


def _shown(value: Any) -> str:
    return repr(list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value)


def _linear_names(model: nn.Module) -> list[str]:
    kinds = (layers.LINEAR, layers.TRANSPOSED)
    return [path for path, module in layers.named_modules(model) if path and layers.kind_of(module) in kinds]


def _output_layer(model: nn.Module, task_type: str | None) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    if found is None and callable(get) and task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in matching.HEADS["SEQ_CLS"])
        found = next((head for head in heads if head is not None), None)
    return cast("nn.Module | None", found)
