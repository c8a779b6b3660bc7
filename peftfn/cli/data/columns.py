"""Which columns of a table are text, label and completion: given, found by their usual names, or asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peftfn.cli.data import labels, tables
from peftfn.cli.data.tables import Table
from peftfn.cli.errors import UserError
from peftfn.cli.settings import DataSettings

TEXT_NAMES = ("text", "sentence", "content", "document", "body", "review", "message", "prompt", "article", "completion")
LABEL_NAMES = ("label", "labels", "category", "class", "target", "sentiment", "topic", "intent")
PROMPT, COMPLETION = "prompt", "completion"
ANSWER_NAMES = ("completion", "response", "output", "answer", "reply", "chosen")
"""What follows a prompt."""
_MOST_LABELS = 20
"""A column of no more values than these, each of them in several rows, may be labels under another name."""


class Columns(NamedTuple):
    """Which columns are read, and the names of the labels by id (empty for a language model).

    With a `completion`, `text` is the prompt before it.
    """

    text: str
    label: str | None
    labels: list[str]
    completion: str | None = None


def _named(table: Table, names: Sequence[str]) -> list[str]:
    """The columns that have one of the names, whatever the case of its letters, in the order of `names`."""
    return [column for name in names for column in table.columns if column.strip().lower() == name]


def _given(table: Table, name: str, option: str) -> str:
    if name in table.columns:
        return name
    if len(same := [column for column in table.columns if column.strip() == name.strip()]) == 1:
        return same[0]
    raise UserError(f"{option} {name}: {table.name} has no such column; {_there(table)}")


def _there(table: Table) -> str:
    header = " (its first line: if that is a row, write a line of names above it)" if table.has_cells else ""
    return f"it has: {', '.join(table.columns)}{header}"


def _found(table: Table, given: str | None, names: Sequence[str], option: str, what: str) -> str | None:
    if given is not None:
        return _given(table, given, option)
    several = _named(table, names)
    if len(several) > 1:
        raise UserError(f"{table.name}: columns {' and '.join(several)} look like the {what}; give {option}")
    return several[0] if several else None


def label_column(table: Table, given: str | None) -> str | None:
    """The column with the labels, or None where no column looks like one."""
    return _found(table, given, LABEL_NAMES, "--label-column", "label")


def completion_column(table: Table, text: str | None, given: str | None) -> str | None:
    """The column with what follows the text: given, or `completion` beside `prompt`."""
    if given is not None:
        return _given(table, given, "--completion-column")
    prompts, completions = _named(table, (PROMPT,)), _named(table, (COMPLETION,))
    return completions[0] if prompts and completions and text is None else None


def text_column(table: Table, given: str | None, others: Sequence[str | None] = ()) -> str:
    """The column with the text: given, found by its name, or the only one beside `others` that are something else.

    Raises:
        UserError: no column is, or several may be.
    """
    left = table._replace(columns=[column for column in table.columns if column not in others])
    found = _found(table if given else left, given, TEXT_NAMES, "--text-column", "text")
    if found is not None:
        return found
    # the one name of a file without a header is a text, and one with a delimiter in it is several
    if len(left.columns) == 1 and (any(others) or not table.has_cells) and not set(left.columns[0]) & set(",;|\t"):
        return left.columns[0]
    if chats := _named(table, tables.CHATS):
        tables.texts_of(table, chats[0])  # which says how a chat is written as text
    raise UserError(f"no column of {table.name} looks like the text; give --text-column; {_there(table)}")


def choose(table: Table, settings: DataSettings) -> tuple[str, Columns]:
    """The name of the task and the columns that it reads, found from the table where they are not given."""
    completion = completion_column(table, settings.text_column, settings.completion_column)
    label = label_column(table, settings.label_column) if settings.task != "causal_lm" else None
    task = settings.task
    if task == "auto":
        if completion and label:
            raise UserError(
                f"{table.name} has a completion ({completion}) and a label ({label}); give --task causal_lm to train "
                "on the completions, or --task seq_cls and --text-column"
            )
        task = "seq_cls" if label else "causal_lm"
    if task == "seq_cls":
        return task, _classified(table, settings, label)
    return task, _continued(table, settings, completion)


def _classified(table: Table, settings: DataSettings, label: str | None) -> Columns:
    if settings.completion_column is not None:
        raise UserError("--completion-column is for --task causal_lm; leave it out")
    if label is None:
        raise UserError(f"no column of {table.name} looks like the label; give --label-column; {_there(table)}")
    text = text_column(table, settings.text_column, [label])
    if text == label:
        raise UserError(f"--text-column and --label-column are both {text}; give two columns")
    answers = [column for column in _named(table, ANSWER_NAMES) if column != label]
    if settings.text_column is None and text in _named(table, (PROMPT,)) and answers:
        raise UserError(
            f"{table.name}: the label may be of {text}, or of {text} and {answers[0]} together; write the text of both "
            f"into a column, or give --text-column {text}"
        )
    rows = [number for number, _ in tables.texts_of(table, text)]
    return Columns(text, label, labels.label_names(labels.labels_of(table, label, rows)))


def _continued(table: Table, settings: DataSettings, completion: str | None) -> Columns:
    if settings.label_column is not None:
        raise UserError("--label-column is for --task seq_cls; leave it out")
    text = text_column(table, settings.text_column, [completion])
    if text == completion:
        raise UserError(f"--text-column and --completion-column are both {text}; give two columns")
    if completion is None and settings.text_column is None:
        _refuse_overlooked(table, text, settings.task == "auto")
    return Columns(text, None, [], completion)


def _refuse_overlooked(table: Table, text: str, is_auto: bool) -> None:
    """Raise where a column beside the text seems to be what is to be learnt."""
    if answers := [column for column in _named(table, ANSWER_NAMES) if column != text]:
        raise UserError(
            f"{table.name}: column {answers[0]} seems to follow column {text}; give --completion-column {answers[0]}, "
            f"or --text-column {text} to train on that alone"
        )
    for column in table.columns if is_auto else ():
        values = [str(row.get(column)).strip() for row in table.rows]
        count = len(set(values))
        if column != text and 2 <= count <= _MOST_LABELS and 3 * count <= len(values):
            raise UserError(
                f"{table.name}: column {column} may be the label ({count} values in {len(values):,} rows); give "
                f"--label-column {column}, or --task causal_lm to train on the text alone"
            )
