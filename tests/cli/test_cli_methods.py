"""`peftfn train --method`: each method on each task, from the options to a folder that the other commands read."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from same import assert_same

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small

from peftfn.cli.app import FILLED, METHODS
from peftfn.cli.data import tables, tasks
from peftfn.cli.settings import TrainSettings
from peftfn.cli.train import training

call = functools.partial(small.call, columns=250)

PROMPT = ("--num-virtual-tokens", "4", "--lr", "0.05")
OPTIONS: dict[str, tuple[str, ...]] = {
    "lora": ("--r", "4", "--lr", "0.02"),
    "ia3": ("--lr", "0.2"),
    "adalora": ("--init-r", "4", "--target-r", "2", "--tfinal", "5", "--lr", "0.05"),
    "lokr": ("--r", "2", "--lr", "0.05"),
    "boft": ("--boft-block-size", "2", "--boft-n-butterfly-factor", "2", "--lr", "0.05"),
    "delora": ("--r", "4", "--lr", "0.05"),
    "deft": ("--r", "4", "--lr", "0.05"),
    "glora": ("--r", "4", "--lr", "0.02"),
    "hira": ("--r", "4", "--lr", "0.05"),
    "hra": ("--r", "4", "--lr", "0.05"),
    "miss": ("--r", "4", "--lr", "0.05"),
    "road": ("--group-size", "4", "--lr", "0.05"),
    "oft": ("--oft-block-size", "8", "--lr", "0.05"),
    "prompt-tuning": PROMPT,
    "p-tuning": (*PROMPT, "--encoder-hidden-size", "12", "--encoder-reparameterization-type", "LSTM"),
    "prefix-tuning": PROMPT,
    "adaption-prompt": ("--adapter-len", "4", "--adapter-layers", "2", "--lr", "0.05"),
}
"""What each method is trained with here."""
# The others, on the same way through the command: that they learn, tests/methods and the laws say.
BRIEF: dict[str, tuple[str, ...]] = {
    "beft": (),
    "loha": ("--r", "2"),
    "fourierft": ("--n-frequency", "8"),
    "c3a": ("--block-size", "4"),
    "gralora": ("--r", "4", "--gralora-k", "2"),
    "shira": ("--r", "2"),
    "supertuning": (),
    "waveft": ("--n-frequency", "8"),
    "ln-tuning": (),
    "osf": (),
    "peanut": ("--r", "2"),
    "psoft": ("--r", "2"),
    "trainable-tokens": ("--token-indices", "1,2"),
    "vera": ("--r", "4"),
    "pvera": ("--r", "4"),
    "randlora": ("--r", "4"),
    "frod": (),
    "vblora": ("--r", "2", "--num-vectors", "8", "--vector-length", "8"),
    "cpt": ("--cpt-token-ids", "1,2,3,4", "--cpt-tokens-type-mask", "1,2,3,4"),
    "cartridge": ("--num-virtual-tokens", "4"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, one of them with a head of its own, and data for either task."""
    folder = tmp_path_factory.mktemp("methods")
    small.bert(folder / "bert")
    small.llama(folder / "llama")
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "llama", id2label={0: "bad", 1: "good"}, pad_token_id=0
    )
    headed.save_pretrained(folder / "headed")
    small.words(folder / "headed", closed=False)
    small.write_csv(folder / "labels.csv", small.rows(64, seed=1))
    small.write_jsonl(folder / "texts.jsonl", [{"text": "my garden was full of sun"}] * 40)
    return folder


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def scores(printed: str) -> list[float]:
    """The losses that `eval` prints: the base's, and with the adapter."""
    return [float(x) for x in re.findall(r"^(?:base|with adapter) +(\S+)", printed, re.MULTILINE)]


