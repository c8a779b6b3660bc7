"""docs/transforms.md: what `make transforms` wrote has every method, and a few of its cells are run again."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import transformers
from places import ROOT

from peftfn import methods

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="the page is about transformers 5")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("transforms")


def cells(script: Any) -> dict[tuple[str, str], dict[str, str]]:
    """The page's table: (method, model) -> transform -> cell."""
    lines = (ROOT / "docs" / "transforms.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    whole = [row for row in table if len(row) == 2 + len(script.TRANSFORMS)]
    assert whole[0][2:] == list(script.TRANSFORMS)
    return {(row[0], row[1]): dict(zip(whole[0][2:], row[2:], strict=True)) for row in whole[1:]}


def test_the_page_has_every_method_on_every_model(script: Any) -> None:
    configs = {type(make(task_type="CAUSAL_LM")) for make in script.METHODS.values()}
    assert configs == {method.config for method in methods.TABLE}
    assert set(cells(script)) == {(method, model) for method in script.METHODS for model in script.MODELS}
    limits = (ROOT / "docs" / "transforms.md").read_text()
    assert [limit.what for limit in script.LIMITS if limit.what not in limits] == []


REFUSED = {
    ("LLaMA-Adapter", "BERT"): "BertForSequenceClassification is of model type 'bert'; LLaMA-Adapter knows",
    ("CPT", "BERT"): "CPTConfig with task_type='SEQ_CLS'; expected 'CAUSAL_LM'",
}


def test_everything_runs_but_two_methods_that_are_not_for_bert(script: Any) -> None:
    for place, row in cells(script).items():
        if place in REFUSED:
            assert row["grad"].startswith(REFUSED[place])
        else:
            assert set(row.values()) == {"ok"}


@pytest.mark.parametrize(
    ("method", "model", "transform"),
    [
        ("LoRA", "GPT-2", "grad"),
        ("prefix tuning", "BERT", "vmap"),
        ("P-tuning, LSTM", "Llama", "vmap(grad)"),
        ("AdaLoRA", "BERT", "jvp"),
        ("prompt tuning", "GPT-2", "compile(fullgraph=True)"),
        ("LoHa", "GPT-2", "compile(fullgraph=True)"),
        ("LLaMA-Adapter", "BERT", "grad"),
    ],
)
def test_a_cell_is_as_the_page_says(script: Any, method: str, model: str, transform: str) -> None:
    assert script.cell(method, model, transform) == cells(script)[method, model][transform]


def test_a_wrong_number_is_not_ok(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(at: Any) -> Any:
        found, expected = script.by_grad(at)
        return found, {path: {name: 2 * tensor for name, tensor in leaf.items()} for path, leaf in expected.items()}

    monkeypatch.setitem(script.TRANSFORMS, "grad", doubled)
    assert script.cell("LoRA", "Llama", "grad") == "off by 5e-01"


@pytest.mark.parametrize("number", range(6))
def test_what_torch_does_not_do_fails_and_the_way_round_it_works(script: Any, number: int) -> None:
    assert len(script.LIMITS) == 6
    row = script.limit_row(script.LIMITS[number])
    assert "works by now" not in row
