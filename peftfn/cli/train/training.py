"""The training loop: `prepare` loads everything and writes nothing, `fit` trains, saves and resumes."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import peftfn as pf
from peftfn.cli.bases import Base, in_base_order, load_base, mode
from peftfn.cli.data import batches, data_summary, labels, tables, tasks
from peftfn.cli.data.columns import Columns, choose
from peftfn.cli.errors import UserError, need
from peftfn.cli.evaluation import evaluate
from peftfn.cli.settings import TrainSettings, differences, fingerprint
from peftfn.cli.train import progress, ranks, records, state
from peftfn.core import files
from peftfn.models import matching


class Job(NamedTuple):
    """All that a run needs, in memory; the output folder has not been touched. `data` says what was read."""

    settings: TrainSettings
    base: Base
    task: str
    columns: Columns
    examples: tasks.Examples
    held_out: tasks.Examples | None
    adapter: pf.Adapter
    data: str

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return _total(self.settings, self.examples)


def _total(s: TrainSettings, examples: tasks.Examples) -> int:
    per_epoch = batches.steps_per_epoch(len(examples.ids), s.batch_size, s.grad_accumulation)
    return s.max_steps or max(1, round(s.epochs * per_epoch))


def prepare(
    settings: TrainSettings,
    config: pf.PeftConfig,
    table: tables.Table | None = None,
    held_out: tables.Table | None = None,
) -> Job:
    """Everything loaded, checked and encoded; `table` and `held_out` stand in for the settings' files."""
    _refuse_ranks()
    for module in ("tqdm", "matplotlib"):
        need(module)  # a missing one is an error now, not after the training
    table = table or tables.read_table(settings.data, settings.split)
    if held_out is None and settings.eval_data is not None:
        held_out = tables.read_table(settings.eval_data, settings.eval_split)
    task, columns = choose(table, settings)
    _refuse_labels(table, columns)
    columns = columns._replace(labels=in_base_order(settings.model, config.revision, columns.labels))
    base = load_base(settings, task, columns.labels, config.revision)
    settings = dataclasses.replace(settings, max_length=min(settings.max_length, base.longest))
    named = {"data": table} | ({"held out": held_out} if held_out else {})
    read = {name: tasks.TASKS[task].encode(one, columns, base.tokenizer, settings) for name, one in named.items()}
    data = "\n".join(data_summary.about(name, named[name], columns, read[name], settings) for name in named)
    config = completed(config, base, settings.model, task)
    config = ranks.with_steps(config, _total(settings, read["data"]))
    adapter = pf.init(base.model, config, generator=torch.Generator().manual_seed(settings.seed))
    return Job(settings, base, task, columns, read["data"], read.get("held out"), adapter, data)


