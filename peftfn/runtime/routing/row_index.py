"""Which adapter of a stack each row of a batch uses, or each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from peftfn.core.adapter import Adapter
from peftfn.core.transforms import is_traced
from peftfn.core.unlike_rows import UnlikeRowsError
from peftfn.ops import stacking
from peftfn.runtime.routing import segments

MODEL = "the model"
"""What the call of the model itself is called in place of a path."""


class Rows(NamedTuple):
    """Which adapter of a stack each row of the batch uses. Of an index for each token, the tokens are the rows.

    Attributes:
        numbers: (rows,), from 0; where `keep` is false the number is not used.
        keep: (rows,), false where a row uses the bare base; `None` where it is known that none does.
        in_order: whether it is known that row n uses adapter n, and every adapter has its row: then nothing is copied.
        tokens: the index's shape (rows of the batch, tokens), if it has a number for each token.
        ways: how the rows can be sorted by adapter, where the index has values that can be read.
        values: the index as it was given, where it has values that can be read.
        known: the modules whose input is known to have the rows on its first axis; `None` where that was not found out.
    """

    numbers: Tensor
    keep: Tensor | None
    in_order: bool
    tokens: torch.Size | None = None
    ways: tuple[segments.Segments, ...] = ()
    values: tuple[int, ...] = ()
    known: frozenset[str] | None = None

    @property
    def size(self) -> int:
        """How many there are."""
        return self.numbers.shape[0]


def of_adapters(adapters: Sequence[Adapter], index: Any) -> Rows | None:
    """The rows of the one stack among the adapters, or `None` where there is neither a stack nor an index.

    Raises:
        TypeError, ValueError: there is one without the other, or the index is not one that `of_index` takes.
    """
    stacks = [adapter for adapter in adapters if adapter.members is not None]
    if any(map(stacking.is_half, stacks)):
        raise ValueError(
            "the stack's params are mapped by torch.vmap and its buffers are not (or the other way round); map over "
            "all of it: torch.vmap(lambda a, batch: torch.func.grad(lambda p: loss(a.replace(params=p), batch))"
            "(a.params))(stacked, batches)."
        )
    if index is None:
        for adapter in filter(stacking.is_whole, stacks):
            raise ValueError(
                f"the adapter is a stack of {stacking.size(adapter)}; pass index=..., one number per row of the batch, "
                "or map over it: torch.vmap(lambda a: pf.apply(model, a, batch))(stacked)."
            )
        return None
    if len(stacks) != 1:
        raise ValueError(f"index is given and {len(stacks)} of the adapters are stacks; expected exactly one stack.")
    return of_index(index, stacking.size(stacks[0]))


def of_index(index: Any, adapters: int) -> Rows:
    """`index`, integers (rows,) or (rows, tokens) from -1 (the bare base) up to the number of adapters, as rows.

    Raises:
        TypeError, ValueError: it is something else; values are looked at only outside transforms.
    """
    given = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
    if given.dim() not in (1, 2) or given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(
            f"index has shape {tuple(given.shape)} and dtype {given.dtype}; expected one integer per row of the batch, "
            "or (rows, tokens): the number of the adapter in the stack, or -1 for the bare base."
        )
    tokens = given.shape if given.dim() == 2 else None
    rows = given.flatten() if tokens else given
    if is_traced(rows) or not rows.shape[0]:
        is_list = not isinstance(index, Tensor) and not torch.compiler.is_compiling()  # a transform wraps what it makes
        said = tuple(cast("list[int]", np.asarray(index).ravel().tolist())) if is_list else ()
        return Rows(rows.clamp(min=0), rows >= 0, in_order=False, tokens=tokens, values=said)
    values = _values(rows)
    low, high = min(values), max(values)
    if not -1 <= low <= high < adapters:
        raise ValueError(
            f"index has values from {low} to {high}; this stack has adapters 0 to {adapters - 1}, and -1 is the bare "
            "base."
        )
    keep, known = None if low >= 0 else rows >= 0, rows.device.type == "cpu"
    in_order = known and values == list(range(adapters))
    ways = segments.plans(values, adapters) if known and not in_order else ()
    copied = rows.clamp(min=0)  # the caller may write to its index
    return Rows(copied, keep, in_order, tokens, ways, tuple(values))


def _values(rows: Tensor) -> list[int]:
    """The numbers in a tensor that is not wrapped."""
    try:
        return cast("list[int]", rows.tolist())
    except RuntimeError:  # torch 2.6 has no `tolist` while a transform of torch.func is active, on any tensor
        return [int(one) for one in rows.unbind()]


def of_input(x: Tensor, rows: Rows, path: str) -> Rows:
    """The rows of an input that has one for each index, or as many for each, one group after the other.

    So some blocks flatten (rows, tokens, features) or cut a row into windows, and generate() repeats rows for beams.
    """
    _refuse_other_input(x, rows, path)
    if x.shape[0] == rows.size:
        return rows
    each = x.shape[0] // rows.size
    keep = None if rows.keep is None else rows.keep.repeat_interleave(each)
    return Rows(rows.numbers.repeat_interleave(each), keep, in_order=False, tokens=rows.tokens, known=rows.known)


def _refuse_other_input(x: Tensor, rows: Rows, path: str) -> None:
    if rows.known is not None and path not in rows.known:
        raise UnlikeRowsError(
            f"{path}: it is not known where the rows of the batch are in what this layer is given: the bare base did "
            "not run it on this batch (an expert that no token chose). Apply the adapters one at a time."
        )
    if not rows.size or x.shape[0] % rows.size:
        raise ValueError(
            f"{path}: index has {rows.size} rows and the input here has shape {tuple(x.shape)}; expected one index "
            "for each row of the batch, on the first axis."
        )


def flat(x: Tensor, rows: Rows, path: str) -> Tensor:
    """The input with its tokens as rows, where the index has a number for each token."""
    if rows.tokens is None:
        _refuse_other_input(x, rows, path)
        return x
    if rows.known is not None and path not in rows.known:
        raise UnlikeRowsError(f"{path}: it is not known where the tokens of the batch are in what this layer is given.")
    if x.shape[0] == rows.size and x.shape[:2] != rows.tokens:
        return x
    if x.shape[:2] == rows.tokens:
        return x.flatten(0, 1)
    raise ValueError(
        f"{path}: index has a number for each of {tuple(rows.tokens)} tokens and the input here has shape "
        f"{tuple(x.shape)}; expected the same rows and tokens. Leave the site out, or give one number per row."
    )


def refuse_tokens(rows: Rows, path: str) -> None:
    """A `ValueError` if the index has a number for each token, where a module is adapted as a whole."""
    if rows.tokens is not None:
        raise ValueError(
            f"index has a number for each of {tuple(rows.tokens)} tokens, and this adapter acts on "
            f"{path or 'the model'} as a whole; expected one number per row."
        )


def refuse_other_batch(rows: Rows, given: Iterable[Any]) -> None:
    """A `ValueError` if no tensor of a call has as many rows as the index, on its first axis or its second."""
    tensors = [one for one in given if isinstance(one, Tensor) and one.dim() > 0]
    shape = rows.numbers.shape if rows.tokens is None else rows.tokens
    has = any(one.shape[:2] == shape if rows.tokens else rows.size in one.shape[:2] for one in tensors)
    if tensors and not has:
        raise ValueError(
            f"index has shape {tuple(shape)} and the batch has tensors of shape {[tuple(t.shape) for t in tensors]}; "
            "expected one number for each row of the batch, or for each of its tokens."
        )
