"""`peftfn sweep`: several adapters over one base in one program; `prepare` loads everything, `fit` trains and saves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import optree
import torch
from torch import Tensor

import peftfn as pf
from peftfn.cli import evaluation, folders
from peftfn.cli.bases import load_base, mode
from peftfn.cli.data import batches, tasks
from peftfn.cli.errors import UserError
from peftfn.cli.settings import SweepSettings
from peftfn.cli.sweep import board, grids, sweep_state
from peftfn.cli.sweep.sweep_state import Plan, Progress
from peftfn.cli.train import records, training


def prepare(settings: SweepSettings, config: pf.PeftConfig, values: Mapping[str, Sequence[Any]]) -> Plan:
    """Everything loaded, checked and encoded, and each run's adapter as `peftfn train` would begin it."""
    if isinstance(config, pf.AdaLoraConfig):
        raise UserError(
            "adalora: its ranks are allocated as it trains, for each adapter apart; run peftfn train for each"
        )
    members = grids.members(settings, config, values)
    job = training.prepare(members[0].settings, members[0].config)
    bases = {job.settings.seed: job.base}
    adapters: list[pf.Adapter] = []
    for member in members:
        seed = member.settings.seed
        if seed not in bases and job.base.new:  # a new head is drawn from the run's own seed
            bases[seed] = load_base(member.settings, job.task, job.columns.labels, config.revision)
        base = bases.get(seed, job.base)
        full = training.completed(member.config, base, settings.model, job.task)
        adapters.append(pf.init(base.model, full, generator=torch.Generator().manual_seed(seed)))
    pf.stack(adapters)  # adapters that cannot be one stack are an error now
    return Plan(job, members, adapters)


def describe(plan: Plan) -> str:
    """What is about to be trained, in a few lines."""
    job, count = plan.job, len(plan.members)
    varied = ", ".join(f"--{name.replace('_', '-')}" for name in plan.members[0].changed)
    sweep = f"{count} adapters at once over {varied}, {job.settings.batch_size} examples each"
    return f"{training.describe(job)}\nsweep    {sweep}"


def fit(plan: Plan, say: Callable[[str], None] = print) -> list[pf.Adapter]:
    """The trained adapters, each saved in a folder of its own, with summary.csv and loss.png beside them.

    A run is what `peftfn train` does with its values, but for dropout, of which each adapter draws its own. One that
    stops early, or whose loss is no longer a number, leaves the program, and the others go on as without it. Killed at
    any moment and started again, the sweep ends with the same adapters, bit for bit, as one that was let through.
    """
    job, output = plan.job, Path(plan.job.settings.output)
    now = sweep_state.begin(plan)
    kept = now.step
    if kept:
        say(f"resumed  from step {kept} of {job.total}")
    found = dict(enumerate(plan.adapters)) | sweep_state.saved(plan, now)
    try:
        with (
            warnings.catch_warnings(),
            mode(job.base.model, training=True),
            board.Live(job.total, kept, now.lines) as live,
        ):
            # torch's fused attention has no rule for vmap on the CPU: it runs adapter by adapter
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            for step, chosen in _steps(plan, kept):
                if not now.live:
                    break
                now = _step(plan, now, step, chosen)
                live.show(now.lines)
                now = _without_stopped(plan, now, step, found)
                if now.step % job.settings.save_every == 0 or not now.live:
                    sweep_state.write(plan, now)
                    kept = now.step
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on from step {kept}") from None
    board.write_summary(now.lines, output / board.SUMMARY)
    board.draw(now.lines, output / records.PICTURE)
    say(_closing(now.lines, output))
    return [found[number] for number, line in enumerate(now.lines) if line.state != "diverged"]


def _steps(plan: Plan, start: int) -> Iterator[tuple[int, list[list[list[int]]]]]:
    """Each step's batches, by adapter: the order of the data is that of the adapter's seed."""
    job, lengths = plan.job, [len(ids) for ids in plan.job.examples.ids]
    size, parts = job.settings.batch_size, job.settings.grad_accumulation
    orders = [batches.steps(lengths, size, parts, one.settings.seed, start, job.total) for one in plan.members]
    for found in zip(*orders, strict=True):
        yield found[0][0], [chosen for _, chosen in found]


def _step(plan: Plan, now: Progress, step: int, chosen: list[list[list[int]]]) -> Progress:
    """One optimizer step of every adapter that is still training."""
    settings = [plan.members[number].settings for number in now.live]
    grads, values = _gradients(plan, now, [chosen[number] for number in now.live])
    rates = [batches.learning_rate(step, plan.job.total, one.lr, one.warmup) for one in settings]
    run = pf.sweep.update(
        now.run,
        grads,
        lr=rates,
        weight_decay=[one.weight_decay for one in settings],
        max_norm=[one.max_grad_norm or math.inf for one in settings],
    )
    lines = list(now.lines)
    for number, rate, value in zip(now.live, rates, cast("list[float]", values.tolist()), strict=True):
        record: records.Record = {"step": step + 1, "loss": value, "lr": rate}
        lines[number] = lines[number]._replace(records=[*lines[number].records, record])
    return _measured(plan, now._replace(step=step + 1, run=run, lines=lines), step)


