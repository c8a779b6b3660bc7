"""Rows out of a CSV, TSV or JSONL file or a `datasets` name, and which columns are text and label."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peftfn.cli.errors import UserError, need, sentence

Row = dict[str, Any]

FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}
TEXT_NAMES = ("text", "sentence", "content", "document", "body", "review", "message", "prompt", "article")
LABEL_NAMES = ("label", "labels", "category", "class", "target", "sentiment", "topic", "intent")


class Table(NamedTuple):
    """Rows with their column names; `name` is what messages call it."""

    name: str
    columns: list[str]
    rows: list[Row]


def read_table(source: str, split: str) -> Table:
    """The rows of a file, of a folder that `datasets` wrote, or of a `datasets` name or name:config."""
    path = Path(source)
    if path.suffix.lower() in FORMATS:
        if not path.is_file():
            raise UserError(f"{source}: no such file")
        table = _read_file(path)
    elif path.is_file():
        raise UserError(f"{source}: give a file that ends in {', '.join(FORMATS)}, or a `datasets` name")
    else:
        table = _read_datasets(source, split)
    if not table.rows:
        raise UserError(f"{table.name} has no rows")
    return table


def _read_file(path: Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    delimiter = FORMATS[path.suffix.lower()]
    rows = list(_json_rows(path, text) if delimiter is None else _delimited_rows(path, text, delimiter))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(str(path), columns, rows)


def _delimited_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # csv's own limit of 131,072 characters is shorter than a long document
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns = reader.fieldnames or []
    if len(set(columns)) < len(columns):
        raise UserError(f"{path} names a column twice: {', '.join(columns)}")
    try:
        for row in reader:
            # DictReader puts extra cells under None and fills missing ones with None
            if None in row or None in row.values():
                cells = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None) or [])
                raise UserError(f"{path}, line {reader.line_num}: {cells} cells where the header has {len(columns)}")
            yield dict(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: {error}") from None


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    # not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: expected an object such as {{"text": ...}}, found {line[:40]}')
        yield row


def _read_datasets(source: str, split: str) -> Table:
    datasets = need("datasets")
    datasets.disable_progress_bars()
    name, _, config = source.partition(":")
    saved = any((Path(source) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        data: Any = datasets.load_from_disk(source) if saved else datasets.load_dataset(name, config or None)
    except Exception as error:  # noqa: BLE001  # datasets raises its own classes, and those of what it reads with
        raise UserError(f"{source} is neither a file nor a dataset that could be read: {sentence(error)}") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{source} has no split {split!r}; it has: {', '.join(data)}")
        data = data[split]
    found: list[Row] = list(data)
    for column, feature in data.features.items():
        if isinstance(feature, datasets.ClassLabel):  # numbers in the file, with names beside it; -1 is none
            found = [{**row, column: feature.names[row[column]] if row[column] >= 0 else None} for row in found]
    return Table(f"{source} ({split})", list(data.column_names), found)


def _find(table: Table, given: str | None, known: Sequence[str], option: str) -> str | None:
    """The column that was given, or the first whose name is a usual one."""
    if given is not None:
        if given not in table.columns:
            raise UserError(f"{option} {given}: {table.name} has no such column; it has: {', '.join(table.columns)}")
        return given
    lower = {column.strip().lower(): column for column in table.columns}
    return next((lower[name] for name in known if name in lower), None)


def label_column(table: Table, given: str | None) -> str | None:
    """The column with the labels, or None where no column looks like one."""
    return _find(table, given, LABEL_NAMES, "--label-column")


def text_column(table: Table, given: str | None, label: str | None = None) -> str:
    """The column with the text: given, found by its name, or the only one beside the label."""
    found = _find(table, given, TEXT_NAMES, "--text-column")
    others = [column for column in table.columns if column != label]
    if found is None and len(others) == 1:
        found = others[0]
    if found is None:
        raise UserError(
            f"no column of {table.name} looks like the text; give --text-column: {', '.join(table.columns)}"
        )
    return found


def texts_of(table: Table, column: str) -> list[tuple[int, str]]:
    """Row number and text of each row that has any text."""
    found: list[tuple[int, str]] = []
    for number, row in enumerate(table.rows):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{table.name}, row {number + 1}: column {column} holds {text!r}, not text")
        if text and text.strip():
            found.append((number, text))
    if not found:
        raise UserError(f"{table.name}: column {column} is empty in all {len(table.rows)} rows")
    return found


def labels_of(table: Table, column: str, rows: Sequence[int]) -> list[str]:
    """The label of each of `rows`, as a name; whole numbers are named by their digits."""
    found: list[str] = []
    for number in rows:
        label = table.rows[number].get(column)
        if label is None or label == "" or isinstance(label, (float, list, dict)):
            raise UserError(
                f"{table.name}, row {number + 1}: label {label!r} in column {column}; give a name or a whole number"
            )
        found.append(str(label))
    return found


def label_names(labels: Sequence[str]) -> list[str]:
    """The distinct labels, in the order of their ids: 0..k-1 as they are, anything else sorted."""
    names = sorted(set(labels))
    numbers = sorted(names, key=lambda name: (len(name), name))
    if numbers == [str(i) for i in range(len(numbers))]:
        return numbers
    return names
