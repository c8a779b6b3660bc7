"""BD-LoRA: what the tables do not hold."""

from __future__ import annotations

from typing import Any

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from torch import Tensor, nn

import peftfn as pf


def model_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double(), torch.randn(3, 12).double()


def config(**more: Any) -> pf.LoraConfig:
    blocks = {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2, **more.pop("blocks", {})}
    return pf.LoraConfig(**{"r": 4, "target_modules": ["0", "2"], "use_bdlora": blocks, **more})


def test_it_is_lora_with_blocks_on_a_factors_diagonal() -> None:
    model, x = model_and_batch()
    adapter = oracle.randomised(pf.init(model, config()))
    plain = oracle.randomised(pf.init(model, pf.LoraConfig(r=4, target_modules=["0", "2"])))
    leaves = {path: dict(leaf) for path, leaf in adapter.params.items()}
    assert leaves["0"]["lora_A"].shape == (4, 6)
    assert leaves["2"]["lora_B"].shape == (6, 2)
    leaves["0"]["lora_A"] = torch.block_diag(*leaves["0"]["lora_A"].chunk(2))
    leaves["2"]["lora_B"] = torch.block_diag(*leaves["2"]["lora_B"].chunk(2))
    assert off(pf.apply(model, adapter, x), pf.apply(model, plain.replace(params=leaves), x)) < EXACT


@oracle.by_new_peft
def test_pefts_own_config_is_read() -> None:
    blocks = peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["0"], target_modules_bd_b=["2"], nblocks=2)
    assert pf.LoraConfig(r=4, target_modules=["0", "2"], use_bdlora=blocks) == config()


def test_a_plain_config_writes_no_field_that_older_versions_lack() -> None:
    text = pf.LoraConfig(r=4).to_json()
    assert not any(name in text for name in ("use_bdlora", "kasa_config", "qalora"))
    assert '"nblocks": 2' in config().to_json()


WRONG: dict[str, dict[str, Any]] = {
    "no pattern of use_bdlora is found in '2'": {"blocks": {"target_modules_bd_b": None}},
    "found in '0'; expected one": {"blocks": {"target_modules_bd_b": ["0", "2"], "target_modules_bd_a": ["0 "[:1]]}},
    "nblocks=5 does not divide r=4": {"blocks": {"nblocks": 5}},
    "has 'blocks', which is none of its fields": {"blocks": {"blocks": 2}},
    "has nblocks=0": {"blocks": {"nblocks": 0}},
    "asks for use_dora and use_bdlora; expected one": {"use_dora": True},
    "asks for use_bdlora and kasa_config": {"kasa_config": {}},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_sense_is_refused(message: str) -> None:
    model, _ = model_and_batch()
    wanted = "for A and for B" if "expected one" in message and "found in" in message else message
    with pytest.raises(ValueError, match=wanted):
        pf.init(model, config(**WRONG[message]))


def test_adapters_of_unlike_ranks_are_no_stack() -> None:
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match="blocks have to be of one size"):
        pf.stack([pf.init(model, config(r=r)) for r in (2, 4)])
