"""What a sweep is and where it stands, in memory and in its folder: one that is killed goes on from there."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

import peftfn as pf
from peftfn.cli.errors import UserError
from peftfn.cli.settings import SweepSettings, differences, fingerprint
from peftfn.cli.sweep import board
from peftfn.cli.sweep.grids import Member
from peftfn.cli.train import records, state, training
from peftfn.core import files, reading

RUNS = "sweep.json"
"""Which folders in --output are a sweep's, so that --replace removes no others, and what the sweep is."""

STATE = "sweep_state.pt"
"""Where the sweep stood at its last checkpoint."""


class Plan(NamedTuple):
    """All that a sweep needs, in memory; `job` is its first run, whose base, data and length all of them share."""

    job: training.Job
    members: list[Member]
    adapters: list[pf.Adapter]


class Progress(NamedTuple):
    """Where a sweep stands.

    Attributes:
        step: how many steps are done.
        run: the adapters that still train.
        live: their numbers.
        lines: what all of them have done.
    """

    step: int
    run: pf.sweep.Run
    live: list[int]
    lines: list[board.Line]


def fresh(plan: Plan) -> Progress:
    """A sweep before its first step."""
    lines = [board.Line(member.name, member.changed, "training", []) for member in plan.members]
    return Progress(0, pf.sweep.begin(plan.adapters), list(range(len(lines))), lines)


def begin(plan: Plan) -> Progress:
    """The progress to go on from: of the same sweep in the output folder, or a fresh one in a folder that is free.

    torch's random state becomes that of the checkpoint, or one of the first run's seed.

    Raises:
        UserError: another sweep is there, or folders that are no sweep's.
    """
    job = plan.job
    assert isinstance(job.settings, SweepSettings)
    output = Path(job.settings.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a folder")
    torch.manual_seed(job.settings.seed)
    marks = [_marks(plan, member, adapter) for member, adapter in zip(plan.members, plan.adapters, strict=True)]
    if (output / RUNS).is_file():
        written = reading.read_json(output / RUNS)
        if not job.settings.replace:
            _refuse_other(output, written, plan, marks)
            if (output / STATE).is_file():
                return _read(plan, output)
        _remove(output, written)
    elif taken := [member.name for member in plan.members if (output / member.name).exists()]:
        raise UserError(f"--output {output} has {taken[0]} already, which is no sweep's; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"runs": [member.name for member in plan.members], "fingerprints": marks}, indent=2) + "\n"
    files.write_atomic(output / RUNS, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return fresh(plan)


def _marks(plan: Plan, member: Member, adapter: pf.Adapter) -> dict[str, Any]:
    job = plan.job
    settings = dataclasses.replace(member.settings, max_length=job.settings.max_length, replace=False)
    data = job.examples.digest()
    if job.held_out is not None and settings.patience is not None:  # which decides when an adapter stops
        data += job.held_out.digest()
    return fingerprint(settings, adapter.config, data)


def _refuse_other(output: Path, written: dict[str, Any], plan: Plan, marks: list[dict[str, Any]]) -> None:
    """Raise where the sweep in the folder is not the planned one."""
    found: list[str] = []
    old: list[dict[str, Any]] = written.get("fingerprints", [])
    if written.get("runs") != [member.name for member in plan.members] or len(old) != len(marks):
        found = ["other runs"]
    for before, now in zip(old, marks, strict=False):
        found = found or differences(before, now)
    if found:
        raise UserError(
            f"--output {output} holds another sweep ({'; '.join(found[:4])}); give another --output, or --replace"
        )


def _remove(output: Path, written: dict[str, Any]) -> None:
    """Remove what an earlier sweep left there, and nothing else."""
    for name in written["runs"]:
        shutil.rmtree(output / Path(name).name, ignore_errors=True)
    for name in (STATE, board.SUMMARY, records.PICTURE):
        (output / name).unlink(missing_ok=True)


def write(plan: Plan, now: Progress) -> None:
    """Write where the sweep stands; a kill at any moment leaves the last checkpoint or this one."""
    rest: dict[str, Any] = {
        "step": now.step,
        "live": now.live,
        "lines": [(line.state, list(line.records)) for line in now.lines],
        "rng": state.rng_state(plan.job.base.model.device),
        "params": now.run.adapter.params if now.live else {},
        "optimizer": now.run.state._asdict() if now.live else {},
    }
    path = Path(plan.job.settings.output) / STATE
    files.write_atomic(path, lambda temporary: state.save(rest, temporary))


def _read(plan: Plan, output: Path) -> Progress:
    begun, device = fresh(plan), plan.job.base.model.device
    try:
        # weights_only: tensors and plain containers, no code
        rest = torch.load(output / STATE, weights_only=True, map_location="cpu")
        live: list[int] = rest["live"]
        run = pf.sweep.keep(begun.run, live) if live else begun.run
        if live:
            params = state.like(rest["params"], run.adapter.params, device)
            made = {name: _like(tree, getattr(run.state, name), device) for name, tree in rest["optimizer"].items()}
            run = pf.sweep.Run(run.adapter.replace(params=params), type(run.state)(**made))
        done = zip(begun.lines, rest["lines"], strict=True)
        lines = [line._replace(state=name, records=kept) for line, (name, kept) in done]
        state.set_rng_state(rest["rng"], device)
        return Progress(int(rest["step"]), run, live, lines)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{output / STATE} cannot be read ({error}); start over with --replace") from error


def _like(found: Any, fresh: Any, device: torch.device) -> Any:
    if isinstance(fresh, dict):
        return state.like(found, fresh, device)
    return cast("torch.Tensor", found).to(device)


def save_run(plan: Plan, number: int, adapter: pf.Adapter, record: Sequence[records.Record]) -> None:
    """Write one run's folder, as `peftfn train` leaves it."""
    job, member = plan.job, plan.members[number]
    folder = Path(job.settings.output) / member.name
    pf.save(adapter, folder)
    settings = dataclasses.replace(member.settings, output=str(folder), max_length=job.settings.max_length)
    run = {
        "fingerprint": fingerprint(settings, adapter.config, job.examples.digest()),
        "settings": dataclasses.asdict(settings),
        "task": job.task,
        "columns": job.columns._asdict(),
        "parameters": pf.count(adapter, job.base.model).total,
    }
    state.write_run(folder, run)
    text = "".join(json.dumps(one) + "\n" for one in record)
    files.write_atomic(folder / records.METRICS, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def saved(plan: Plan, now: Progress) -> dict[int, pf.Adapter]:
    """The adapters that are done, from their folders, by number."""
    output, device = Path(plan.job.settings.output), plan.job.base.model.device
    done = [number for number, line in enumerate(now.lines) if line.state in ("trained", "stopped")]
    return {number: pf.load(output / plan.members[number].name, device=device) for number in done}