def trained(place: Path, output: Path, method: str, model: str, data: str, count: int = 30) -> pf.Adapter:
    """The adapter of a run of so many steps, checked to have learnt, and to be read by `eval` and `inspect`."""
    steps = ("--max-steps", count, "--batch-size", 16, "--threads", 1, "--max-length", 16)
    printed = call(
        *("train", "--method", method, "--model", place / model, "--data", place / data, "--output", output),
        *(*steps, *OPTIONS[method]),
    )
    kind = METHODS[method].peft_type
    assert f"adapter  {kind} at" in printed
    found = losses(output)
    assert len(found) == count
    assert sum(found[-10:]) < 0.95 * sum(found[:10])  # dropout, and rows in turn: steps are noisy
    base, adapted = scores(call("eval", "--adapter", output, "--data", place / data, "--split", "train"))
    assert adapted < 0.9 * base
    shown = call("inspect", output)
    assert f"method   {kind} ({METHODS[method].__name__})" in shown
    adapter = pf.load(output)
    assert f"trained  {pf.count(adapter).trained:,} parameters" in shown
    return adapter


@pytest.mark.parametrize("method", OPTIONS)
def test_each_method_learns_a_text(place: Path, tmp_path: Path, method: str) -> None:
    adapter = trained(place, tmp_path / "out", method, "llama", "texts.jsonl")
    assert adapter.config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("method", BRIEF)
def test_each_other_method_trains_and_is_read(place: Path, tmp_path: Path, method: str) -> None:
    given = ("--model", place / "llama", "--data", place / "texts.jsonl", "--output", tmp_path / "out", "--threads", 1)
    call("train", "--method", method, *given, "--max-steps", 2, "--batch-size", 8, "--max-length", 16, *BRIEF[method])
    adapter = pf.load(tmp_path / "out", transformers.AutoModelForCausalLM.from_pretrained(place / "llama"))
    assert type(adapter.config) is METHODS[method]
    assert adapter.config.task_type == "CAUSAL_LM"
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))


def test_a_method_that_needs_what_a_table_lacks_says_so_and_no_other_is_left_out(place: Path, tmp_path: Path) -> None:
    assert METHODS.keys() - OPTIONS.keys() - BRIEF.keys() == {"multitask-prompt-tuning"}
    given = ("--model", place / "llama", "--data", place / "texts.jsonl", "--output", tmp_path / "out")
    more = ("--num-virtual-tokens", "4", "--num-tasks", "2", "--max-steps", 2)
    printed = call("train", "--method", "multitask-prompt-tuning", *given, *more, code=2)
    assert "expected task_ids too, the number of each row's task" in " ".join(printed.split())


@pytest.mark.parametrize("method", OPTIONS)
def test_each_method_learns_labels(place: Path, tmp_path: Path, method: str) -> None:
    # In a Llama, prompt tuning is the one whose rows have to be padded on the other side. LLaMA-Adapter knows no BERT.
    model = {"prompt-tuning": "llama", "adaption-prompt": "headed"}.get(method, "bert")
    adapter = trained(place, tmp_path / "out", method, model, "labels.csv", 80)
    assert adapter.config.task_type == "SEQ_CLS"
    heads = {"llama": "score", "bert": "classifier", "headed": "no head of its own"}
    assert (heads[model] in adapter.params) == (model != "headed")


def test_every_field_of_every_config_is_an_option_in_the_panel_of_a_method() -> None:
    printed = call("train", "--help")
    shown: set[str] = set()
    for name, config in METHODS.items():
        fields = {field.name for field in dataclasses.fields(config)} - {*FILLED}
        fields = {field for field in fields if f"{name}.{field}" not in FILLED}
        # What an earlier method has too is in that one's panel; LN tuning has nothing else.
        assert (f"Adapter: --method {name} " in printed) == bool(fields - shown)
        shown |= fields
        for option in (f"--{field.replace('_', '-')}" for field in fields):
            assert re.search(rf"{option}[ ,].*\w{{3,}}", printed), f"{option} has no line, or no help"


