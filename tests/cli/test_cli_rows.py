"""`peftfn generate` and `peftfn eval` with a different adapter for each row of a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small
from oracle import randomised
from test_cli import call

TEXTS = ("the day was", "my garden", "a warm day and", "full of sun", "cold mud")
NAMES = ("ann", "", "bob", "ann", "bob")


class Made(NamedTuple):
    """A base, two adapters for it, and a file whose rows name them."""

    model: Path
    ann: Path
    bob: Path
    data: Path

    def adapters(self) -> str:
        return f"ann={self.ann},bob={self.bob}"


def made(folder: Path, kind: str) -> Made:
    model = small.llama(folder / "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    configs: list[pf.PeftConfig] = (
        [pf.LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM") for r in (2, 3)]
        if kind == "lora"
        else [pf.PromptTuningConfig(num_virtual_tokens=count, task_type="CAUSAL_LM") for count in (2, 3)]
    )
    places = [
        pf.save(randomised(pf.init(base, config), n, size=0.7), folder / name)
        for n, (name, config) in enumerate(zip(("ann", "bob"), configs, strict=True))
    ]
    rows = [{"text": text, "who": name} for text, name in zip(TEXTS, NAMES, strict=True)]
    return Made(model, *places, small.write_csv(folder / "rows.csv", rows))


def alone(files: Made, name: str, text: str, **options: Any) -> str:
    """What one adapter writes after one text."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(files.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.model)
    if name:
        model = pf.bind(model, pf.load({"ann": files.ann, "bob": files.bob}[name]))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=4, **options
    )
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("beams", [1, 2])
def test_each_row_is_written_with_the_adapter_that_it_names(kind: str, beams: int, tmp_path: Path) -> None:
    files, output = made(tmp_path, kind), tmp_path / "written.jsonl"
    printed = call(
        *("generate", "--data", files.data, "--adapter-column", "who", "--adapters", files.adapters(), "--threads", 1),
        *("--max-new-tokens", 6, "--batch-size", 4, "--num-beams", beams, "--output", output),
    )
    assert f"5 rows in {output}" in printed.replace("\n", "")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["text"], row["who"]) for row in rows] == list(zip(TEXTS, NAMES, strict=True))
    expected = [
        alone(files, name, text, max_new_tokens=6, num_beams=beams) for text, name in zip(TEXTS, NAMES, strict=True)
    ]
    assert [row["generated"] for row in rows] == expected
    assert len(set(expected)) > 2


def test_a_column_may_hold_folders_and_one_adapter_may_be_for_all_rows(tmp_path: Path) -> None:
    files = made(tmp_path, "lora")
    kept = [name if name == "bob" else "" for name in NAMES]
    rows = [
        {"text": text, "adapter": str(files.bob) if name == "bob" else ""}
        for text, name in zip(TEXTS, NAMES, strict=True)
    ]
    data = small.write_jsonl(tmp_path / "folders.jsonl", rows)
    printed = call("generate", "--data", data, "--max-new-tokens", 4, "--threads", 1)
    found = [json.loads(line)["generated"] for line in re.findall(r"\{.*\}", printed)]
    assert found == [alone(files, name, text, max_new_tokens=4) for text, name in zip(TEXTS, kept, strict=True)]
    printed = call(
        "generate", "--data", files.data, "--text-column", "text", "--adapter", files.ann, "--max-new-tokens", 4
    )
    found = [json.loads(line)["generated"] for line in re.findall(r"\{.*\}", printed)]
    assert found == [alone(files, "ann", text, max_new_tokens=4) for text in TEXTS]


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_eval_gives_the_loss_of_each_row_under_its_own_adapter(kind: str, tmp_path: Path) -> None:
    files = made(tmp_path, kind)
    options = ("--task", "causal_lm", "--long-text", "truncate", "--threads", 1)
    printed = call("eval", "--data", files.data, "--adapter-column", "who", "--adapters", files.adapters(), *options)
    named = dict(re.findall(r"^(base|with adapter) +(\S+)", printed, re.MULTILINE))
    base = transformers.AutoModelForCausalLM.from_pretrained(files.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.model)
    losses, bare, terms, bare_terms = 0.0, 0.0, 0, 0
    for text, name in zip(TEXTS, NAMES, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        adapter = pf.load({"ann": files.ann, "bob": files.bob}[name]) if name else ()
        count = ids.shape[1] - 1
        own = count + bool(name and kind == "prompt")  # behind a prompt the first token is predicted, too
        with torch.no_grad():
            losses += float(pf.apply(base, adapter, {"input_ids": ids, "labels": ids}).loss) * own
            bare += float(base(input_ids=ids, labels=ids).loss) * count
        terms, bare_terms = terms + own, bare_terms + count
    expected = [bare / bare_terms, losses / terms]
    assert [float(named["base"]), float(named["with adapter"])] == pytest.approx(expected, abs=6e-5)
    assert "5 examples" in printed


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_wrong_names_are_one_sentence(command: str, tmp_path: Path) -> None:
    files = made(tmp_path, "lora")
    data = ("--data", files.data, "--adapter-column")
    assert "has no such column; it has: text, who" in call(command, *data, "whom", code=2)
    assert "give NAME=FOLDER" in call(command, *data, "who", "--adapters", "ann", code=2)
    given = f"{files.adapters()},eve=x"
    assert "--adapters names eve, and no row of" in call(command, *data, "who", "--adapters", given, code=2)
    assert "one adapter for all rows; leave it out" in call(command, *data, "who", "--adapter", files.ann, code=2)
    assert "'bob' is no folder here" in call(command, *data, "who", "--adapters", f"ann={files.ann}", code=2)
