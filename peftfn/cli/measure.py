"""`peftfn eval`: base and base with adapter on the same rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import peftfn as pf
from peftfn.cli import folders
from peftfn.cli.bases import Base, in_base_order, load_base
from peftfn.cli.data import data_summary, routed, tables, tasks
from peftfn.cli.data.columns import Columns, choose
from peftfn.cli.errors import UserError
from peftfn.cli.evaluation import Score, evaluate
from peftfn.cli.settings import DataSettings, EvalOptions
from peftfn.cli.train import state


class Comparison(NamedTuple):
    """The scores of the base and of base and adapter (None without one), and on what rows."""

    base: Score
    adapter: Score | None
    examples: int
    data: str
    new: list[str]
    about: str = ""

    def __str__(self) -> str:
        rows = [("", *self.base.named), ("base", *_digits(self.base))]
        if self.adapter is not None:
            rows.append(("with adapter", *_digits(self.adapter)))
        note = f"; the base's {', '.join(self.new)} is new, so random" if self.new else ""
        return f"{self.about}{folders.table(rows)}\n{self.examples:,} examples of {self.data}{note}"


def _digits(score: Score) -> list[str]:
    return [f"{value:.4f}" for value in score.named.values()]


def _settings(options: EvalOptions, adapter: pf.Adapter | None) -> DataSettings:
    """The options over what the adapter was trained with."""
    run = state.read_run(Path(options.adapter)) if options.adapter else {}
    names = [field.name for field in dataclasses.fields(DataSettings)]
    trained = {name: value for name, value in run.get("settings", {}).items() if name in names}
    columns: dict[str, Any] = run.get("columns", {}) if options.task in (None, "auto", run.get("task")) else {}
    trained |= {
        "task": run.get("task", "auto"),
        "text_column": columns.get("text"),
        "label_column": columns.get("label"),
        "completion_column": columns.get("completion"),
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
    """The base and, where they are given, the base with one adapter or with each row's own, on the same examples."""
    if options.adapter_column is not None or options.adapters:
        return _compare_rows(options)
    adapter = pf.load(options.adapter) if options.adapter else None
    settings = _settings(options, adapter)
    table = tables.read_table(settings.data, settings.split)
    base, settings, task, columns = _prepared(options, adapter, settings, table)
    examples = tasks.TASKS[task].encode(table, columns, base.tokenizer, settings)
    about = data_summary.about("data", table, columns, examples, settings) + "\n"
    alone = evaluate(base, task, examples, None, settings.batch_size)
    if adapter is None:
        return Comparison(alone, None, len(examples.ids), table.name, base.new, about)
    # again, now checked against the base and on its device
    adapter = pf.load(str(options.adapter), model=base.model, device=base.model.device)
    return Comparison(
        alone,
        evaluate(base, task, examples, adapter, settings.batch_size),
        len(examples.ids),
        table.name,
        base.new,
        about,
    )


def _compare_rows(options: EvalOptions) -> Comparison:
    """The base, and the base with the adapter that each row names; the first one's training says how rows are read."""
    if options.adapter is not None:
        raise UserError("--adapter is one adapter for all rows; leave it out, or --adapter-column and --adapters")
    table = tables.read_table(options.data, options.split)
    found = routed.chosen(table, options.adapter_column, options.adapters)
    options = dataclasses.replace(options, adapter=found.folders[0], model=routed.base_of(found, options.model))
    adapter = pf.load(found.folders[0])
    settings = _settings(options, adapter)
    base, settings, task, columns = _prepared(options, adapter, settings, table)
    for name, folder in zip(found.names, found.folders, strict=True):
        own = state.read_run(Path(folder)).get("columns", {}).get("labels")
        if own and list(own) != columns.labels:
            raise UserError(f"{name} was trained with the labels {own}, {found.names[0]} with {columns.labels}")
    encode = tasks.TASKS[task].encode
    parts = {n: encode(t, columns, base.tokenizer, settings) for n, t in routed.tables_of(table, found).items()}
    examples, index = tasks.joined(parts)
    stacked = routed.stacked(found, base.model)
    alone, adapted = (
        evaluate(base, task, examples, one, settings.batch_size, own) for one, own in ((None, None), (stacked, index))
    )
    about = data_summary.about("data", table, columns, examples, settings) + "\n"
    return Comparison(alone, adapted, len(examples.ids), table.name, base.new, about)


def _prepared(
    options: EvalOptions, adapter: pf.Adapter | None, settings: DataSettings, table: tables.Table
) -> tuple[Base, DataSettings, str, Columns]:
    """The base, the settings that it allows, the task and the columns."""
    task, columns = choose(table, settings)
    if task == "seq_cls":
        columns = columns._replace(labels=_labels(options, adapter, settings, columns.labels))
    base = load_base(settings, task, columns.labels, adapter.config.revision if adapter else None)
    return base, dataclasses.replace(settings, max_length=min(settings.max_length, base.longest)), task, columns
