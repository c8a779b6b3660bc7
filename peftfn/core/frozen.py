"""Values that cannot change, of which a static part of a pytree is made, and plain JSON data of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


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