def _refuse_ranks() -> None:
    """Raise in one of several processes: all of them would write the same folder."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        raise UserError(
            f"started as one of {count} processes (WORLD_SIZE), and this command trains in one; start it without "
            "torchrun or with --nproc-per-node 1, or train peftfn.bind(model, adapter) with transformers' Trainer"
        )


def _refuse_labels(table: tables.Table, columns: Columns) -> None:
    """Raise where nothing can be learnt of the labels."""
    if columns.label is None:
        return
    if len(columns.labels) == 1:
        raise UserError(f"{table.name}: every row is labelled {columns.labels[0]!r}; two different labels are needed")
    rows = [number for number, _ in tables.texts_of(table, columns.text)]
    labels.refuse_texts(f"{table.name}, column {columns.label}", labels.labels_of(table, columns.label, rows))


def completed(config: pf.PeftConfig, base: Base, name: str, task: str) -> pf.PeftConfig:
    """The config with what the command knows: base, task, and modules that are new and so must be trained."""
    known: dict[str, Any] = {"task_type": task.upper(), "base_model_name_or_path": name}
    if "modules_to_save" not in {field.name for field in dataclasses.fields(config)}:
        if base.new:
            raise UserError(
                f"{', '.join(base.new)}: --model {name} lacks these weights, and {config.peft_type} trains no whole "
                "modules; give a model that has them, or another --method"
            )
        return dataclasses.replace(config, **known)
    given: Sequence[str] = getattr(config, "modules_to_save", None) or ()
    covered = {*given, *matching.HEADS.get(task.upper(), ())}
    # a weight that is in neither the base's folder nor the adapter's could not be had again
    new = [module for module in base.new if not covered & set(module.split("."))]
    known["modules_to_save"] = [*given, *new] or None
    return dataclasses.replace(config, **known)


def describe(job: Job) -> str:
    """What is about to be trained, on what."""
    settings, config, model = job.settings, job.adapter.config, job.base.model
    new = f"; new, trained whole: {', '.join(job.base.new)}" if job.base.new else ""
    each = settings.batch_size * settings.grad_accumulation
    lines = (
        f"base     {settings.model} ({type(model).__name__}, frozen{new})",
        job.data,
        f"adapter  {config.peft_type} at {len(job.adapter.params)} sites; {pf.count(job.adapter, model)}",
        f"run      {job.total:,} steps of {each} examples on {model.device}",
    )
    return "\n".join(lines)


def _begin(job: Job, output: Path) -> state.State:
    """The state to go on from: the output folder's checkpoint if it is of this run, else step 0."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    marks = fingerprint(job.settings, job.adapter.config, job.examples.digest())
    checkpoint = state.newest(output) if job.settings.resume else None
    if checkpoint is not None:
        if changed := differences(state.read_run(output).get("fingerprint", {}), marks):
            raise UserError(
                f"--output {output} holds another run ({'; '.join(changed[:4])}); give another --output, or "
                "--no-resume to replace it"
            )
        return state.read(checkpoint, job.adapter, job.base.model.device)
    if job.settings.resume and any((output / name).exists() for name in (files.WEIGHTS, files.PICKLE)):
        raise UserError(
            f"--output {output} holds an adapter already; give another --output, or --no-resume to replace it"
        )
    state.remove(output)
    total = pf.count(job.adapter, job.base.model).total
    state.write_run(
        output,
        {
            "fingerprint": marks,
            "settings": dataclasses.asdict(job.settings),
            "task": job.task,
            "columns": job.columns._asdict(),
            "parameters": total,
        },
    )
    torch.manual_seed(job.settings.seed)
    return state.State(0, job.adapter, {}, state.rng_state(job.base.model.device), ranks.begun(job.adapter))


def _backward(job: Job, adapter: pf.Adapter, chosen: list[list[int]]) -> tuple[float, int]:
    """Mean loss of one optimizer step, and over how many terms; gradients are added to the leaves."""
    how, model = tasks.TASKS[job.task], job.base.model
    parts = [tasks.suited(how.batch(job.examples, one, job.base.pad), model, adapter) for one in chosen]
    weights = [how.weight(part) for part in parts]
    value = 0.0
    for part, weight in zip(parts, weights, strict=True):
        on_device = {name: tensor.to(model.device) for name, tensor in part.items()}
        # weighted, so that the gradient is the mean over all terms however they fall into batches
        loss = pf.apply(model, adapter, on_device).loss * (weight / sum(weights))
        loss.backward()
        value += loss.item()
    ranks.pull(adapter)
    return value, sum(weights)


