"""What is peculiar to methods that add to a bias: LoRA with `lora_bias`, and BEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import gpt2, tokens
from exact import EXACT, Float64, off
from torch import nn
from torch.func import functional_call

import peftfn as pf

LORA = {"r": 2, "lora_bias": True}
CONFIGS: dict[str, Any] = {
    "LoRA": lambda **options: pf.LoraConfig(**LORA, **options),
    "BEFT": pf.BeftConfig,
}
methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


@methods
def test_a_layer_without_a_bias_runs_and_is_not_merged(config: Any) -> None:
    model, x = nn.Sequential(nn.Linear(6, 4, bias=False)).double(), torch.randn(3, 6).double()
    adapter = oracle.randomised(pf.init(model, config(target_modules=["0"])))
    silent = {name: tensor * 0 if "bias" in name else tensor for name, tensor in adapter.params["0"].items()}
    rest = pf.apply(model, adapter, x) - pf.apply(model, adapter.replace(params={"0": silent}), x)
    assert off(rest, rest[:1].expand_as(rest)) < EXACT
    assert rest.abs().max() > 1e-3
    with pytest.raises(ValueError, match="adds to the bias, and the layer has none"):
        pf.merge(dict(model.named_parameters()), adapter)


def test_a_part_of_a_fused_projection_has_its_part_of_the_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = gpt2().double().eval(), tokens()()
    adapters = [
        oracle.randomised(pf.init(model, pf.LoraConfig(**LORA, target_modules=["c_attn.q", "c_attn.v"])), seed)
        for seed in (1, 2)
    ]
    with Float64():
        alone = [pf.apply(model, one, ids).logits for one in adapters]
        assert off(alone[0], model(ids).logits) > 1e-2
        for one, found in zip(adapters, alone, strict=True):
            merged = pf.merge(dict(model.named_parameters()), one, model=model)
            assert off(functional_call(model, merged, (ids,)).logits, found) < EXACT
        pf.save(adapters[0], tmp_path)
        assert off(pf.load(tmp_path, model).params, adapters[0].params) == 0.0
        with oracle.quiet_peft():
            assert (
                off(oracle.loaded(model, tmp_path, autocast_adapter_dtype=False)(input_ids=ids).logits, alone[0])
                < EXACT
            )
        routed = pf.apply(model, pf.stack(adapters), ids, index=[1, 0, -1, 1]).logits
        expected = torch.stack([alone[1][0], alone[0][1], model(ids).logits[2], alone[1][3]])
        assert off(routed, expected) < EXACT


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_what_peft_refuses_beside_a_bias_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected use_dora=False and a start of True or False"):
        pf.LoraConfig(**LORA, **options)


def test_an_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0: Lora with lora_bias cannot act on this embedding"):
        pf.init(nn.Sequential(nn.Embedding(4, 4)), pf.LoraConfig(**LORA, target_modules=["0"]))
