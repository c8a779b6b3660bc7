"""What a cache's calls have seen of invocations, kept with the cache by row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peftfn.models import transformers_caches as caches

_KEPT = "_peftfn_invoked"

Invocations = tuple[Sequence[int] | None, ...]
"""Of an adapter, or of each adapter of a stack, the tokens from which on it acts; `None` is all."""


class Seen(NamedTuple):
    """What a cache's calls have seen: (invocations, rows) whether a row was invoked, and its last tokens."""

    is_invoked: Tensor
    tail: Tensor


def kept_with(cache: Any) -> dict[Invocations, Seen]:
    """What was kept with a cache; nothing, where the base filled it, or it is empty."""
    if caches.is_empty(cache):
        return {}
    if isinstance(cache, (tuple, list)):
        raise TypeError(
            "the call has a cache that is a tuple, which cannot say in which rows the adapter was invoked; expected "
            "one of transformers' caches, such as a DynamicCache."
        )
    return dict(getattr(cache, _KEPT, {}))


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or `None`."""
    values: Any = output.values() if hasattr(output, "values") else output
    return next((one for one in values if caches.is_cache(one)), None) if isinstance(output, (tuple, dict)) else None


def keep(cache: Any, seen: dict[Invocations, Seen]) -> None:
    """Keep with a cache what its rows have seen, and let it go along when the rows change places."""
    if cache is None or isinstance(cache, (tuple, list)):
        return
    if _KEPT not in cache.__dict__ and not torch.compiler.is_compiling():
        # Another class, and no functions on the object, which would lead back to it: caches are large, and go at once.
        cache.__class__ = _remembering(cast("type[Any]", type(cache)))
    setattr(cache, _KEPT, seen)


@functools.cache
def _remembering(cls: type[Any]) -> type[Any]:
    """The class of a cache, with methods that move rows of what is kept too."""
    names = [
        name for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave") if hasattr(cls, name)
    ]
    own: dict[str, Any] = {name: functools.partialmethod(_moved, cls, name) for name in names}
    own |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    own["__reduce__"] = functools.partialmethod(_reduced, cls)  # copy and pickle find a class by its name
    return type(cls.__name__, (cls,), own)


def _reduced(cache: Any, cls: type[Any]) -> tuple[Any, ...]:
    return _blank, (cls,), dict(cache.__dict__)


def _blank(cls: type[Any]) -> Any:
    return object.__new__(_remembering(cls))


def _moved(cache: Any, cls: type[Any], name: str, rows: Any) -> Any:
    """What the method of a cache's class does, and the same to what is kept."""

    def moved(tensor: Tensor, axis: int) -> Tensor:
        if name == "batch_repeat_interleave":
            return tensor.repeat_interleave(rows, axis)
        return tensor.index_select(axis, torch.as_tensor(rows).to(tensor.device))

    kept = cast("dict[Invocations, Seen]", getattr(cache, _KEPT))
    setattr(cache, _KEPT, {key: Seen(moved(one.is_invoked, 1), moved(one.tail, 0)) for key, one in kept.items()})
    return getattr(cls, name)(cache, rows)
