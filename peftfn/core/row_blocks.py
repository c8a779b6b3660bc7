"""A matrix a block of rows at a time, such that the product of each block is those rows of the product of all."""

from __future__ import annotations

from collections.abc import Iterator

_ROWS = (
    64  # what blocks are a multiple of; MKL rounds a product of fewer rows otherwise than those rows of a larger one
)


def of_rows(rows: int, width: int, most: int) -> Iterator[slice]:
    """All rows in blocks, of at most `most` values where that is possible.

    Args:
        rows: of the matrix.
        width: values in each of them.
        most: values in a block. It has 64 rows or more in any case, and the last one takes the rest with it.
    """
    step = max(1, most // max(1, width) // _ROWS) * _ROWS
    starts = range(0, max(1, rows - _ROWS + 1), step)
    yield from (slice(start, start + step if start + step in starts else rows) for start in starts)
