"""`peftfn sweep`: several adapters in one program, and what `peftfn train` makes of each one's options."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small
from cli_folders import call
from same import assert_same

from peftfn.cli.errors import UserError
from peftfn.cli.settings import SweepSettings
from peftfn.cli.sweep import grids, sweeping
from peftfn.cli.train import records, training

CONFIG = pf.LoraConfig(r=2, target_modules=["query", "value"])
# AdamW divides a gradient by its own size: where that is small, rounding of another kernel becomes a share of a step. A
# tenth of the largest learning rate here, while numbers move by more than ten of them.
ROUNDING = 2e-3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, in which nothing is dropped, and data."""
    folder = tmp_path_factory.mktemp("sweep")
    small.llama(folder / "llama")
    config = small.bert(folder / "bert") / "config.json"
    given = json.loads(config.read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(given))
    small.write_csv(folder / "train.csv", small.rows(45))
    small.write_csv(folder / "test.csv", small.rows(24, seed=2))
    small.write_jsonl(folder / "texts.jsonl", small.rows(21))
    return folder


@pytest.fixture
def settings(place: Path, tmp_path: Path) -> SweepSettings:
    return SweepSettings(
        model=str(place / "bert"), data=str(place / "train.csv"), output=str(tmp_path / "out"),
        batch_size=8, epochs=2, lr=1e-2, device="cpu", threads=1,
    )  # fmt: skip


def sweep(settings: SweepSettings, values: dict[str, list[Any]], config: pf.PeftConfig = CONFIG) -> list[pf.Adapter]:
    return sweeping.fit(sweeping.prepare(settings, config, values), lambda _: None)


def assert_close(one: pf.Adapter, other: pf.Adapter) -> None:
    assert one.config == other.config
    for path, leaf in other.params.items():
        for name, tensor in leaf.items():
            torch.testing.assert_close(one.params[path][name], tensor.detach(), rtol=ROUNDING, atol=ROUNDING)


def as_trained(member: grids.Member, folder: Path) -> pf.Adapter:
    """What `peftfn train` makes of one member's options."""
    alone = dataclasses.replace(member.settings, output=str(folder))
    return training.fit(training.prepare(alone, member.config), lambda _: None)


@pytest.mark.parametrize("task", ["seq_cls", "causal_lm"])
def test_each_adapter_is_what_train_makes_of_its_options(
    settings: SweepSettings, place: Path, tmp_path: Path, task: str
) -> None:
    values: dict[str, list[Any]] = {"lr": [3e-3, 2e-2], "r": [1, 4], "seed": [0, 5], "max_grad_norm": [0.0, 0.5]}
    config = CONFIG
    settings = dataclasses.replace(settings, combine="zip", grad_accumulation=2, weight_decay=0.1)
    if task == "causal_lm":
        settings = dataclasses.replace(
            settings,
            model=str(place / "llama"),
            data=str(place / "texts.jsonl"),
            task="causal_lm",
            long_text="truncate",
        )
        config = pf.LoraConfig(r=2, target_modules="all-linear")
    made = sweep(settings, values, config)
    members = grids.members(settings, config, values)
    assert [one.name for one in members] == ["0-lr=0.003-r=1-seed=0-max_grad_norm=0", "1-lr=0.02-r=4-seed=5-max_grad_norm=0.5"]  # fmt: skip  # noqa: E501
    for number, member in enumerate(members):
        assert_close(made[number], as_trained(member, tmp_path / f"alone-{number}"))
        assert_same(pf.load(Path(settings.output) / member.name), made[number])


def test_prompts_are_swept_too(settings: SweepSettings, place: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        settings, model=str(place / "llama"), data=str(place / "texts.jsonl"), task="causal_lm"
    )
    config = pf.PromptTuningConfig(num_virtual_tokens=3)
    made = sweep(settings, {"lr": [1e-2, 5e-2], "seed": [0, 1]}, config)
    assert len(made) == 4
    for number, member in enumerate(grids.members(settings, config, {"lr": [1e-2, 5e-2], "seed": [0, 1]})):
        assert_close(made[number], as_trained(member, tmp_path / f"alone-{number}"))


