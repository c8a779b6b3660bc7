"""Rows out of the text of a CSV, TSV, JSON or JSON Lines file, read in the one way that it allows, or refused."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from peftfn.cli.errors import UserError

Row = dict[str, Any]

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")

_MARKS = (  # the longer ones first: that of UTF-32 begins with that of UTF-16
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
"""Byte order marks, which say how a file is encoded."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class Found(NamedTuple):
    """What a file holds.

    Attributes:
        rows: of values by column; a file of cells has text in all of them.
        columns: their names, in order.
        notes: what a reader may not expect of the file, a sentence each.
        has_cells: whether the names are the file's first line, which may be a row where there is no header.
    """

    rows: list[Row]
    columns: list[str]
    notes: list[str]
    has_cells: bool


def read(path: Path) -> Found:
    """The rows of a file whose name ends in one of `FORMATS`.

    Raises:
        UserError: the file can be read in no way, or in several.
    """
    text, notes = _decoded(path)
    is_table = path.suffix.lower() in (".csv", ".tsv")
    columns, rows, more = _cells(path, text) if is_table else _objects(path, text)
    return Found(rows, columns, [*notes, *more], is_table)


def _decoded(path: Path) -> tuple[str, list[str]]:
    """The text, by the file's byte order mark if it has one, else as UTF-8."""
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} text (byte {error.start}); save it as UTF-8, for "
            f"instance with iconv -f WINDOWS-1252 -t UTF-8 {path.name}, if that is what it is"
        ) from None
    if "\0" in text:
        raise UserError(
            f"{path} has NUL characters, as UTF-16 text without a byte order mark seems to; save it as UTF-8"
        )
    return text, [] if encoding.startswith("utf-8") else [f"read as {encoding.upper()}, which its first bytes name"]


class _Line(NamedTuple):
    """One row of cells, and the file's line on which it ends."""

    number: int
    cells: list[str]


def _cells(path: Path, text: str) -> tuple[list[str], list[Row], list[str]]:
    said = re.match(r'"?sep=(.)"?\r?\n', text)  # Excel's own first line
    if said:
        text = "\n" + text[said.end() :]
    delimiter = said[1] if said else _delimiter(path, text)
    lines, blank = _parted(path, text, delimiter)
    blank -= bool(said)
    if not lines:
        return [], [], []
    columns = lines[0].cells
    if len(set(columns)) < len(columns):
        raise UserError(f"{path} names a column twice: {', '.join(columns)}")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    notes = [f"its columns are parted by {_named(delimiter)}"] if delimiter != usual and len(columns) > 1 else []
    notes += [f"{blank:,} blank line{'s' * (blank > 1)} left out"] if blank else []
    rows: list[Row] = []
    for line in lines[1:]:
        if len(line.cells) != len(columns):
            _refuse_width(path, line, columns, delimiter)
        if len(columns) > 1 and [cell.removeprefix("\ufeff") for cell in line.cells] == columns:
            raise UserError(f"{path}, line {line.number} is the header again; two files in one? take it out")
        rows.append(dict(zip(columns, line.cells, strict=True)))
    if swallowed := _swallowed(lines, delimiter):
        raise UserError(
            f"{path}, line {swallowed.number}: a cell in quotes has the line {swallowed.cells[0]!r} in it, which reads "
            "like a row; close the quote before it, or write the file as .jsonl"
        )
    return columns, rows, notes


def _named(delimiter: str) -> str:
    return _DELIMITERS.get(delimiter, repr(delimiter))


def _refuse_width(path: Path, line: _Line, columns: Sequence[str], delimiter: str) -> NoReturn:
    advice = f"; put a text that holds {_named(delimiter)} in quotes" if len(line.cells) > len(columns) else ""
    raise UserError(f"{path}, line {line.number}: {len(line.cells)} cells where the header has {len(columns)}{advice}")


def _parted(path: Path | None, text: str, delimiter: str) -> tuple[list[_Line], int]:
    """The lines that are not blank, and how many blank ones lie between them."""
    csv.field_size_limit(2**31 - 1)  # csv's own limit of 131,072 characters is shorter than a long document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[_Line] = []
    blank = trailing = 0
    try:
        for cells in reader:
            if cells:
                lines.append(_Line(reader.line_num, cells))
                blank, trailing = blank + trailing, 0
            else:
                trailing += 1
    except csv.Error as error:
        advice = "; is a quote left open?" if "unexpected end" in str(error) or "expected after" in str(error) else ""
        raise UserError(f"{path}, line {reader.line_num}: {error}{advice}") from None
    return lines, blank


def _delimiter(path: Path, text: str) -> str:
    """What parts the header's names and, where several could, all rows into as many cells."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    header = next((line for line in text.splitlines() if line.strip()), "")
    header = re.sub(r'"[^"]*"', "", header)  # what is in quotes parts nothing
    splits = [one for one in _DELIMITERS if one in header]
    if len(splits) <= 1:
        return splits[0] if splits else usual
    fitting = [one for one in splits if _fits(text, one)]
    if len(fitting) > 1:
        raise UserError(
            f"{path}: its columns may be parted by {' or by '.join(_named(one) for one in fitting)}; write a first "
            f"line sep={fitting[0]} or sep={fitting[1]}"
        )
    return fitting[0] if fitting else usual if usual in splits else splits[0]


def _fits(text: str, delimiter: str) -> bool:
    try:
        lines, _ = _parted(None, text, delimiter)
    except UserError:
        return False
    return len({len(line.cells) for line in lines}) == 1


def _swallowed(lines: Sequence[_Line], delimiter: str) -> _Line | None:
    """A line inside a quoted cell that would be a row with a value of another row, as where a quote is not closed."""
    columns = [set(cells) - {""} for cells in zip(*(line.cells for line in lines), strict=True)]
    for line in lines:
        for cell in (cell for cell in line.cells if "\n" in cell and len(columns) > 1):
            for inner in cell.splitlines()[1:-1]:
                parts = inner.split(delimiter)
                if len(parts) == len(columns) and any(part in own for part, own in zip(parts, columns, strict=True)):
                    return _Line(line.number, [inner])
    return None


def _objects(path: Path, text: str) -> tuple[list[str], list[Row], list[str]]:
    is_array = path.suffix.lower() == ".json" and text.lstrip()[:1] == "["
    rows = list(_array(path, text)) if is_array else list(_json_lines(path, text))
    lines = [line for line in text.rstrip().split("\n") if not line.strip()]
    notes = [f"{len(lines):,} blank line{'s' * (len(lines) > 1)} left out"] if lines and not is_array and rows else []
    return list(dict.fromkeys(name for row in rows for name in row)), rows, notes


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object of JSON, whose names have to differ: Python's reader takes the last one without a word."""
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"an object names {twice[0]!r} twice")
    return dict(pairs)


def _array(path: Path, text: str) -> Iterator[Row]:
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (UserError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a JSON array of objects: {error}") from None
    for number, row in enumerate(cast("list[Any]", found), start=1):
        yield _checked(f"{path}, row {number}", row, json.dumps(row))


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except json.JSONDecodeError as error:
            advice = "; a JSON array belongs in a file that ends in .json" if text.lstrip()[:1] == "[" else ""
            raise UserError(f"{path}, line {number} is not JSON: {error}{advice}") from None
        yield _checked(f"{path}, line {number}", row, line)


def _checked(where: str, row: Any, shown: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"text": ...}}, found {shown[:40]}')
    return cast("Row", row)
