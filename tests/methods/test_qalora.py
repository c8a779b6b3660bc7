"""QA-LoRA against the function that peft's layers of GPTQ run, and plain LoRA where peft makes that of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from peft.tuners.lora import variants
from torch import Tensor, nn

import peftfn as pf
from peftfn.methods import qalora


def model_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double(), torch.randn(3, 5, 12).double()


def config(**more: Any) -> pf.LoraConfig:
    given = {"r": 2, "lora_alpha": 5, "target_modules": ["0"], "use_qalora": True, "qalora_group_size": 4}
    return pf.LoraConfig(**{**given, **more})


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers, whose weights all can be read, in the place of packed ones."""
    monkeypatch.setattr(qalora.gptq, "matches", lambda module: isinstance(module, nn.Linear))


@oracle.by_new_peft
@pytest.mark.usefixtures("gptq")
def test_outputs_are_pefts_and_merge() -> None:
    model, x = model_and_batch()
    adapter = oracle.randomised(pf.init(model, config()))
    leaf = adapter.params["0"]
    assert leaf["lora_A"].shape == (2, 3)
    other = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0"], qalora_group_size=4)
    )
    layer = other.base_model.model[0].double()
    variants.QALoraLinearVariant.init(layer, "default", other.peft_config["default"])
    for name in ("lora_A", "lora_B"):
        getattr(layer, name)["default"].weight.data = leaf[name]
    with torch.no_grad():
        hidden = variants.QALoraLinearVariant.forward(layer, "default", x, model[0](x))
        expected = model[2](hidden.tanh())
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(torch.func.functional_call(model, merged, (x,)), expected) < EXACT
    change = (merged["0.weight"] - model[0].weight).view(20, 3, 4)
    assert off(change, change[..., :1].expand_as(change)) < EXACT  # one number for each group


@pytest.mark.usefixtures("gptq")
def test_rows_stacks_and_files(tmp_path: Path) -> None:
    model, x = model_and_batch()
    made = [oracle.randomised(pf.init(model, config(r=r)), r) for r in (2, 3)]
    routed = pf.apply(model, pf.stack(made), x, index=[1, -1, 0])
    for row, alone in enumerate((made[1], (), made[0])):
        assert off(routed[row], pf.apply(model, alone, x)[row]) < EXACT
    again = pf.load(pf.save(made[0], tmp_path), model)
    assert again.config.qalora_group_size == 4
    assert off(again.params, made[0].params) == 0.0


def test_a_file_from_a_dense_layer_is_the_lora_that_peft_trained(tmp_path: Path) -> None:
    model, x = model_and_batch()
    options = {"r": 2, "lora_alpha": 5, "target_modules": ["0"], "use_qalora": True, "qalora_group_size": 4}
    other = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options), autocast_adapter_dtype=False).eval()
    oracle.randomise(other)
    other.save_pretrained(tmp_path)
    adapter = pf.load(tmp_path, model)
    assert adapter.params["0"]["lora_A"].shape == (2, 12)
    assert off(pf.apply(model, adapter, x), other(x)) < EXACT


def test_what_peft_makes_plain_without_a_word_is_refused_at_the_start() -> None:
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match="is for layers of GPTQ, and this is a Linear"):
        pf.init(model, config())
    with pytest.raises(ValueError, match="qalora_group_size=0"):
        config(qalora_group_size=0)


@pytest.mark.usefixtures("gptq")
def test_a_group_size_that_does_not_divide_is_refused() -> None:
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match="does not divide its 12 inputs"):
        pf.init(model, config(qalora_group_size=5))
