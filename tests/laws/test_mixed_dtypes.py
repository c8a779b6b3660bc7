"""Adapters in one dtype over a base in another: products in the wider of the two, replaced tensors in the base's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf

ROUNDING = 1e-6  # of float32, for products of 8 numbers; half precision is off by 1e-4 and more
HALVES = (torch.float16, torch.bfloat16)
CONFIGS: dict[str, pf.PeftConfig] = {
    "LoRA": pf.LoraConfig(r=4, target_modules=["0", "2"]),
    "DoRA": pf.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True),
    "LoHa": pf.LoHaConfig(r=4, target_modules=["0", "2"]),
    "OFT": pf.OFTConfig(oft_block_size=4, target_modules=["0", "2"]),
    "IA3": pf.IA3Config(target_modules=["0", "2"], feedforward_modules=[]),
}


def base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def cast(adapter: pf.Adapter, dtype: torch.dtype) -> pf.Adapter:
    trees = [
        {path: {name: one.to(dtype) if one.dim() else one for name, one in leaf.items()} for path, leaf in tree.items()}
        for tree in (adapter.params, adapter.buffers)
    ]
    return adapter.replace(params=trees[0], buffers=trees[1])


def test_factors_in_unlike_dtypes_are_multiplied_in_the_wider() -> None:
    model, x = base(), torch.randn(3, 8)
    adapter = oracle.randomised(pf.init(model, CONFIGS["LoRA"]))
    mixed = {path: {**leaf, "lora_A": leaf["lora_A"].half()} for path, leaf in adapter.params.items()}
    wide = {path: {**leaf, "lora_A": leaf["lora_A"].float()} for path, leaf in mixed.items()}
    for dtype in (torch.float32, torch.float16):
        found, expected = (
            pf.apply(model.to(dtype), adapter.replace(params=params), x.to(dtype)) for params in (mixed, wide)
        )
        assert torch.equal(found, expected)


def off(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max().detach())


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_half_precision_adapter_over_a_wider_base_computes_in_the_bases_dtype(name: str, half: torch.dtype) -> None:
    model, x = base(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    adapter = cast(oracle.randomised(pf.init(model, CONFIGS[name])), half)
    truth = pf.apply(copy.deepcopy(model).double(), cast(adapter, torch.float64), x.double())
    assert off(pf.apply(model, adapter, x), truth) < ROUNDING
    bound = pf.bind(model, adapter)
    assert off(bound(x), truth) < ROUNDING
    assert {one.dtype for leaf in pf.unbind(bound).params.values() for one in leaf.values()} == {half}
    assert off(functional_call(model, pf.merge(dict(model.named_parameters()), adapter), (x,)), truth) < ROUNDING
    routed = pf.apply(model, pf.stack([adapter, adapter]), x, index=[1, -1, 0])
    assert off(routed[[0, 2]], truth[[0, 2]]) < ROUNDING
    assert torch.equal(routed[1], model(x)[1])


def test_the_gradient_of_a_half_precision_leaf_is_that_of_float32_rounded_once() -> None:
    model, x = base(), torch.randn(3, 8)
    adapter = cast(oracle.randomised(pf.init(model, CONFIGS["LoRA"])), torch.bfloat16)

    def gradients(one: pf.Adapter) -> Any:
        return torch.func.grad(lambda params: pf.apply(model, one.replace(params=params), x).sum())(one.params)

    ours, wide = gradients(adapter), gradients(cast(adapter, torch.float32))
    for path, leaf in wide.items():
        for name, expected in leaf.items():
            assert ours[path][name].dtype == torch.bfloat16
            assert off(ours[path][name], expected) <= 2**-8 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_a_wider_saved_head_runs_in_the_bases_dtype_as_pefts(dtype: torch.dtype, bias: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": ["0"], "modules_to_save": ["2"], "bias": bias}
    adapter = oracle.randomised(pf.init(base(), pf.LoraConfig(**options)))
    pf.save(adapter, tmp_path)
    half, x = base().to(dtype), torch.randn(3, 8).to(dtype)
    loaded = pf.load(tmp_path, half)
    assert loaded.params["2"]["weight"].dtype == torch.float32  # the file's, bit for bit
    expected = oracle.loaded(half, tmp_path)(x).detach()
    rounded = 2.0 ** (-7 if dtype is torch.bfloat16 else -10) * float(expected.abs().max())
    found = pf.apply(half, loaded, x)
    assert found.dtype == dtype
    assert off(found, expected) <= 2 * rounded  # peft takes the product of LoRA in another order
    bound = pf.bind(half, loaded)
    assert torch.equal(bound(x), found)
    assert pf.unbind(bound).params["2"]["weight"].dtype == torch.float32
    bound(x).float().sum().backward()
    assert dict(bound.named_parameters())["2.weight"].grad is not None
    routed = pf.apply(half, pf.stack([loaded, loaded]), x, index=[1, -1, 0])
    assert off(routed[[0, 2]], found[[0, 2]]) <= 2 * rounded
    assert off(routed[1], half(x)[1]) <= 2 * rounded
    merged = pf.merge(dict(half.named_parameters()), loaded, model=half)
    assert {one.dtype for one in merged.values()} == {dtype}
    assert off(functional_call(half, merged, (x,)), expected) <= 4 * rounded
