"""The values of a config's fields: plain data that cannot change, checked against the fields' names and types."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, cast

# Left out of files while they have their default: versions of PEFT without such a field warn of it, or refuse the file.
LATER = frozenset(
    (
        *("alora_invocation_tokens", "exclude_modules", "init_weights", "kasa_config", "layer_replication"),
        *("peft_version", "qalora_group_size", "target_parameters", "tokenizer_kwargs", "trainable_token_indices"),
        *("use_bdlora", "use_qalora", "velora_config"),
    )
)


def _refuse_change(*_: Any, **__: Any) -> Any:
    raise TypeError("this dictionary is a part of a frozen value; make a changed one of dict(it).")


class FrozenDict(dict[str, Any]):
    """A dictionary that cannot change and can be hashed: a config is static for every transform."""

    __slots__ = ()

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = cast("Any", _refuse_change)

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # a dict has none
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)  # pickle and copy would set its items one by one

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)


def freeze(value: Any) -> Any:
    """The value with lists as tuples, sets as sorted tuples and dicts as `FrozenDict`, all the way down."""
    if isinstance(value, (set, frozenset)):
        value = sorted(cast("set[Any]", value))
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in cast("list[Any]", value))
    if isinstance(value, Mapping):
        return FrozenDict({str(key): freeze(item) for key, item in cast("Mapping[Any, Any]", value).items()})
    return value


def thaw(value: Any) -> Any:
    """The value with tuples as lists and mappings as dicts, as JSON has them."""
    if isinstance(value, (list, tuple)):
        return [thaw(item) for item in cast("list[Any]", value)]
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in cast("Mapping[str, Any]", value).items()}
    return value


# --- what a config refuses --------------------------------------------------------------------------------------------


def refuse_unknown(cls: type[Any], given: Mapping[str, Any]) -> None:
    """Refuse names that are no fields of the class, and fields of PEFT's that it cannot honour."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in given:
        if name in known:
            continue
        if any(name in vars(one).get("inactive", {}) for one in cls.__mro__):
            raise ValueError(
                f"{cls.__name__}({name}={given[name]!r}): peft has this field, peftfn does not support it yet. Leave "
                "it out, or keep training this adapter with peft."
            )
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TypeError(f"{cls.__name__} has no field {name!r}.{hint} Its fields: {', '.join(known)}.")


def check_types(config: Any) -> None:
    """Refuse a value that is not of its field's annotated type."""
    hints = _hints(cast("type[Any]", type(config)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            finite = ", and finite numbers" if "float" in str(field.type) else ""
            raise TypeError(f"{type(config).__name__}({field.name}={thaw(value)!r}): expected {field.type}{finite}.")


def patterns_of(config: Any) -> dict[str, Mapping[str, Any]]:
    """The fields of a config that say something of some sites, by name or regex: `rank_pattern` and its like."""
    named = [field.name for field in dataclasses.fields(config) if field.name.endswith("_pattern")]
    found: dict[str, Any] = {name: getattr(config, name) for name in named}
    return {name: value for name, value in found.items() if isinstance(value, Mapping)}


def check_patterns(config: Any) -> None:
    """Refuse a pattern that `re` cannot compile, where it is written and not where it is first matched."""
    alone = ("target_modules", "exclude_modules", "feedforward_modules")  # a list there holds names
    inside = ("layers_pattern", "modules_to_save", *patterns_of(config))  # PEFT's matching puts more around it
    for field in (*alone, *inside):
        value: Any = getattr(config, field, None)
        is_several = isinstance(value, Mapping) or (field in inside and isinstance(value, tuple))
        several = cast("list[str]", [*value] if is_several else [])
        patterns = [value] if isinstance(value, str) else several
        for pattern in patterns:
            try:
                re.compile(rf"(.*\.)?({pattern})$" if field in inside else pattern)
            except re.error as error:
                raise ValueError(
                    f"{type(config).__name__}({field}={thaw(value)!r}): {pattern!r} is no regex ({error}). "
                    "Write '.*' for anything, or give a list of names."
                ) from error


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a frozen value is of an annotated type: of those that configs have, and so JSON."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if kind is Sequence:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in cast("tuple[Any, ...]", value))
    if kind is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(item, inner[1]) for item in cast("Mapping[Any, Any]", value).values()
        )
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if hint is float or hint is int:
        largest = sys.float_info.max if hint is float else sys.maxsize
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and abs(value) <= largest
    return hint is Any or isinstance(value, hint)
