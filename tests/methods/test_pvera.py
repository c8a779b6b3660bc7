"""What is PVeRA's alone: draws in training, and bases of a seed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).double()


@oracle.by_new_peft
def test_the_bases_of_a_seed_are_pefts_numbers() -> None:
    options = {"r": 3, "projection_prng_key": 5, "target_modules": ["0", "2"]}
    adapter = pf.init(base(), pf.PveraConfig(**options))
    other: Any = peft.get_peft_model(base(), peft.PveraConfig(**options))
    for name in ("pvera_A", "pvera_B"):
        assert torch.equal(adapter.buffers["*"][name].float(), getattr(other.base_model, name)["default"].float())


@oracle.by_new_peft
@pytest.mark.parametrize("sample_at_inference", [False, True])
def test_a_draw_is_pefts_of_the_same_seed(tmp_path: Path, sample_at_inference: bool) -> None:
    model = base().train(not sample_at_inference)
    config = pf.PveraConfig(r=3, target_modules=["0"], sample_at_inference=sample_at_inference)
    adapter, x = oracle.randomised(pf.init(model, config)), torch.randn(4, 12).double()
    pf.save(adapter, tmp_path)
    other = peft.PeftModel.from_pretrained(base(), str(tmp_path)).train(model.training)
    drawn = []
    for run in (lambda: pf.apply(model, adapter, x), lambda: other(x)):
        torch.manual_seed(3)
        drawn.append(run())
    assert off(*drawn) < EXACT
    assert off(drawn[0], pf.apply(model, adapter, x)) > 1e-3  # the next draw is another one


def test_of_a_file_the_generator_of_peft_is_refused_where_something_is_drawn() -> None:
    model, x = base().eval(), torch.randn(4, 12).double()
    config = pf.PveraConfig(r=3, target_modules=["0"], generator_seed=7)
    adapter = oracle.randomised(pf.init(model, config))
    plain = adapter.replace(config=dataclasses.replace(config, generator_seed=None))
    assert torch.equal(pf.apply(model, adapter, x), pf.apply(model, plain, x))
    with pytest.raises(ValueError, match="generator_seed=7: PEFT's generator goes on from call to call"):
        pf.apply(model.train(), adapter, x)


def test_a_file_without_bases_is_read_with_the_model(tmp_path: Path) -> None:
    adapter = oracle.randomised(pf.init(base(), pf.PveraConfig(r=3, target_modules=["0", "2"], save_projection=False)))
    pf.save(adapter, tmp_path)
    with pytest.raises(ValueError, match=r"pass the base: peftfn.load\(folder, model\)"):
        pf.load(tmp_path)
    assert off(pf.load(tmp_path, base()).buffers, adapter.buffers) == 0.0
