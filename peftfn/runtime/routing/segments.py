"""Rows sorted by adapter, in segments of one size: how a batched kernel runs them without a copy of weights per row."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peftfn.core import stack_slices

Numbers = NDArray[np.int64]


def grouped(x: Tensor, groups: int) -> Tensor:
    """(groups, each, ...) of x (groups * each, ...)."""
    return x.reshape(groups, -1, *x.shape[1:])


class Segments(NamedTuple):
    """The rows that have an adapter, sorted by it.

    Attributes:
        adapters: (S,), the adapter of each segment; `None` where they are all of the stack's, in order: then no weight
            is copied.
        number: S.
        size: how many places a segment has.
        source: (S * size,), the row in each place; places left over repeat a row, and their results are dropped.
        rows: the rows that have an adapter, or `None` for all.
        places: the place of each of these.
        used: (S * size,), false in the places of adapters that no row uses, which hold some other row; `None` where
            every adapter has a row.
    """

    adapters: Tensor | None
    number: int
    size: int
    source: Tensor
    rows: Tensor | None
    places: Tensor
    used: Tensor | None = None

    @property
    def is_order(self) -> bool:
        """Whether this is a permutation of the rows: each row has one place, and no place is left over."""
        return self.rows is None and self.number * self.size == self.places.shape[0]

    def sorted(self, x: Tensor, rows: int) -> Tensor:
        """(S * size * each, ...) of x (rows * each, ...)."""
        source = self.source.to(x.device)
        found = (x if x.shape[0] == rows else grouped(x, rows)).index_select(0, source)
        if self.used is not None and torch.is_grad_enabled():  # an adapter of NaN would give its row a gradient of NaN
            used = self.used.to(x.device).view(-1, *(1,) * (found.dim() - 1))
            found = torch.where(used, found, 0)
        return found if x.shape[0] == rows else found.flatten(0, 1)

    def restored(self, found: Tensor, y: Tensor, rows: int) -> Tensor:
        """y with what was found for the rows that have an adapter in their place."""
        if self.rows is None and y.shape[0] == rows:
            return found.index_select(0, self.places.to(y.device))
        found = grouped(found, self.number * self.size).index_select(0, self.places.to(y.device))
        if self.rows is None:
            return found.flatten(0, 1)
        return grouped(y, rows).index_copy(0, self.rows.to(y.device), found).flatten(0, 1)

    def of(self, leaf: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each segment's slice of a stack's leaf."""
        if self.adapters is None:
            return dict(leaf)
        return stack_slices.picked(leaf, self.adapters)


def plans(index: Sequence[int], adapters: int) -> tuple[Segments, ...]:
    """Two ways to sort rows whose adapters are known: a segment for each adapter, or as few as are in use.

    In the second, an adapter with many rows has several segments, so that at most half of the places are left over.

    Args:
        index: of each row, from -1, the bare base.
        adapters: how many the stack has.
    """
    # An operation of numpy's on a few numbers takes a third of torch's time, and there are many of them.
    given = np.array(index, dtype=np.int64)
    rows = np.flatnonzero(given >= 0) if given.size and given.min() < 0 else None
    numbers = given if rows is None else given[rows]
    if not numbers.size:
        return ()
    counts = np.bincount(numbers, minlength=adapters)
    whole = _built(numbers, rows, counts, int(counts.max()), np.ones_like(counts))
    size = -(-numbers.size // int(np.count_nonzero(counts)))
    cut = _built(numbers, rows, counts, size, -(-counts // size))
    return whole._replace(adapters=None), cut


def _built(numbers: Numbers, rows: Numbers | None, counts: Numbers, size: int, segments: Numbers) -> Segments:
    """Segments of `size` places, `segments[k]` of them for adapter k."""
    order = numbers.argsort(kind="stable")
    owner, first = numbers[order], counts.cumsum() - counts
    rank = np.arange(numbers.size) - first[owner]  # among the rows of its adapter
    at = (segments.cumsum() - segments)[owner] * size + rank  # (rows,), in sorted order
    adapters = np.arange(counts.size).repeat(segments)
    sorted_rows = order if rows is None else rows[order]
    # What is left over repeats a row of the same adapter: so a row that is not finite spoils no other's gradient.
    source = sorted_rows[first.clip(max=numbers.size - 1)][adapters].repeat(size)
    source[at] = sorted_rows
    places = np.empty_like(order)
    places[order] = at
    return Segments(
        torch.from_numpy(adapters),
        adapters.size,
        size,
        torch.from_numpy(source),
        None if rows is None else torch.from_numpy(rows),
        torch.from_numpy(places),
        None if counts[adapters].all() else torch.from_numpy((counts[adapters] > 0).repeat(size)),
    )


def cheapest(ways: Sequence[Segments], rows: int, leaf: int, x: Tensor, outputs: int) -> Segments | None:
    """The way that takes the least time, or `None` where each row had better get a copy of its adapter's weights.

    Counted in numbers moved: a copy of a slice is read, written and read again; sorting reads and writes inputs and
    outputs, and outputs once more on their way back; four products for places that are left over take as long as one
    number. Sorting has more kernels, so it has to save three tenths. `benchmarks/crossover.py` prints both sides of the
    crossover and what this chose: on one core, 32 rows through 512 by 512 numbers with an adapter each, sorting won up
    to 8 tokens a row with a rank of 16 (0.82 of the time at one token, 0.96 at 8) and up to 32 with a rank of 64 (0.47
    at one token, 0.91 at 32); with adapters drawn at random it won at a rank of 64 alone, up to 4 tokens (0.93).

    Args:
        ways: what there is to choose from.
        rows: how many there are.
        leaf: numbers in one adapter's slice.
        x: the input.
        outputs: numbers in the output.
    """
    if not ways:
        return None
    inputs = x.numel()
    tokens, moved = inputs // max(1, x.shape[-1] * rows), (2 * inputs + 4 * outputs) // rows

    def cost(way: Segments) -> int:
        places = way.number * way.size
        copies = way.number * leaf * (1 if way.adapters is None else 3)
        return copies + places * moved + max(0, places - rows) * tokens * leaf // 4

    least, best = min(((cost(way), way) for way in ways), key=operator.itemgetter(0))
    return best if least < 0.7 * 3 * rows * leaf else None
