"""Whether a config names a path: PEFT's matching rules, on names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from peftfn.core.config import PeftConfig, TargetedConfig

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that PEFT's task wrappers add to `modules_to_save`."""

PARTS = frozenset(("q", "k", "v", "gate", "up"))
"""Names of the parts of fused projections (`peftfn.models.fused_projections`)."""


def with_heads(config: PeftConfig) -> tuple[str, ...] | None:
    """`modules_to_save` with the heads that the task type adds."""
    given = tuple(cast("Sequence[str]", getattr(config, "modules_to_save", None) or ()))
    names = (*given, *(head for head in HEADS.get(config.task_type or "", ()) if head not in given))
    return names or None


def is_target(config: TargetedConfig, path: str) -> bool:
    """Whether a module path is named by `target_modules` and not excluded."""
    return not is_excluded(config, path) and is_named(config, path)


def is_excluded(config: TargetedConfig, path: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` takes a path away from `target_modules`."""
    exclude = config.exclude_modules
    if exclude and (re.fullmatch(exclude, path) if isinstance(exclude, str) else ends_with(path, exclude)):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ())


def ends_with(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names or ends with `.name`."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def is_named(config: TargetedConfig, path: str) -> bool:
    """Whether `target_modules` names a path, in the layers that the config is limited to."""
    names = config.target_modules
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    if path in names:
        return True  # as in PEFT, a full path is taken whatever layers_to_transform says
    return ends_with(path, names) and in_layers(config, path)


def in_layers(config: TargetedConfig, path: str) -> bool:
    """Whether a path lies in one of `layers_to_transform`."""
    wanted: Sequence[int] | int | None = getattr(config, "layers_to_transform", None)
    if wanted is None or (not isinstance(wanted, int) and len(wanted) == 0):
        return True
    index = layer_of(config, path)
    return index is not None and (index == wanted if isinstance(wanted, int) else index in wanted)


def layer_of(config: TargetedConfig, path: str) -> int | None:
    """The number of the layer that a path lies in, by `layers_pattern`; `None` where it lies in none."""
    patterns: Sequence[str] | str | None = getattr(config, "layers_pattern", None)
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
    else:
        named = [patterns] if isinstance(patterns, str) else patterns
        tries = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path) for pattern in named)
        found = next((match for match in tries if match), None)
    return None if found is None else int(found["index"])


def refuse_lost_layers(config: TargetedConfig, paths: Sequence[str]) -> None:
    """A `ValueError` if `layers_to_transform` names a layer that none of the targets is in (PEFT ignores it)."""
    wanted: Sequence[int] | int | None = getattr(config, "layers_to_transform", None)
    names = config.target_modules
    if wanted is None or names is None or isinstance(names, str):
        return
    there = {layer_of(config, path) for path in paths if ends_with(path, names)}
    numbers = sorted(one for one in there if one is not None)
    lost = [one for one in ([wanted] if isinstance(wanted, int) else wanted) if one not in there]
    if lost and numbers:
        raise ValueError(
            f"layers_to_transform={wanted}: {lost} are not there; target_modules={list(names)} are in the layers "
            f"{numbers[0]} to {numbers[-1]}."
        )


def may_name_parts(names: Sequence[str] | str | None) -> bool:
    """Whether some of the names look like a part of a fused projection, `layer.q`."""
    given = [names] if isinstance(names, str) else names or ()
    return isinstance(names, str) or any(name.rpartition(".")[2] in PARTS and "." in name for name in given)


def names_part(config: TargetedConfig, path: str) -> bool:
    """Whether `layer.part` is named; in a list a bare `q` is a module's name, as T5 has it, and never a part's."""
    names = config.target_modules
    if names is None or is_excluded(config, path):
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return ends_with(path, [name for name in names if "." in name]) and in_layers(config, path)


def rank(config: Any, path: str) -> int:
    """The rank of a site, by the config's `r` and `rank_pattern`."""
    return pattern_value(config.rank_pattern, path, config.r)


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    r"""The value of the first pattern that matches the path (`(.*\.)?pattern$`, as in PEFT), or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