def test_an_option_of_another_method_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    given = ("--model", place / "bert", "--data", place / "labels.csv", "--output", tmp_path / "out")
    printed = " ".join(call("train", *given, "--method", "prompt-tuning", "--r", "4", code=2).split())
    assert "--r" in printed and "no option of --method prompt-tuning; it has" in printed
    assert "--num-virtual-tokens" in printed
    printed = call("train", *given, "--method", "lore", code=2)
    assert f"'lore' is none of {next(iter(METHODS))}, " in printed
    printed = call("train", *given, "--method", "prompt-tuning", code=2)
    assert "num_virtual_tokens is None; expected a positive integer" in printed
    llama = ("--model", place / "llama", *given[2:])
    printed = call("train", *llama, "--method", "adaption-prompt", *OPTIONS["adaption-prompt"], code=2)
    assert "score: --model" in printed and "ADAPTION_PROMPT trains no whole modules" in " ".join(printed.split())
    printed = call("train", *given, "--method", "adalora", "--max-steps", 9, "--tfinal", 9, code=2)
    assert "--tinit 0 and --tfinal 9 leave none of the run's 9 steps" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_not_merged(place: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    for config in (
        pf.PromptTuningConfig(num_virtual_tokens=2),
        pf.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
    ):
        source = pf.save(pf.init(model, config), tmp_path / "prompt")
        printed = call("merge", source, tmp_path / "merged", code=2)
        assert f"{config.peft_type} adapter, which changes what the model is given" in printed
        assert len(printed.strip().splitlines()) == 1
        assert not (tmp_path / "merged").exists()


def test_adalora_gives_up_ranks_by_its_schedule_and_ends_with_its_target(place: Path, tmp_path: Path) -> None:
    adapter = trained(place, tmp_path / "out", "adalora", "llama", "texts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    config, sites = adapter.config, len(adapter.params)
    assert isinstance(config, pf.AdaLoraConfig)
    assert config.total_step == 30
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    fresh = pf.init(model, dataclasses.replace(config, rank_pattern=None))
    expected = [pf.adalora.budget(fresh, line["step"])[0] for line in lines[:25]]
    assert [line["ranks"] for line in lines[:25]] == expected
    assert sites * 4 >= lines[0]["ranks"] > lines[-1]["ranks"] == sites * 2
    assert sum(leaf["lora_E"].shape[0] for leaf in adapter.params.values()) == sites * 2


@pytest.mark.parametrize("method", ["adalora", "p-tuning", "prefix-tuning"])
def test_a_stopped_run_goes_on_to_the_same_bits(place: Path, tmp_path: Path, method: str) -> None:
    configs: dict[str, pf.PeftConfig] = {
        "adalora": pf.AdaLoraConfig(init_r=4, target_r=2),
        "p-tuning": pf.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
        "prefix-tuning": pf.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    }

    def job(output: str) -> training.Job:
        settings = TrainSettings(
            model=str(place / "llama"), data=str(place / "texts.jsonl"), output=str(tmp_path / output), max_steps=8,
            batch_size=4, save_every=3, threads=1, max_length=16, lr=0.02,
        )  # fmt: skip
        return training.prepare(settings, configs[method])

    whole = training.fit(job("whole"), lambda _: None)
    stopped = job("stopped")
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the sixth step; the last checkpoint is of the third
            raise KeyboardInterrupt

    hook = stopped.base.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt, match="goes on from step 3"):
        training.fit(stopped, lambda _: None)
    hook.remove()
    said: list[str] = []
    resumed = training.fit(job("stopped"), said.append)
    assert said[0] == "resumed  from step 3 of 8"
    assert_same(resumed, whole)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=32, pad_token_id=0)
    return transformers.GPT2ForSequenceClassification(config)


def llama() -> Any:
    sizes: dict[str, int] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_decoder_with_a_prompt_classifies_a_padded_row_as_it_does_alone(build: Any) -> None:
    model = build().eval()
    adapter = pf.init(model, pf.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    examples = tasks.Examples([[7, 8, 9], [5, 6, 7, 8, 9, 10]], [0, 1])
    how = tasks.TASKS["seq_cls"]
    together, *alone = (how.batch(examples, chosen, 0) for chosen in ([0, 1], [0], [1]))
    found = pf.apply(model, adapter, tasks.suited(together, model, adapter)).logits
    expected = torch.cat([pf.apply(model, adapter, row).logits for row in alone])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the same sums in another order
    as_it_was = pf.apply(model, adapter, together).logits
    assert not torch.allclose(as_it_was[0], expected[0], rtol=1e-2)  # the last position is padding
    assert tasks.suited(together, model, None) is together


def test_the_data_that_the_runs_read_has_rows_of_unlike_length(place: Path) -> None:
    table = tables.read_table(str(place / "labels.csv"), "train")
    assert len({len(text.split()) for _, text in tables.texts_of(table, "text")}) > 3