def test_the_command_leaves_folders_a_table_and_a_picture(place: Path, tmp_path: Path) -> None:
    options = ("--model", place / "bert", "--data", place / "train.csv", "--eval-data", place / "test.csv", "--output", tmp_path)  # fmt: skip  # noqa: E501
    options = (*options, "--target-modules", "query,value", "--batch-size", 8, "--epochs", 1, "--threads", 1)
    printed = call("sweep", *options, "--lr", "1e-3,1e-2", "--r", 2, "--r", 4)
    assert "4 adapters at once over --lr, --r" in printed
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["lr"], row["r"], row["state"], row["step"]) for row in rows] == [
        *(("0.001", "2", "trained", "6"), ("0.001", "4", "trained", "6")),
        *(("0.01", "2", "trained", "6"), ("0.01", "4", "trained", "6")),
    ]
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for row in rows:
        measured = call("eval", "--adapter", tmp_path / row["run"], "--data", place / "test.csv", "--threads", 1)
        loss, accuracy = measured.split("with adapter")[1].split()[:2]
        assert float(loss) == pytest.approx(float(row["eval_loss"]), abs=2e-4)  # four decimals are shown
        assert accuracy == row["eval_accuracy"]
    assert "holds another sweep (other runs)" in call("sweep", *options, "--lr", "1e-3,1e-2", code=2)
    call("sweep", *options, "--lr", "1e-3,1e-2", "--replace")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0-lr=0.001", "1-lr=0.01"]


