"""The label of each row as the name of a class: refused where a column holds something else."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peftfn.cli.data.tables import Table, refuse_missing, row_numbers
from peftfn.cli.errors import UserError

_WHOLE = re.compile(r"-?\d+")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")
NOTHING = frozenset(("nan", "null", "<na>", "#n/a"))
"""What programs write for a missing value, which is hardly the name of a class."""
_NOTHING_AMONG_NUMBERS = NOTHING | {"na", "n/a", "none", "-", "?"}
_LONGEST = 200
"""Characters of a label: a longer one is a text."""
_FEW = 10
"""So many labels may each be of one row alone."""


def labels_of(table: Table, column: str, rows: Sequence[int]) -> list[str]:
    """The label of each of `rows`, as a name; whole numbers are named by their digits, also where they end in .0.

    Raises:
        UserError: a row has no label, the column holds numbers that are no classes, or it holds texts.
    """
    refuse_missing(table, column)
    values = [table.rows[number].get(column) for number in rows]
    where = f"{table.name}, column {column}"
    if missing := [number for number, value in zip(rows, values, strict=True) if _is_missing(value)]:
        raise UserError(
            f"{where}: {len(missing):,} of {len(rows):,} rows have no label ({row_numbers(missing)}); label them or "
            "take them out"
        )
    for number, value in zip(rows, values, strict=True):
        if isinstance(value, (list, dict)):
            raise UserError(f"{where}, row {number + 1}: label {value!r}; give a name or a whole number")
    if len({isinstance(value, bool) for value in values}) > 1:
        raise UserError(f"{where}: some labels are true or false and others are not; write all of them in one way")
    numbers = [_number(value) for value in values]
    if all(number is not None for number in numbers):
        return _whole(where, values, [number for number in numbers if number is not None])
    names = [str(value).strip() for value in values]
    _refuse_nothing(where, names, numbers)
    return names


def _is_missing(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and not value.strip())


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value
    text = str(value).strip()
    if _WHOLE.fullmatch(text):
        return int(text)  # exactly: a float holds no more than 53 bits
    return float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else None


def _whole(where: str, values: Sequence[Any], numbers: Sequence[int | float]) -> list[str]:
    """Names of whole numbers: 1, 1.0, "1" and "1.0" are one label."""
    names: list[str] = []
    for value, number in zip(values, numbers, strict=True):
        if isinstance(number, float) and not number.is_integer():
            raise UserError(
                f"{where} holds numbers such as {value}: that is regression, which is not trained here; give a column "
                "of names or whole numbers"
            )
        text = str(value).strip()
        names.append(text if _WHOLE.fullmatch(text) else str(int(number)))
    spelled: dict[int | float, set[str]] = {}
    for name, number in zip(names, numbers, strict=True):
        spelled.setdefault(number, set()).add(name)
    if several := next((some for some in spelled.values() if len(some) > 1), None):
        raise UserError(f"{where}: {' and '.join(sorted(several))} are one number; write it in one way")
    return names


def _refuse_nothing(where: str, names: Sequence[str], numbers: Sequence[int | float | None]) -> None:
    others = [n for name, n in zip(names, numbers, strict=True) if name.lower() not in _NOTHING_AMONG_NUMBERS]
    words = _NOTHING_AMONG_NUMBERS if others and None not in others else NOTHING
    if found := [number for number, name in enumerate(names) if name.lower() in words]:
        raise UserError(
            f"{where}: {len(found):,} of {len(names):,} labels are {names[found[0]]!r}, which says that there is none; "
            "label those rows or take them out"
        )


def refuse_texts(where: str, names: Sequence[str]) -> None:
    """Raise where most rows have a label of their own, or where a label is as long as a text: that is no label."""
    counts = collections.Counter(names)
    alone = [name for name, count in counts.items() if count == 1]
    if len(alone) > max(_FEW, len(names) // 2):
        raise UserError(
            f"{where} has {len(counts):,} different values in {len(names):,} rows, {len(alone):,} of them once: those "
            "are no labels; give --label-column, or --task causal_lm"
        )
    if (longest := max(counts, key=len)) and len(longest) > _LONGEST:
        raise UserError(
            f"{where} holds {longest[:40]!r}... of {len(longest):,} characters: a text and no label; give "
            "--label-column, or --task causal_lm"
        )


def label_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels, in the order of their ids: 0..k-1 as they are, anything else sorted."""
    names = sorted(set(labels))
    numbers = sorted(names, key=lambda name: (len(name), name))
    if numbers == [str(i) for i in range(len(numbers))]:
        return numbers
    return names


def alike(names: Iterable[str]) -> list[list[str]]:
    """Labels that differ in nothing but the case of their letters."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(name.casefold(), []).append(name)
    return [some for some in found.values() if len(some) > 1]