def _gradients(plan: Plan, now: Progress, chosen: list[list[list[int]]]) -> tuple[Any, Tensor]:
    """Gradients and mean losses of one step, over all its parts, weighted as `peftfn train` weights them."""
    job, model = plan.job, plan.job.base.model

    def one_loss(adapter: pf.Adapter, batch: dict[str, Tensor]) -> Tensor:
        return pf.apply(model, adapter, batch).loss

    losses = torch.vmap(one_loss, randomness="different")
    parts = [_batch(plan, [one[part] for one in chosen]) for part in range(len(chosen[0]))]
    weights = torch.stack([_terms(job.task, part) for part in parts])  # (parts, adapters)
    shares = (weights / weights.sum(0)).to(model.device)
    total: Any = None
    values = torch.zeros(len(chosen), device=model.device)
    for part, share in zip(parts, shares, strict=True):

        def weighted(stacked: pf.Adapter, batch: dict[str, Tensor], share: Tensor = share) -> Tensor:
            return losses(stacked, batch) * share

        found = pf.sweep.gradients(now.run.adapter, weighted, part)
        grads, value = cast("Any", found[0]), found[1]
        total = grads if total is None else optree.tree_map(torch.add, total, grads)
        values = values + value
    return total, values


def _batch(plan: Plan, chosen: list[list[int]]) -> dict[str, Tensor]:
    """A batch for each adapter, (adapters, rows, ...); where one has fewer rows, some more that no loss counts."""
    job, most = plan.job, max(map(len, chosen))
    rows = [row for one in chosen for row in (*one, *[one[0]] * (most - len(one)))]
    batch = tasks.suited(
        tasks.TASKS[job.task].batch(job.examples, rows, job.base.pad), job.base.model, plan.adapters[0]
    )
    counted = torch.tensor([number < len(one) for one in chosen for number in range(most)])
    counted = counted.view(-1, *(1 for _ in batch["labels"].shape[1:]))
    batch["labels"] = batch["labels"].where(counted, tasks.IGNORED)
    return {name: t.view(len(chosen), most, *t.shape[1:]).to(job.base.model.device) for name, t in batch.items()}


def _terms(task: str, batch: dict[str, Tensor]) -> Tensor:
    """Over how many terms each adapter's loss is a mean, (adapters,)."""
    labels = batch["labels"] if task == "seq_cls" else batch["labels"][..., 1:]  # no loss is of the first token
    return (labels != tasks.IGNORED).flatten(1).sum(1).double()


def _measured(plan: Plan, now: Progress, step: int) -> Progress:
    """The progress, with scores on held-out data where an epoch or the sweep ends."""
    job = plan.job
    size, parts = job.settings.batch_size, job.settings.grad_accumulation
    ends = (step + 1) % batches.steps_per_epoch(len(job.examples.ids), size, parts) == 0 or step + 1 == job.total
    if job.held_out is None or not ends:
        return now
    scores = evaluation.evaluate_stack(job.base, job.task, job.held_out, now.run.adapter, size)
    lines = list(now.lines)
    for number, score in zip(now.live, scores, strict=True):
        *before, last = lines[number].records
        held_out = {f"eval_{name}": value for name, value in score.named.items()}
        lines[number] = lines[number]._replace(records=[*before, last | held_out])
    return now._replace(lines=lines)


def _without_stopped(plan: Plan, now: Progress, step: int, found: dict[int, pf.Adapter]) -> Progress:
    """The sweep without the adapters that are done, which are saved; `found` gets what they have become."""
    states = {number: _state_of(plan, now.lines[number], step) for number in now.live}
    if all(one == "training" for one in states.values()):
        return now
    lines, members = list(now.lines), pf.unstack(now.run.adapter)
    for number, adapter in zip(now.live, members, strict=True):
        lines[number] = lines[number]._replace(state=states[number])
        if states[number] in ("trained", "stopped"):
            found[number] = adapter
            sweep_state.save_run(plan, number, adapter, lines[number].records)
    left = [place for place, number in enumerate(now.live) if states[number] == "training"]
    run = pf.sweep.keep(now.run, left) if left else now.run
    return Progress(now.step, run, [now.live[place] for place in left], lines)


def _state_of(plan: Plan, line: board.Line, step: int) -> str:
    """The state of a run after this step: training, trained, stopped or diverged."""
    if not math.isfinite(line.records[-1]["loss"]):
        return "diverged"
    if step + 1 == plan.job.total:
        return "trained"
    assert isinstance(plan.job.settings, SweepSettings)
    patience, held_out = plan.job.settings.patience, [one["eval_loss"] for one in line.records if "eval_loss" in one]
    since = len(held_out) - 1 - min(range(len(held_out)), key=held_out.__getitem__, default=0)
    return "stopped" if patience is not None and held_out and since >= patience else "training"


def _closing(lines: Sequence[board.Line], output: Path) -> str:
    """The last message: the table, the best run first, and the paths of what was written."""

    def rank(line: board.Line) -> float:
        row = line.row()
        return math.inf if line.state == "diverged" else float(row.get("eval_loss") or row["loss"])

    table = folders.table(board.rows(sorted(lines, key=rank)))
    return f"{table}\nadapters {output}, a folder each; {board.SUMMARY} and {records.PICTURE} beside them"
