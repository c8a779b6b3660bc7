"""What is RandLoRA's alone: bases of a seed, copies of them in files, and files without them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import safetensors.torch
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))


@oracle.by_new_peft
@pytest.mark.parametrize("more", [{}, {"sparse": True}, {"very_sparse": True, "sparse": True}])
def test_the_bases_of_a_seed_are_pefts_numbers(more: dict[str, Any]) -> None:
    options = {"r": 3, "projection_prng_key": 5, "target_modules": ["0", "2"], **more}
    adapter = pf.init(base(), pf.RandLoraConfig(**options))
    other: Any = peft.get_peft_model(base(), peft.RandLoraConfig(**options))
    for name in ("randlora_A", "randlora_B"):
        expected = getattr(other.base_model, name)["default"]
        assert torch.equal(adapter.buffers["*"][name], expected.float())


def test_the_sum_is_that_of_the_formula_where_a_layer_has_one_basis() -> None:
    adapter = oracle.randomised(pf.init(base().double(), pf.RandLoraConfig(r=20, target_modules=["0"])))
    lam, gamma = (adapter.params["0"][f"randlora_{name}"] for name in ("lambda", "gamma"))
    a, b = (adapter.buffers["*"][f"randlora_{name}"] for name in "AB")
    expected = 640 / 20 * b[:, 0] @ torch.diag(lam[:, 0]) @ a[:, 0] @ torch.diag(gamma[0])
    before = dict(base().double().named_parameters())
    assert off(pf.merge(before, adapter)["0.weight"] - before["0.weight"], expected) < EXACT


def test_files_have_a_copy_of_the_bases_at_each_layer_and_unlike_copies_are_refused(tmp_path: Path) -> None:
    pf.save(pf.init(base(), pf.RandLoraConfig(r=3, target_modules=["0", "2"])), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert torch.equal(tensors["base_model.model.2.randlora_B"], tensors["base_model.randlora_B"])
    tensors["base_model.model.2.randlora_B"] += 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"'base_model.model.2.randlora_B' has other numbers than 'base_model.rand"):
        pf.load(tmp_path)


def test_a_file_without_bases_is_read_with_the_model(tmp_path: Path) -> None:
    config = pf.RandLoraConfig(r=3, target_modules=["0", "2"], save_projection=False)
    adapter = oracle.randomised(pf.init(base(), config))
    pf.save(adapter, tmp_path)
    assert not [key for key in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors") if key[-2:] == "_A"]
    with pytest.raises(ValueError, match=r"pass the base: peftfn.load\(folder, model\)"):
        pf.load(tmp_path)
    assert off(pf.load(tmp_path, base()).buffers, adapter.buffers) == 0.0


def test_a_stack_comes_apart_with_the_bases_of_each() -> None:
    configs = [pf.RandLoraConfig(r=3, projection_prng_key=key, target_modules=["0", "2"]) for key in (0, 1)]
    adapters = [oracle.randomised(pf.init(base(), config), seed) for seed, config in enumerate(configs)]
    again = pf.unstack(pf.stack(adapters))
    assert all(off(one.buffers, two.buffers) == 0.0 for one, two in zip(again, adapters, strict=True))
    assert off(again[0].buffers["*"], adapters[1].buffers["*"]) > 0.1


@pytest.mark.parametrize("wrong", [{"r": 0}, {"randlora_dropout": 1.0}, {"bias": "vera_only"}])
def test_a_field_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}="):
        pf.RandLoraConfig(**wrong)


def test_dropout_is_on_what_goes_into_the_sum() -> None:
    model = base().train()
    config = pf.RandLoraConfig(r=3, target_modules=["0"], randlora_dropout=0.5)
    adapter, x = oracle.randomised(pf.init(model, config)), torch.ones(4, 12)
    calm = adapter.replace(config=dataclasses.replace(config, randlora_dropout=0.0))
    assert off(pf.apply(model, adapter, x), pf.apply(model, calm, x)) > 1e-3
    assert torch.equal(pf.apply(copy.deepcopy(model).eval(), adapter, x), pf.apply(model, calm, x))
