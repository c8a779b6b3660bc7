"""Names of experts and routers as transformers 4 had them, which are bare parameters in transformers 5.

`w1` or `gate_proj` was a linear layer for each expert; now an `experts` module holds `gate_up_proj` and `down_proj` of
all of them, and the router is a module with a `weight`. PEFT turns the old names into `target_parameters`, with twice
the rank for what was fused out of two, and lets "all-linear" have them too.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import nn

from peftfn.core.config import TargetedConfig

Config = TypeVar("Config", bound=TargetedConfig)

_FUSED = "gate_up_proj"
_NOW: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": _FUSED, "w3": _FUSED, "w2": "down_proj"},
    "qwen2_moe": {"gate": "gate.weight", "gate_proj": _FUSED, "up_proj": _FUSED, "down_proj": "down_proj"},
}
"""An architecture's names in transformers 4 -> the parameters that have these weights now."""


def present(model: nn.Module, config: Config, kind: str | None, linear: Callable[[], Sequence[str]]) -> Config:
    """The config with experts and routers among `target_parameters`, where it means them by an old name.

    Args:
        model: the base.
        config: names modules. A regex stays as it is.
        kind: the model's type.
        linear: gives the paths that "all-linear" stands for.

    Raises:
        ValueError: it names one half of what is one parameter now.
    """
    now, names = _names(kind), config.target_modules
    if not hasattr(config, "target_parameters") or not now or names is None:
        return config
    if isinstance(names, str):
        if names.lower() != "all-linear":
            return config
        names = tuple(dict.fromkeys([*(path.rpartition(".")[2] for path in linear()), *now]))
    old = {name: name.rpartition(".")[2] for name in names if name.rpartition(".")[2] in now}
    every = [name for name, _ in model.named_parameters()]
    if not old or not all(any(one.endswith(f".{now[last]}") for one in every) for last in old.values()):
        return config
    parts = {last for last in old.values() if now[last] == _FUSED}
    whole = {last for last in now if now[last] == _FUSED}
    if parts and parts != whole:
        raise ValueError(
            f"target_modules={list(names)} names {', '.join(sorted(parts))}, which is one parameter, {_FUSED}, with "
            f"{', '.join(sorted(whole - parts))} in this version of transformers; name both, or "
            f"target_parameters=['{_FUSED}']."
        )
    given = cast("Any", config)
    changes: dict[str, Any] = {
        "target_modules": tuple(name for name in names if name not in old),
        "target_parameters": tuple(sorted({*(given.target_parameters or ()), *(now[last] for last in old.values())})),
    }
    if parts:  # as many for each of the two as before, with the same scaling
        pattern = rf".*\.{_FUSED}"
        changes["rank_pattern"] = {**(given.rank_pattern or {}), pattern: given.r * len(whole)}
        changes["alpha_pattern"] = {**(given.alpha_pattern or {}), pattern: given.lora_alpha * len(whole)}
    return dataclasses.replace(config, **changes)


def _names(kind: str | None) -> Mapping[str, str]:
    """The old names of an architecture; none where transformers keeps its experts as layers."""
    try:
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
    except ImportError:
        return {}
    patterns: Mapping[str, str] = {**getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return _NOW.get(patterns.get(kind or "", ""), {})
