"""Checkpoints that a killed run goes on from: adapter, optimizer and random state, written atomically."""

from __future__ import annotations

import json
import pickle
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

import peftfn as pf
from peftfn.cli.errors import UserError
from peftfn.core import files, reading

FOLDER = "checkpoint"
"""Checkpoints are `checkpoint/step-00000100`; at most one is kept."""

STATE = "training_state.pt"


class State(NamedTuple):
    """Where a run stands after `step` optimizer steps; `ranks` is AdaLoRA's state of allocation, of others None."""

    step: int
    adapter: pf.Adapter
    optimizer: dict[str, Any]
    rng: dict[str, torch.Tensor]
    ranks: pf.adalora.State | None = None


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's random state (dropout draws from it), of the CPU and of the GPU where one is used."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def write(output: Path, state: State) -> None:
    """Add a checkpoint and remove the older ones; a kill at any moment leaves one that is whole."""
    folder = output / FOLDER
    final = folder / f"step-{state.step:08d}"
    if final.exists():  # the last step, when it is also one of --save-every
        return
    temporary = folder / f"writing-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        pf.save(state.adapter, temporary)
        # As they are trained: an adapter's files have the ranks that are left, and not those that may come back.
        rest: dict[str, Any] = {"step": state.step, "optimizer": state.optimizer, "rng": state.rng}
        rest |= _detached({"params": state.adapter.params, "buffers": state.adapter.buffers})
        rest["ranks"] = tuple(state.ranks) if state.ranks is not None else None
        files.write_atomic(temporary / STATE, lambda path: save(rest, path))
        temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_all_but(folder, final)


def save(rest: dict[str, Any], path: Path) -> None:
    """Write tensors and plain containers; a full disk is an error of the system's."""
    with path.open("wb") as file:  # given a path, torch loses what the system said
        torch.save(rest, file)


def _detached(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _detached(cast("dict[str, Any]", value)) if isinstance(value, dict) else value.detach()
        for name, value in tree.items()
    }


def _remove_all_but(folder: Path, kept: Path) -> None:
    for path in folder.iterdir():
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)


def newest(output: Path) -> Path | None:
    """The newest whole checkpoint in `output`, or None; a half-written one has another name."""
    return max((output / FOLDER).glob("step-*"), default=None)


def read(checkpoint: Path, fresh: pf.Adapter, device: torch.device) -> State:
    """The state in a checkpoint, on `device`; `fresh` is the run's adapter as it began."""
    try:
        # weights_only: tensors and plain containers, no code
        rest = torch.load(checkpoint / STATE, weights_only=True, map_location="cpu")
        trees = {name: like(rest[name], getattr(fresh, name), device) for name in ("params", "buffers")}
        ranks = rest["ranks"] and pf.adalora.State(*(like(tree, tree, device) for tree in rest["ranks"]))
        return State(int(rest["step"]), fresh.replace(**trees), rest["optimizer"], rest["rng"], ranks)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint {checkpoint} cannot be read ({error}); start over with --no-resume") from error


def like(found: Any, fresh: Any, device: torch.device) -> Any:
    """The tensors that were saved, on `device`, with the names and shapes of the fresh ones."""
    shapes = [{path: {n: t.shape for n, t in leaf.items()} for path, leaf in tree.items()} for tree in (found, fresh)]
    if shapes[0] != shapes[1]:
        raise ValueError("its tensors are not those of this run")
    return {path: {name: tensor.to(device) for name, tensor in leaf.items()} for path, leaf in found.items()}


def remove(output: Path) -> None:
    """Remove what an earlier run left in `output`, and nothing else there."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    for name in (files.RUN, files.CONFIG, files.WEIGHTS, "metrics.jsonl", "loss.png"):
        (output / name).unlink(missing_ok=True)


def write_run(output: Path, run: dict[str, Any]) -> None:
    """Write what the run is."""
    text = json.dumps(run, indent=2, sort_keys=True) + "\n"
    files.write_atomic(output / files.RUN, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_run(folder: Path) -> dict[str, Any]:
    """What `write_run` wrote, or an empty dict where the adapter does not come from `peftfn train`."""
    path = folder / files.RUN
    return reading.read_json(path) if path.is_file() else {}
