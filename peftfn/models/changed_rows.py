"""A batch in which some rows have other values, of the same kind: to see what in a model depends on which row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

_KEPT = ("mask", "position", "type", "label", "thw", "size", "cache", "length", "index", "bbox")
"""What is in the names of arguments that say where something is, and not what."""

_NAMES = ("token_id", "token_index", "start_token", "eos", "bos", "pad")
"""What is in the names of a config's fields for tokens that mean something to the model itself."""


def tensors(keywords: Mapping[str, Any], arguments: Iterable[Any] = ()) -> list[Tensor]:
    """The tensors among a call's arguments."""
    return [one for one in (*arguments, *keywords.values()) if isinstance(one, Tensor)]


def half_of(rows: int) -> Tensor:
    """(rows,): some rows, not the first and the last one, in no regular order."""
    which = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < 0.5
    which[0], which[-1] = False, True
    return which


def special_tokens(config: Any) -> frozenset[int]:
    """The tokens that a config names: ends, padding, the places of pictures."""
    given: Any = config.to_dict() if hasattr(config, "to_dict") else {}
    found: set[int] = set()
    left = [given]
    while left:
        for name, value in left.pop().items():
            if isinstance(value, dict):
                left.append(cast("dict[Any, Any]", value))
            elif any(part in str(name) for part in _NAMES):
                many: list[Any] = list(cast("Any", value)) if isinstance(value, (list, tuple)) else [value]
                found |= {one for one in many if type(one) is int}
    return frozenset(found)


def changed(name: str | None, value: Any, which: Tensor, axis: int, step: int, special: frozenset[int]) -> Any:
    """An argument with other values in some rows; as it is where it has no rows, or says where something is.

    Args:
        name: its name, if it has one.
        value: the argument.
        which: (rows,), the rows to change.
        axis: where rows are; a tensor that has them on its first axis alone has them there.
        step: another number gives other values.
        special: tokens that stay.
    """
    if not isinstance(value, Tensor) or value.dtype == torch.bool or any(part in (name or "") for part in _KEPT):
        return value
    rows = which.shape[0]
    here = next((one for one in dict.fromkeys((axis, 0, 1)) if value.shape[one : one + 1] == (rows,)), None)
    if here is None or not value.numel():
        return value
    other = _other_numbers(value, step) if value.is_floating_point() else _other_tokens(value, step, special)
    mask = which.to(value.device).view(*(-1 if one == here else 1 for one in range(value.dim())))
    return torch.where(mask, other, value)


def _other_numbers(value: Tensor, step: int) -> Tensor:
    drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(step)).to(value)
    wide = value.detach().float()
    return (value.detach() * 0.5 + drawn * wide.square().mean().sqrt().clamp(min=0.1)).to(value.dtype)


def _other_tokens(value: Tensor, step: int, special: frozenset[int]) -> Tensor:
    """Other numbers up to the largest of the tensor, or one above it where that leaves no choice."""
    most = max(int(value.max()), 0)
    free = [one for one in range(most + 1) if one not in special]
    if len(free) < 2:
        free = [*free, most + 1]
    table = torch.arange(most + 2)
    table[free] = torch.tensor(free).roll(-step)
    kept = (value < 0) | (value > most)
    return torch.where(kept, value, table.to(value.device)[value.long().clamp(0, most)].to(value.dtype))
