"""A summary of a table as it was read, in a few lines, shown before it is used."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Iterator

from peftfn.cli import folders
from peftfn.cli.data import labels, tables
from peftfn.cli.data.columns import Columns
from peftfn.cli.data.tables import Table
from peftfn.cli.data.tasks import Examples, Reading
from peftfn.cli.settings import DataSettings

_MOST = 8
"""Labels, or columns, that are named."""
_WIDTH = 50
"""Characters of a text that are shown."""


def about(name: str, table: Table, columns: Columns, examples: Examples, settings: DataSettings) -> str:
    """Rows, columns, labels and their counts, lengths in tokens, and what was cut or left out, a line each."""
    reading, task = examples.reading, "seq_cls" if columns.label else "causal_lm"
    head = f"{name:<9}{table.name}: {reading.rows:,} rows, {len(reading.lengths) - reading.too_short:,} read for {task}"
    rows = [("", what, said) for what, said in _lines(table, columns, examples, settings)]
    return "\n".join([head, *(f"        {line}" for line in folders.table(rows).split("\n"))])


def _lines(table: Table, columns: Columns, examples: Examples, settings: DataSettings) -> Iterator[tuple[str, str]]:
    reading = examples.reading
    of = (
        f"column {columns.text!r}"
        if columns.completion is None
        else f"columns {columns.text!r} + {columns.completion!r}"
    )
    yield "text", f"{of}, {_lengths(reading)}{_cut(columns, examples, settings)}"
    if columns.completion is not None:
        yield "loss", f"on the tokens of {columns.completion!r} alone"
    if columns.label is not None:
        yield "labels", f"column {columns.label!r}: {_counts(columns, examples)}"
    for alike in labels.alike(columns.labels):
        yield "note", f"labels {' and '.join(map(repr, alike))} differ in case alone"
    used = (columns.text, columns.label, columns.completion)
    if others := [column for column in table.columns if column not in used]:
        yield "not read", f"{', '.join(map(repr, others[:_MOST]))}{', ...' if len(others) > _MOST else ''}"
    if reading.without_text:
        what = "no text" if columns.completion is None else f"no {columns.text} or no {columns.completion}"
        count = len(reading.without_text)
        yield "left out", f"{count:,} with {what} ({tables.row_numbers(reading.without_text)})"
    if reading.too_short:
        why = (
            "a single token"
            if columns.completion is None
            else f"a prompt that fills --max-length {settings.max_length}"
        )
        yield "left out", f"{reading.too_short:,} with {why}: nothing of them is predicted"
    texts = [row.get(columns.text) for row in table.rows]
    nothing = [n for n, text in enumerate(texts) if isinstance(text, str) and text.strip().lower() in labels.NOTHING]
    if nothing:
        words = f"{texts[nothing[0]]!r} and nothing else"
        yield "note", f"{len(nothing):,} with {words}, read as a text ({tables.row_numbers(nothing)})"
    for note in table.notes:
        yield "note", note
    yield "row 1", _first(table, columns, reading)


def _lengths(reading: Reading) -> str:
    least, most = min(reading.lengths), max(reading.lengths)
    if least == most:
        return f"{least:,} tokens each"
    return f"{least:,} to {most:,} tokens, median {statistics.median_low(reading.lengths):,}"


def _cut(columns: Columns, examples: Examples, settings: DataSettings) -> str:
    length = settings.max_length
    if columns.label is None and columns.completion is None and settings.long_text == "chunk":
        return f"; joined, and cut into {len(examples.ids):,} pieces of at most {length:,}"
    cut = examples.reading.cut
    return f"; {cut:,} cut to {length:,}" if cut else f"; none cut, up to {length:,} fit"


def _counts(columns: Columns, examples: Examples) -> str:
    counts = collections.Counter(columns.labels[label] for label in examples.labels)
    shown = ", ".join(f"{name} {counts[name]:,}" for name in columns.labels[:_MOST])
    left = len(columns.labels) - _MOST
    return f"{len(columns.labels)} labels: {shown}{f', and {left:,} more' if left > 0 else ''}"


def _first(table: Table, columns: Columns, reading: Reading) -> str:
    row = next(row for number, row in enumerate(table.rows) if number not in set(reading.without_text))
    shown = _short(row[columns.text])
    if columns.completion is not None:
        return f"{shown} + {_short(row[columns.completion])}"
    return f"{shown} is {row[columns.label]!s}" if columns.label is not None else shown


def _short(text: str) -> str:
    return repr(text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}...")
