"""Blocks of rows for computing a matrix piece by piece with the same bits as all at once.

A product of some rows need not round as those rows of a larger product do: a CPU's kernels cut their sums by the shape.
So a merged weight is made of the same blocks, whether all of it is made at once or a piece after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

_ROWS = 64  # what blocks are a multiple of: kernels are slow on fewer rows
_BLOCK = 1 << 17  # values: half a MB of float32 stays in a core's cache


def blocks(rows: int, width: int) -> Iterator[slice]:
    """All rows in blocks of half a MB, or of 64 rows where those have more; the last one takes the rest with it.

    Args:
        rows: of the matrix.
        width: values in each of them.
    """
    return _cut(rows, _rows(width))


def pieces(rows: int, width: int, most: int) -> Iterator[slice]:
    """All rows in pieces of whole blocks, of at most `most` values where a block is not larger."""
    step = _rows(width)
    return _cut(rows, max(1, most // max(1, width) // step) * step)


def _rows(width: int) -> int:
    return max(1, _BLOCK // max(1, width) // _ROWS) * _ROWS


def _cut(rows: int, step: int) -> Iterator[slice]:
    starts = range(0, max(1, rows - _ROWS + 1), step)
    yield from (slice(start, start + step if start + step in starts else rows) for start in starts)
