"""`peftfn eval`: base and base with adapter on the same rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import peftfn as pf
from peftfn.cli import folders, state, tables, tasks
from peftfn.cli.bases import in_base_order, load_base
from peftfn.cli.errors import UserError
from peftfn.cli.evaluation import Score, evaluate
from peftfn.cli.settings import DataSettings, EvalOptions


class Comparison(NamedTuple):
    """The scores of the base and of base and adapter (None without one), on `rows` of `data`."""

    base: Score
    adapter: Score | None
    examples: int
    data: str
    new: list[str]

    def __str__(self) -> str:
        rows = [("", *self.base.named), ("base", *_digits(self.base))]
        if self.adapter is not None:
            rows.append(("with adapter", *_digits(self.adapter)))
        note = f"; the base's {', '.join(self.new)} is new, so random" if self.new else ""
        return f"{folders.table(rows)}\n{self.examples:,} examples of {self.data}{note}"


def _digits(score: Score) -> list[str]:
    return [f"{value:.4f}" for value in score.named.values()]


def _settings(options: EvalOptions, adapter: pf.Adapter | None) -> DataSettings:
    """The options over what the adapter was trained with."""
    run = state.read_run(Path(options.adapter)) if options.adapter else {}
    names = [field.name for field in dataclasses.fields(DataSettings)]
    trained = {name: value for name, value in run.get("settings", {}).items() if name in names}
    columns = run.get("columns", {})
    trained |= {
        "task": run.get("task", "auto"),
        "text_column": columns.get("text"),
        "label_column": columns.get("label"),
    }
    task = adapter.config.task_type if adapter else None
    if not run and task in ("SEQ_CLS", "CAUSAL_LM"):
        trained["task"] = task.lower()
    given = {k: v for k, v in dataclasses.asdict(options).items() if k in names and v is not None}
    chosen: dict[str, Any] = {"model": _model(options, adapter), **trained, **given}
    return DataSettings(**chosen)


def _model(options: EvalOptions, adapter: pf.Adapter | None) -> str:
    if adapter is not None:
        return folders.base_name(adapter, options.model)
    if options.model is None:
        raise UserError("give --model, --adapter, or both")
    return options.model


def _labels(options: EvalOptions, adapter: pf.Adapter | None, settings: DataSettings, found: list[str]) -> list[str]:
    """The label names by id: from the training, the base's config, or the data if the head has as many."""
    revision = adapter.config.revision if adapter else None
    own = in_base_order(settings.model, revision, found)
    if adapter is None:
        return own
    trained = state.read_run(Path(options.adapter or "")).get("columns", {}).get("labels")
    if trained:
        return list(trained)
    rows = len(folders.head_labels(adapter, options.adapter or ""))
    numbers = [str(i) for i in range(rows)]
    for names in (own, numbers):
        if len(names) == rows and set(found) <= set(names):
            return names
    raise UserError(
        f"{options.data} has {len(found)} labels ({', '.join(found[:8])}) and the adapter's head {rows} "
        "without names; give data with all the labels, or labels that are numbers from 0"
    )


def compare(options: EvalOptions) -> Comparison:
    """The base and, where one is given, the base with the adapter, measured on the same examples."""
    adapter = pf.load(options.adapter) if options.adapter else None
    settings = _settings(options, adapter)
    table = tables.read_table(settings.data, settings.split)
    task, columns = tasks.choose(table, settings)
    if task == "seq_cls":
        columns = columns._replace(labels=_labels(options, adapter, settings, columns.labels))
    base = load_base(settings, task, columns.labels, adapter.config.revision if adapter else None)
    settings = dataclasses.replace(settings, max_length=min(settings.max_length, base.longest))
    examples = tasks.TASKS[task].encode(table, columns, base.tokenizer, settings)
    alone = evaluate(base, task, examples, None, settings.batch_size)
    if adapter is None:
        return Comparison(alone, None, len(examples.ids), table.name, base.new)
    # again, now checked against the base and on its device
    adapter = pf.load(str(options.adapter), model=base.model, device=base.model.device)
    return Comparison(
        alone,
        evaluate(base, task, examples, adapter, settings.batch_size),
        len(examples.ids),
        table.name,
        base.new,
    )
