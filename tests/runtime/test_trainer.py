"""transformers' Trainer, unchanged, on a bound module: its checkpoints, what goes on from them, and who reads them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainers
import transformers
from oracle import quiet_peft
from places import ROOT
from same import assert_same_tensors, flat
from snapshot import snapshot
from trainers import CASES, EVERY, FOUR, STEPS

import peftfn as pf

# Files that Trainer itself writes into a checkpoint.
TRAINERS = {"optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
ADAPTERS = {"adapter_config.json", "adapter_model.safetensors"}
# The prompt is added to the keys of attention in another order of sums.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainers.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer of transformers 4 tells accelerate of bf16 by the environment, and leaves that behind."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


# One forked child for each case, which dies a step after its first checkpoint: nothing is left of it but its files.
KILLED = """
import os, pathlib, signal, sys, warnings
warnings.filterwarnings("ignore")
import bitsandbytes, sums, torch, trainers, transformers
torch.set_num_threads(1)
sums.as_parent()

class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **given):
        if state.global_step == trainers.EVERY + 1:
            os.kill(os.getpid(), signal.SIGKILL)

base, output = map(pathlib.Path, sys.argv[1:])
trainers.trainer(trainers.bound(base, trainers.CASES["lora"]), output / "first", max_steps=1).train()  # imports, once
for name, case in trainers.CASES.items():
    child = os.fork()
    if child == 0:
        trainers.trainer(trainers.bound(base, case), output / name, Kill()).train()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""


@pytest.fixture(scope="session")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What killed runs have left, a folder each."""
    output = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(folder), str(output)]
    done = subprocess.run(command, cwd=ROOT / "tests" / "helpers", capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_to_the_same_losses_and_leaves(
    name: str, folder: Path, killed: Path, tmp_path: Path
) -> None:
    whole = trainers.trainer(trainers.bound(folder, CASES[name]), tmp_path)
    whole.train()
    assert [path.name for path in (killed / name).iterdir()] == [f"checkpoint-{EVERY}"]
    model = trainers.bound(folder, CASES[name], seed=1)  # another process may start from another adapter
    again = trainers.trainer(model, killed / name)
    again.train(resume_from_checkpoint=True)
    assert list(trainers.losses(again)) == list(range(1, STEPS + 1))
    assert trainers.losses(again) == trainers.losses(whole)
    assert trainers.evaluated(again) == trainers.evaluated(whole)
    assert_same_tensors(flat(pf.unbind(model)), flat(pf.unbind(whole.model)))
    assert trainers.losses(whole)[STEPS] != trainers.losses(whole)[EVERY]


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_holds_the_adapter_twice_at_most(name: str, folder: Path, tmp_path: Path) -> None:
    trainers.trainer(trainers.bound(folder, CASES[name]), tmp_path, max_steps=EVERY).train()
    there = {path.name: path.stat().st_size for path in (tmp_path / f"checkpoint-{EVERY}").iterdir()}
    encoder = {path for path in there if path.startswith("peftfn_encoder-")}
    assert there.keys() - TRAINERS == {*ADAPTERS, *encoder, "README.md", "model.safetensors"}
    assert bool(encoder) == (name == "p-tuning")
    of_adapter = sum(there[path] for path in ADAPTERS | encoder)
    assert sum(there[path] for path in there.keys() - TRAINERS) <= 2 * of_adapter


@pytest.mark.parametrize("name", FOUR)
def test_every_reader_of_adapters_reads_a_checkpoint(name: str, folder: Path, tmp_path: Path) -> None:
    case = CASES[name]
    model = trainers.bound(folder, case)
    trainers.trainer(model, tmp_path, max_steps=EVERY).train()
    checkpoint = tmp_path / f"checkpoint-{EVERY}"
    trained, expected = pf.unbind(model), trainers.logits(model)
    assert not torch.allclose(expected, trainers.logits(trainers.bound(folder, case)), **CLOSE)

    assert_same_tensors(flat(pf.load(checkpoint)), flat(trained))
    how: dict[str, Any] = {"dtype": torch.float32} if case.quantized else {}
    how |= {"quantization_config": model.config.quantization_config} if case.quantized else {}
    fresh, adapter = pf.load_with_model(checkpoint, **how)
    assert_same_tensors(flat(adapter), flat(trained))
    assert torch.equal(trainers.logits(pf.bind(fresh, adapter)), expected)
    with quiet_peft():
        theirs = peft.PeftModel.from_pretrained(trainers.base(folder, case), str(checkpoint))
    torch.testing.assert_close(trainers.logits(theirs), expected, **CLOSE)
    if name != "prompt":  # which transformers' own integration does not know
        with quiet_peft():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **how)
        torch.testing.assert_close(trainers.logits(theirs), expected, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_the_best_model_is_loaded_at_the_end(name: str, folder: Path, tmp_path: Path) -> None:
    model = trainers.bound(folder, CASES[name])
    # The largest loss is the best here: that of the first checkpoint, so that all later steps are undone.
    how: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainers.trainer(model, tmp_path, **how)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{EVERY}")
    assert_same_tensors(flat(pf.unbind(model)), flat(pf.load(tmp_path / f"checkpoint-{EVERY}")))
    assert run.evaluate()["eval_loss"] == trainers.evaluated(run)[EVERY]


@pytest.mark.parametrize("name", FOUR)
def test_training_from_a_checkpoint_leaves_the_base_as_it_is_and_warns_of_nothing(
    name: str, folder: Path, tmp_path: Path
) -> None:
    model = trainers.base(folder, CASES[name])
    before = snapshot(model)
    start = pf.init(model, CASES[name].config())
    said: list[str] = []
    for resumed in (None, True):
        with torch.random.fork_rng():
            run = trainers.trainer(pf.bind(model, start), tmp_path, max_steps=2 * EVERY if resumed else EVERY)
            run._issue_warnings_after_load = lambda found: said.extend([*found.missing_keys, *found.unexpected_keys])
            run.train(resume_from_checkpoint=resumed)
    assert said == []
    assert snapshot(model) == before


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FOUR)
def test_predictions_are_those_of_apply(name: str, precision: str, folder: Path, tmp_path: Path) -> None:
    model = trainers.base(folder, CASES[name])
    adapter = pf.init(model, CASES[name].config())
    given, half = trainers.rows(4), precision == "bfloat16"
    batch = {key: torch.tensor([row[key] for row in given]) for key in given[0]}
    run = trainers.trainer(pf.bind(model, adapter), tmp_path, bf16=half, max_steps=1)
    for _ in range(2):  # accelerate has set the forward of the module, the second time
        found = run.predict(given)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            expected = pf.apply(model.eval(), adapter, batch)
        assert torch.equal(torch.from_numpy(found.predictions), expected.logits.float())
        run.train()
    again = trainers.trainer(pf.bind(model, pf.unbind(run.model)), tmp_path, bf16=half)
    assert again.evaluate()["eval_loss"] == run.evaluate()["eval_loss"]
