"""KaSA against peft, which changes the base, and the base here, which stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import functional_call, grad

import peftfn as pf

DECOMPOSED = 1e-5  # both decompose in float32, and peft rounds the rest of the weight to it


def model_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double(), torch.randn(3, 5, 12).double()


def config(**more: Any) -> pf.LoraConfig:
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["0", "2"], "rank_pattern": {"2": 2}, "kasa_config": {}}
    return pf.LoraConfig(**{**given, **more})


def theirs(model: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(
        copy.deepcopy(model), str(folder), is_trainable=True, autocast_adapter_dtype=False
    )


@oracle.by_new_peft
def test_outputs_gradients_merges_and_files_are_pefts(tmp_path: Path) -> None:
    model, x = model_and_batch()
    before = copy.deepcopy(dict(model.state_dict()))
    adapter = oracle.randomised(pf.init(model, config()))
    other = theirs(model, pf.save(adapter, tmp_path / "ours")).eval()
    expected = other(x)
    assert off(pf.apply(model, adapter, x), expected) < DECOMPOSED
    expected.square().mean().backward()
    ours = grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean())(adapter.params)
    for path, leaf in ours.items():
        layer = other.base_model.model[int(path)]
        found = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
        slopes = {name: one["default"].weight.grad for name, one in found.items()}
        slopes["lora_diag"] = layer.lora_diag["default"].grad
        assert all(off(leaf[name], one) < DECOMPOSED for name, one in slopes.items())
    other.save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", model)
    assert off(again.params, adapter.params) == 0.0
    assert off(pf.apply(model, again, x), pf.apply(model, adapter, x)) == 0.0
    loss = other.base_model._get_kasa_loss()
    assert off(pf.kasa.regulariser(adapter), loss.double()) < DECOMPOSED
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(merged, dict(other.merge_and_unload().named_parameters())) < DECOMPOSED
    assert off(functional_call(model, merged, (x,)), pf.apply(model, adapter, x)) < EXACT
    assert all(one.equal(before[name]) for name, one in model.state_dict().items())


def test_a_fresh_one_is_the_base_without_its_smallest_singular_parts() -> None:
    model, x = model_and_batch()
    weights = {name: one.detach().clone() for name, one in model.named_parameters()}
    for name, r in (("0.weight", 3), ("2.weight", 2)):
        u, s, vh = torch.linalg.svd(weights[name], full_matrices=False)
        weights[name] = (u[:, :-r] * s[:-r]) @ vh[:-r]
    assert off(pf.apply(model, pf.init(model, config()), x), functional_call(model, weights, (x,))) < DECOMPOSED


def test_dropout_is_on_what_is_added_and_not_on_what_is_taken_off() -> None:
    model, x = model_and_batch()
    fresh = pf.init(model.train(), config(lora_dropout=0.5))  # B is zero
    assert off(pf.apply(model, fresh, x), pf.apply(model.eval(), fresh, x)) == 0.0


def test_adapters_of_unlike_ranks_are_one_stack() -> None:
    model, x = model_and_batch()
    made = [oracle.randomised(pf.init(model, config(r=r, rank_pattern={})), r) for r in (2, 4)]
    routed = pf.apply(model, pf.stack(made), x, index=[1, -1, 0])
    for row, alone in enumerate((made[1], (), made[0])):
        assert off(routed[row], pf.apply(model, alone, x)[row]) < EXACT


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match="takes r=6 of the weight's 6 singular parts"):
        pf.init(model, config(r=6, rank_pattern={}))
    with pytest.raises(ValueError, match="no negative weight"):
        config(kasa_config={"beta": -1.0})
    folder = pf.save(pf.init(model, config()), tmp_path)
    with pytest.raises(ValueError, match=r"pass the base: peftfn\.load"):
        pf.load(folder)
    with pytest.raises(TypeError, match="expected one adapter of LoraConfig"):
        pf.kasa.regulariser(pf.init(model, pf.LoraConfig(target_modules=["0"])))