def test_an_adapter_stops_when_its_held_out_loss_has_not_fallen_and_is_saved_as_it_was(
    settings: SweepSettings, place: Path
) -> None:
    held_out = dataclasses.replace(settings, eval_data=str(place / "test.csv"), epochs=6)
    values = {"lr": [1e-3, 0.5]}
    sweep(held_out, values)
    stopping = dataclasses.replace(held_out, output=settings.output + "-2", patience=1)
    made = sweep(stopping, values)
    with (Path(stopping.output) / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert "stopped" in [row["state"] for row in rows]
    for number, row in enumerate(rows):
        whole, found = (
            [json.loads(line) for line in (Path(output) / row["run"] / "metrics.jsonl").read_text().splitlines()]
            for output in (held_out.output, stopping.output)
        )
        measured = [one for one in whole if "eval_loss" in one]
        rises = [now for before, now in itertools.pairwise(measured) if now["eval_loss"] >= before["eval_loss"]]
        last = (rises[0] if rises else whole[-1])["step"]
        assert (row["state"], int(row["step"])) == ("stopped" if last < 36 else "trained", last)
        assert [one["step"] for one in found] == list(range(1, last + 1))
        for one, other in zip(found, whole, strict=False):
            assert one["loss"] == pytest.approx(other["loss"], abs=ROUNDING)
        assert_same(pf.load(Path(stopping.output) / row["run"]), made[number])


@pytest.mark.parametrize("stopped_in", [3, 8, 13])
def test_a_sweep_that_is_stopped_goes_on_to_the_same_bits(
    settings: SweepSettings, place: Path, tmp_path: Path, stopped_in: int
) -> None:
    # dropout, so that the random state counts; one run diverges and one loses patience, so that the stack shrinks
    config = dataclasses.replace(CONFIG, lora_dropout=0.2)
    values: dict[str, list[Any]] = {"lr": [1e-3, 1e30, 0.5], "r": [2, 1, 4]}
    settings = dataclasses.replace(
        settings, combine="zip", eval_data=str(place / "test.csv"), patience=1, epochs=3, save_every=5
    )
    whole = sweep(settings, values, config)
    other = dataclasses.replace(settings, output=str(tmp_path / "stopped"))
    plan, calls = sweeping.prepare(other, config, values), 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += plan.job.base.model.training
        if calls == stopped_in:
            raise KeyboardInterrupt

    hook = plan.job.base.model.register_forward_pre_hook(stop)
    last = (stopped_in - 1) // 5 * 5
    with pytest.raises(KeyboardInterrupt, match=f"the same command goes on from step {last}"):
        sweeping.fit(plan, lambda _: None)
    hook.remove()
    with pytest.raises(UserError, match=r"holds another sweep \(weight_decay: 0.0, now 0.1\); give another --output"):
        sweep(dataclasses.replace(other, weight_decay=0.1), values, config)
    said: list[str] = []
    resumed = sweeping.fit(sweeping.prepare(other, config, values), said.append)
    assert said[0].startswith(f"resumed  from step {last} of 18") or not last
    for _ in range(2):  # again when it is done, which changes nothing
        assert len(resumed) == len(whole) == 2
        for one, expected in zip(resumed, whole, strict=True):
            assert_same(one, expected)
        for name in ("summary.csv", "0-lr=0.001-r=2/metrics.jsonl", "2-lr=0.5-r=4/metrics.jsonl"):
            assert (Path(other.output) / name).read_bytes() == (Path(settings.output) / name).read_bytes()
        assert not (Path(other.output) / "1-lr=1e+30-r=1").exists()
        resumed = sweep(other, values, config)


def test_a_picture_of_losses_far_from_0_does_not_begin_there() -> None:
    assert records.bottom([2.9, 2.8, float("nan"), 2.7]) is None
    assert records.bottom([2.9, 0.2]) == 0
    assert records.bottom([float("nan")]) is None


def test_an_adapter_that_diverges_is_not_saved_and_harms_no_other(settings: SweepSettings) -> None:
    made = sweep(settings, {"lr": [1e-2, 1e30]})
    alone = sweep(dataclasses.replace(settings, output=settings.output + "-2"), {"lr": [1e-2, 2e-2]})
    assert len(made) == 1
    assert_close(made[0], alone[0])
    assert not (Path(settings.output) / "1-lr=1e+30").exists()
    assert ",diverged," in (Path(settings.output) / "summary.csv").read_text()


def test_what_cannot_be_swept_is_one_sentence(settings: SweepSettings, place: Path) -> None:
    with pytest.raises(UserError, match="needs an option with several values"):
        sweeping.prepare(settings, CONFIG, {"lr": [1e-3]})
    with pytest.raises(UserError, match="zip needs as many values of each option; given: --lr 2, --r 3"):
        sweeping.prepare(dataclasses.replace(settings, combine="zip"), CONFIG, {"lr": [1e-3, 2e-3], "r": [1, 2, 4]})
    with pytest.raises(UserError, match="adalora: its ranks are allocated as it trains"):
        sweeping.prepare(settings, pf.AdaLoraConfig(), {"lr": [1e-3, 2e-3]})
    with pytest.raises(ValueError, match="adapters with lora_dropout of"):
        sweeping.prepare(settings, CONFIG, {"lora_dropout": [0.0, 0.1]})
    with pytest.raises(UserError, match="--patience 2 watches the held-out loss; give --eval-data"):
        dataclasses.replace(settings, patience=2)
    options = ("sweep", "--model", place / "bert", "--data", place / "train.csv", "--output", settings.output)
    assert "'x' is not INT" in call(*options, "--r", "4,x", code=2)
    assert "--lr 0.0: give a number above 0" in call(*options, "--lr", "1e-3,0", code=2)


def test_a_folder_that_is_no_sweeps_is_left_alone(settings: SweepSettings) -> None:
    mine = Path(settings.output) / "0-lr=0.001" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"has 0-lr=0\.001 already, which is no sweep's"):
        sweep(dataclasses.replace(settings, replace=True), {"lr": [1e-3, 2e-3]})
    assert mine.read_text() == "mine"