def _update(job: Job, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Change the leaves by their gradients; the learning rate that was used."""
    settings = job.settings
    rate = batches.learning_rate(step, job.total, settings.lr, settings.warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if settings.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm)
    optimizer.step()
    return rate


def fit(job: Job, say: Callable[[str], None] = print) -> pf.Adapter:
    """The trained adapter, written to the output folder with metrics.jsonl, loss.png and checkpoints.

    Killed at any moment and started again, it ends with the same leaves, bit for bit, as a run that was let
    through: the data's order and the learning rate are functions of the step, and the rest is in the checkpoint.
    """
    output, model = Path(job.settings.output), job.base.model
    begun = _begin(job, output)
    if begun.step:
        say(f"resumed  from step {begun.step} of {job.total}")
    metrics = records.keep_until(output / records.METRICS, begun.step) if begun.step else []
    adapter, left = begun.adapter, begun.ranks
    optimizer = torch.optim.AdamW(pf.leaves(adapter), lr=job.settings.lr, weight_decay=job.settings.weight_decay)
    if begun.optimizer:
        optimizer.load_state_dict(begun.optimizer)
    state.set_rng_state(begun.rng, model.device)
    saved = begun.step
    try:
        with mode(model, training=True), progress.bar(job.total, begun.step) as bar:
            watch = progress.Watch()
            for step, chosen in _steps(job, begun.step):
                record = _one_step(job, adapter, optimizer, step, chosen, watch)
                left, adapter = ranks.allocated(left, adapter, step + 1)
                optimizer.zero_grad(set_to_none=True)
                record |= _held_out(job, adapter, step)
                records.append(output / records.METRICS, record)
                metrics.append(record)
                progress.show(bar, tasks.TASKS[job.task].unit, metrics)
                if (step + 1) % job.settings.save_every == 0 or step + 1 == job.total:
                    now = state.State(step + 1, adapter, optimizer.state_dict(), state.rng_state(model.device), left)
                    state.write(output, now)
                    saved = step + 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on from step {saved}") from None
    pf.save(adapter, output)
    records.draw(metrics, output / records.PICTURE)
    say(f"adapter  {output / files.WEIGHTS}, {files.CONFIG} beside it")
    say(f"picture  {output / records.PICTURE}, the same numbers in {records.METRICS}")
    if held_out := [f"{k.removeprefix('eval_')} {v:.4f}" for k, v in metrics[-1].items() if k.startswith("eval_")]:
        say(f"held out {', '.join(held_out)}")
    return adapter


def _steps(job: Job, start: int) -> Iterator[tuple[int, list[list[int]]]]:
    s, lengths = job.settings, [len(ids) for ids in job.examples.ids]
    return batches.steps(lengths, s.batch_size, s.grad_accumulation, s.seed, start, job.total)


def _one_step(
    job: Job,
    adapter: pf.Adapter,
    optimizer: torch.optim.Optimizer,
    step: int,
    chosen: list[list[int]],
    watch: progress.Watch,
) -> records.Record:
    """One optimizer step and its record."""
    started = time.perf_counter()
    loss, terms = _backward(job, adapter, chosen)
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step + 1}; try a lower --lr or --dtype float32")
    rate = _update(job, optimizer, step)
    how, settings = tasks.TASKS[job.task], job.settings
    per_epoch = batches.steps_per_epoch(len(job.examples.ids), settings.batch_size, settings.grad_accumulation)
    speed = watch.add(terms, time.perf_counter() - started)
    record = {"step": step + 1, "epoch": round((step + 1) / per_epoch, 4), "loss": loss, "lr": rate}
    record[f"{how.unit}_per_second"] = round(speed, 2)
    return record


def _held_out(job: Job, adapter: pf.Adapter, step: int) -> records.Record:
    """The score on held-out data where an epoch or the run ends, and how many ranks AdaLoRA has left."""
    settings, record = job.settings, records.Record()
    if isinstance(adapter.config, pf.AdaLoraConfig):
        record["ranks"] = sum(pf.adalora.ranks(adapter).values())
    per_epoch = batches.steps_per_epoch(len(job.examples.ids), settings.batch_size, settings.grad_accumulation)
    if job.held_out is not None and ((step + 1) % per_epoch == 0 or step + 1 == job.total):
        score = evaluate(job.base, job.task, job.held_out, adapter, settings.batch_size)
        record |= {f"eval_{name}": value for name, value in score.named.items()}
    return record
