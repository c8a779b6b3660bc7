"""The names of a run's labels go wherever the run goes: into `load_with_model`, and into merged folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small
from cli_folders import call
from same import assert_same

NAMES = {0: "bad", 1: "good"}


def trained(folder: Path, base: Path) -> Path:
    """A run over the base, on rows whose labels are called bad and good."""
    data = small.write_csv(folder / "train.csv", small.rows(32))
    options = ("--target-modules", "query", "--max-steps", 2, "--threads", 1)
    call("train", "--model", base, "--data", data, "--output", folder / "run", *options)
    return folder / "run"


def other_base(folder: Path) -> Path:
    """A classifier whose own two labels have other names, in another order."""
    small.bert(folder / "bert")
    kind: Any = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder / "bert", id2label={0: "joy", 1: "anger"}, label2id={"joy": 0, "anger": 1})
    model.save_pretrained(folder / "bert")
    return folder / "bert"


@pytest.mark.parametrize("build", [lambda folder: small.bert(folder / "bert"), other_base], ids=["bare", "own head"])
def test_names_of_the_labels_are_kept(build: Any, tmp_path: Path) -> None:
    base = build(tmp_path)
    run = trained(tmp_path, base)
    kind: Any = transformers.AutoModelForSequenceClassification
    model, adapter = pf.load_with_model(run)
    assert model.config.id2label == NAMES
    assert model.config.label2id == {name: number for number, name in NAMES.items()}
    batch = {"input_ids": torch.tensor([[2, 5, 9, 3]])}
    with torch.no_grad():
        expected = pf.apply(model.eval(), adapter, batch).logits
    call("merge", run, tmp_path / "by command")
    pf.merge_folder(base, run, tmp_path / "by folder", progress=False)
    pf.merge_folder(base, [str(run)], tmp_path / "by list", progress=False, dtype=torch.float32)
    pf.merge_folder(base, adapter, tmp_path / "by model", model=model, progress=False)
    for name in ("by command", "by folder", "by list", "by model"):
        merged = kind.from_pretrained(tmp_path / name).eval()
        assert merged.config.id2label == NAMES, name
        with torch.no_grad():
            torch.testing.assert_close(
                merged(**batch).logits, expected, rtol=1e-5, atol=1e-6
            )  # one rounding of W + sBA


def test_names_that_are_given_or_do_not_fit_are_not_taken_from_the_run(tmp_path: Path) -> None:
    run = trained(tmp_path, small.bert(tmp_path / "bert"))
    model, _ = pf.load_with_model(run, id2label={0: "no", 1: "yes"}, ignore_mismatched_sizes=True)
    assert model.config.id2label == {0: "no", 1: "yes"}
    text = (run / "training.json").read_text().replace('"bad",', '"bad", "so so",')
    (run / "training.json").write_text(text)
    model, adapter = pf.load_with_model(run)
    assert model.config.num_labels == 2
    assert_same(adapter, pf.load(run))


def test_an_adapter_without_a_head_leaves_the_names_of_the_base(tmp_path: Path) -> None:
    base = other_base(tmp_path)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["query"]))
    pf.merge_folder(base, adapter, tmp_path / "merged", progress=False)
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_merge_folder_says_what_it_was_given(tmp_path: Path) -> None:
    base = small.bert(tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in .*bert; expected a folder that holds"):
        pf.merge_folder(base, base, tmp_path / "merged", progress=False)
    wrong: Any = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"adapter is a Linear; expected a peftfn\.Adapter"):
        pf.merge_folder(base, wrong, tmp_path / "merged", progress=False)
