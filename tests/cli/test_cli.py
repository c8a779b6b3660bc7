"""The commands, each through the real entry point, on small model folders."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from places import ROOT

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small
from cli_folders import call

from peftfn.cli.app import FILLED

FILES = ROOT / "tests" / "files"
COMMANDS = ("train", "sweep", "eval", "generate", "merge", "convert", "inspect", "demo")


@dataclasses.dataclass
class Run:
    """A finished training: where everything is."""

    model: Path
    data: Path
    test: Path
    output: Path

    def adapted(self) -> tuple[Any, pf.Adapter]:
        """The base with the labels of the data, and the trained adapter."""
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            self.model, num_labels=2
        ).eval(), pf.load(self.output)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("classifier")
    made = Run(
        model=small.bert(folder / "bert"),
        data=small.write_csv(folder / "train.csv", small.rows(160, seed=1)),
        test=small.write_jsonl(folder / "test.jsonl", small.rows(60, seed=2)),
        output=folder / "out",
    )
    printed = call(
        *("train", "--model", made.model, "--data", made.data, "--eval-data", made.test, "--output", made.output),
        *("--target-modules", "query,value,dense", "--r", "4", "--lora-alpha", "8", "--lr", "0.03", "--epochs", "8"),
        *("--batch-size", "16", "--threads", "1", "--grad-accumulation", "2"),
    )
    assert "trained" in printed
    assert str(made.output / "loss.png") in printed
    return made


@pytest.fixture(scope="module")
def language_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("language")
    made = Run(
        model=small.llama(folder / "llama"),
        data=small.write_jsonl(folder / "train.jsonl", [{"text": "my garden was full of sun"}] * 40),
        test=small.write_csv(folder / "test.tsv", [{"text": "my garden was full of sun"}] * 3, delimiter="\t"),
        output=folder / "out",
    )
    call(
        *("train", "--model", made.model, "--data", made.data, "--output", made.output, "--task", "causal_lm"),
        *(
            "--target-modules",
            "all-linear",
            "--lr",
            "0.02",
            "--max-length",
            "16",
            "--max-steps",
            "40",
            "--threads",
            "1",
        ),
    )
    return made


def test_the_module_runs_as_a_program_and_its_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "peftfn", "--help"], capture_output=True, text=True, check=True)
    assert all(re.search(rf"\b{command}\b", done.stdout) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(command: str) -> None:
    assert f"Example: peftfn {command}" in call(command, "--help")


def test_train_has_an_option_for_every_field_of_the_config() -> None:
    printed = call("train", "--help")
    fields = [field.name for field in dataclasses.fields(pf.LoraConfig) if field.name not in FILLED]
    assert "lora_alpha" in fields
    assert [name for name in fields if not re.search(rf"--{name.replace('_', '-')}[ ,]", printed)] == []


def test_options_reach_the_saved_config(run: Run) -> None:
    config = pf.load(run.output).config
    assert isinstance(config, pf.LoraConfig)
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, ("query", "value", "dense"))
    assert (config.task_type, config.base_model_name_or_path) == ("SEQ_CLS", str(run.model))


def test_training_leaves_an_adapter_a_picture_and_a_line_for_each_step(run: Run) -> None:
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))  # 160 / (16 * 2) = 5 steps in each of 8 epochs
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert [line["step"] for line in lines if "eval_accuracy" in line] == list(range(5, 41, 5))
    assert (run.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert set(pf.load(run.output).params) >= {"classifier", "bert.encoder.layer.0.attention.self.query"}


def test_eval_prints_the_scores_that_the_library_computes(run: Run) -> None:
    printed = call("eval", "--adapter", run.output, "--data", run.test, "--threads", "1")
    model, adapter = run.adapted()
    found = [json.loads(line) for line in run.test.read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.model)
    batch = dict(tokenizer([row["text"] for row in found], padding=True, return_tensors="pt"))
    labels = torch.tensor([["bad", "good"].index(row["label"]) for row in found])
    with torch.no_grad():
        output = pf.apply(model, adapter, {**batch, "labels": labels})
    accuracy = (output.logits.argmax(-1) == labels).float().mean()
    assert accuracy > 0.9
    named = dict(re.findall(r"^(base|with adapter) +(\S+ +\S+)", printed, re.MULTILINE))
    assert [float(x) for x in named["with adapter"].split()] == pytest.approx(
        [float(output.loss), float(accuracy)], abs=6e-5
    )
    assert float(named["base"].split()[1]) < 0.8
    assert "60 examples" in printed
    assert "classifier" in printed.splitlines()[-1]  # the base's own head is random, and that is said


def test_a_merged_folder_gives_the_adapters_logits_and_the_names_of_the_labels(run: Run, tmp_path: Path) -> None:
    call("merge", run.output, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "bad", 1: "good"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = dict(tokenizer(["the sun was warm"], return_tensors="pt"))
    model, adapter = run.adapted()
    with torch.no_grad():
        # one rounding of W + sBA apart
        torch.testing.assert_close(merged(**batch).logits, pf.apply(model, adapter, batch).logits, atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_eval_without_an_adapter_measures_the_base_by_its_own_labels(run: Run, tmp_path: Path) -> None:
    call("merge", run.output, tmp_path / "merged")
    with_adapter = call("eval", "--adapter", run.output, "--data", run.test, "--threads", "1")
    alone = call("eval", "--model", tmp_path / "merged", "--data", run.test, "--threads", "1")
    assert re.findall(r"base +\S+ +(\S+)", alone) == re.findall(r"with adapter +\S+ +(\S+)", with_adapter)
    assert "random" not in alone


def test_merge_leaves_a_folder_alone_that_is_not_empty(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "is there already" in call("merge", run.output, tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_merge_refuses_to_write_weights_that_nobody_trained(run: Run, tmp_path: Path) -> None:
    adapter = pf.load(run.output)
    headless = {site: leaf for site, leaf in adapter.params.items() if site != "classifier"}
    pf.save(adapter.replace(params=headless), tmp_path / "headless")
    printed = call("merge", tmp_path / "headless", tmp_path / "merged", code=2)
    assert "classifier.weight, classifier.bias: neither the base nor the adapter has these weights" in printed
    assert not (tmp_path / "merged").exists()


def test_convert_writes_an_old_pickle_file_as_safetensors_with_the_same_tensors(tmp_path: Path) -> None:
    old = FILES / "peft-0.5.0" / "bert-seqcls-bin"
    assert not (old / "adapter_model.safetensors").exists()
    call("convert", old, tmp_path / "new")
    a, b = pf.load(old), pf.load(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.bin"))
    assert {s: list(leaf) for s, leaf in a.params.items()} == {s: list(leaf) for s, leaf in b.params.items()}
    assert all(torch.equal(t, b.params[s][n]) for s, leaf in a.params.items() for n, t in leaf.items())
    assert a.config == b.config


def test_inspect_shows_the_adapter_without_its_base(run: Run, tmp_path: Path) -> None:
    adapter = pf.load(run.output)
    alone = pf.save(adapter, tmp_path / "alone")  # no record of the training beside it
    printed = call("inspect", alone)
    trained = pf.count(adapter).trained
    assert f"{trained:,} parameters, give --model" in printed
    assert re.search(r"query +lora_A +4×16 +float32\n +lora_B +16×4 +float32", printed)
    assert re.search(r"^  r +4$", printed, re.MULTILINE)
    assert "lora_dropout" not in printed  # as the default has it
    total = pf.count(adapter, run.adapted()[0]).total
    share = f"{trained:,} parameters, {trained / total:.2%} of {total:,} with the base"
    assert share in call("inspect", alone, "--model", run.model)
    assert share in call("inspect", run.output)


def test_a_language_model_learns_its_text_and_eval_prints_the_perplexity(language_run: Run) -> None:
    printed = call("eval", "--adapter", language_run.output, "--data", language_run.test, "--threads", "1")
    base, adapted = (float(x) for x in re.findall(r"^(?:base|with adapter) +\S+ +(\S+)", printed, re.MULTILINE))
    assert adapted < 2
    assert base > 20
    model = transformers.AutoModelForCausalLM.from_pretrained(language_run.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_run.model)
    stream = (tokenizer("my garden was full of sun")["input_ids"] + [tokenizer.eos_token_id]) * 3  # 21 tokens
    with torch.no_grad():
        first, rest = (
            model(ids, labels=ids).loss for ids in (torch.tensor([stream[:16]]), torch.tensor([stream[16:]]))
        )
    assert math.log(base) == pytest.approx(float(15 * first + 4 * rest) / 19, abs=1e-4)  # a mean over targets


def test_a_merged_language_model_generates_what_was_learnt(language_run: Run, tmp_path: Path) -> None:
    call("merge", language_run.output, tmp_path / "merged")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("my garden", return_tensors="pt")["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).split() == ["my", "garden", "was", "full", "of", "sun"]


def test_an_adapter_of_an_image_model_is_merged_without_a_tokenizer_or_a_task(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        initializer_range=0.3, id2label={0: "cat", 1: "dog", 2: "bee"},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    heads = pf.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    adapter = pf.init(model, heads)
    pf.save(adapter, tmp_path / "adapter")
    call("merge", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == model.config.id2label
    batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    with torch.no_grad():
        expected = pf.apply(model, adapter, batch).logits
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_merge_takes_its_two_folders_with_or_without_their_options(run: Run, tmp_path: Path) -> None:
    ways: list[tuple[object, ...]] = [
        (run.output, tmp_path / "0"),
        ("--adapter", run.output, "--output", tmp_path / "1"),
        ("--adapter", run.output, tmp_path / "2"),
        (run.output, "--output", tmp_path / "3"),
    ]
    for number, way in enumerate(ways):
        assert str(tmp_path / str(number)) in call("merge", *way, "--model", run.model)
    same = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(4)]
    assert same.count(same[0]) == 4
    for wrong in ((), (run.output,), (run.output, "a", "b"), ("--adapter", run.output, "a", "b")):
        assert "expected --adapter and --output, each once" in call("merge", *wrong, code=2)


def test_the_version_is_an_option() -> None:
    assert call("--version").strip() == f"peftfn {pf.__version__}"
