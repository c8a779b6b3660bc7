"""Rows out of a file or a `datasets` name, and the texts in a column of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from peftfn.cli.data import text_files
from peftfn.cli.data.text_files import Row
from peftfn.cli.errors import UserError, need, sentence

CHATS = ("messages", "conversations", "conversation", "chat")
"""Usual names of a column that holds a list of messages."""


class Table(NamedTuple):
    """Rows with their column names.

    Attributes:
        name: what messages call it.
        columns: the names, in order.
        rows: of values by column.
        notes: what a reader may not expect of the file, a sentence each.
        has_cells: whether the names are the first line of a file, which may be a row where there is no header.
    """

    name: str
    columns: list[str]
    rows: list[Row]
    notes: Sequence[str] = ()
    has_cells: bool = False


def read_table(source: str, split: str) -> Table:
    """The rows of a file, of a folder that `datasets` wrote, or of a `datasets` name or name:config."""
    path = Path(source)
    if path.suffix.lower() in text_files.FORMATS:
        if not path.is_file():
            raise UserError(f"{source}: no such file")
        rows, columns, notes, has_cells = text_files.read(path)
        table = Table(str(path), columns, rows, notes, has_cells)
    elif path.is_file():
        raise UserError(f"{source}: give a file that ends in {', '.join(text_files.FORMATS)}, or a `datasets` name")
    else:
        table = _read_datasets(source, split)
    if not table.rows:
        raise UserError(f"{table.name} has no rows")
    return table


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


def refuse_missing(table: Table, column: str) -> None:
    """Raise where the table has no such column."""
    if column not in table.columns:
        raise UserError(f"{table.name} has no column {column!r}; it has: {', '.join(table.columns)}")


def texts_of(table: Table, column: str) -> list[tuple[int, str]]:
    """Row number, from 0, and text of each row that has any text."""
    refuse_missing(table, column)
    found: list[tuple[int, str]] = []
    for number, row in enumerate(table.rows):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            _refuse_cell(f"{table.name}, row {number + 1}: column {column}", text)
        if text and text.strip():
            found.append((number, text))
    if not found:
        raise UserError(f"{table.name}: column {column} is empty in all {len(table.rows)} rows")
    return found


def _refuse_cell(where: str, value: Any) -> NoReturn:
    shown = str(value)
    if isinstance(value, (list, dict)) and any(word in shown for word in ("'role'", "'from'")):
        raise UserError(
            f"{where} holds the messages of a chat, which are not read; write them as text "
            "(tokenizer.apply_chat_template), or as columns prompt and completion"
        )
    raise UserError(f"{where} holds {shown if len(shown) <= 60 else shown[:57] + '...'}, not text")


def row_numbers(numbers: Sequence[int]) -> str:
    """`rows 1, 5, 9, ...`: rows as a person counts them, the header not among them."""
    shown = ", ".join(str(number + 1) for number in numbers[:5])
    return f"row{'s' * (len(numbers) > 1)} {shown}{', ...' if len(numbers) > 5 else ''}"
