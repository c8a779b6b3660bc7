"""A different adapter for each row of a file: which rows name which, and one stack of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import peftfn as pf
from peftfn.cli import folders
from peftfn.cli.data import tables
from peftfn.cli.errors import UserError

COLUMN = "adapter"


class Chosen(NamedTuple):
    """The adapters that a table's rows name.

    Attributes:
        names: each adapter's, in the order in which they come up.
        folders: each adapter's folder or hub id.
        rows: for each row of the table the number of its adapter, -1 where its cell is empty: the bare base.
    """

    names: list[str]
    folders: list[str]
    rows: list[int]


def chosen(table: tables.Table, column: str | None, adapters: Sequence[str] | None) -> Chosen:
    """The adapters that the rows name in a column: by the names that `adapters` give (NAME=FOLDER), or by folder."""
    column = column or COLUMN
    if column not in table.columns:
        raise UserError(
            f"--adapter-column {column}: {table.name} has no such column; it has: {', '.join(table.columns)}"
        )
    named = _named(adapters or ())
    cells = ["" if row.get(column) is None else str(row[column]).strip() for row in table.rows]
    names = list(dict.fromkeys(filter(None, cells)))
    if not names:
        raise UserError(f"{table.name}: column {column} names no adapter in any row; give --adapter for all of them")
    if unknown := sorted(set(named) - set(names)):
        raise UserError(f"--adapters names {', '.join(unknown)}, and no row of {table.name} does; leave it out")
    numbers = {name: number for number, name in enumerate(names)} | {"": -1}
    return Chosen(names, [named.get(name, name) for name in names], [numbers[cell] for cell in cells])


def _named(adapters: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in adapters:
        name, is_pair, folder = one.partition("=")
        if not is_pair or not name or not folder:
            raise UserError(f"--adapters {one}: give NAME=FOLDER, one for each name in the column")
        if name in found:
            raise UserError(f"--adapters names {name} twice: {found[name]} and {folder}")
        found[name] = folder
    return found


def base_of(found: Chosen, model: str | None) -> str:
    """The one base that all of the adapters were made for, or the given one."""
    bases = {name: folders.base_name(pf.load(at, mmap=True), model) for name, at in zip(*found[:2], strict=True)}
    if len(set(bases.values())) > 1:
        said = ", ".join(f"{name} {base}" for name, base in bases.items())
        raise UserError(f"the adapters are for different bases ({said}); give the rows of one base, or --model")
    return next(iter(bases.values()))


def stacked(found: Chosen, model: Any) -> pf.Adapter:
    """The adapters as one stack, on the model's device."""
    return pf.load_stack(found.folders, model, device=model.device)


def tables_of(table: tables.Table, found: Chosen) -> Mapping[int, tables.Table]:
    """The rows of each adapter as a table of their own, by its number."""
    numbers = sorted(set(found.rows))
    return {
        number: table._replace(rows=[row for row, own in zip(table.rows, found.rows, strict=True) if own == number])
        for number in numbers
    }
