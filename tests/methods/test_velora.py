"""VeLoRA's backward pass against peft's, alone, by row and under transforms."""

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
from torch.func import grad, vmap

import peftfn as pf

NORMALISED = 1e-6  # peft makes v of length 1 in float32


def model_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double(), torch.randn(3, 5, 12).double()


def config(**more: Any) -> pf.LoraConfig:
    said = {"num_groups": 5, "scale": 1.5, **more}  # 12 inputs: the last group is filled up
    return pf.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], velora_config=said)


@oracle.by_new_peft
@pytest.mark.parametrize("start", ["batch_average", "random"])
def test_gradients_in_training_are_pefts(start: str, tmp_path: Path) -> None:
    model, x = model_and_batch()
    adapter = oracle.randomised(pf.init(model, config(init_type=start)))
    other: Any = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), str(pf.save(adapter, tmp_path / "ours")), is_trainable=True, autocast_adapter_dtype=False
    )
    model.train()
    expected = other.train()(x)
    expected.square().mean().backward()
    value = lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean()  # noqa: E731  # one expression
    ours = grad(value)(adapter.params)
    exact = grad(lambda p: pf.apply(model.eval(), adapter.replace(params=p), x).square().mean())(adapter.params)
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    for path, leaf in ours.items():
        layer = other.base_model.model[int(path)]
        for name in ("lora_A", "lora_B"):
            assert off(leaf[name], getattr(layer, name)["default"].weight.grad) < NORMALISED
        assert off(leaf["lora_B"], exact[path]["lora_B"]) < EXACT
        assert off(leaf["lora_A"], exact[path]["lora_A"]) > 1e-2
    other.eval().save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", model)
    assert off(again.params, adapter.params) == 0.0
    assert (
        off(pf.merge(dict(model.named_parameters()), again), dict(other.merge_and_unload().named_parameters())) < EXACT
    )


def test_a_compiled_gradient_and_those_of_a_stack_are_the_same() -> None:
    model, x = model_and_batch()
    model.train()
    made = [oracle.randomised(pf.init(model, config()), seed) for seed in (1, 2)]

    def slopes(adapter: pf.Adapter) -> Any:
        return grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean())(adapter.params)

    together = vmap(slopes)(pf.stack(made))
    for number, one in enumerate(made):
        alone = slopes(one)
        assert off({path: {n: t[number] for n, t in leaf.items()} for path, leaf in together.items()}, alone) < EXACT
        leaves = pf.leaves(one)
        pf.apply(model, one, x).square().mean().backward()
        assert all(a.grad is not None and b is not None for a, b in zip(leaves, leaves, strict=True))
    compiled = torch.compile(lambda: slopes(made[0]), backend="aot_eager")
    assert off(compiled(), slopes(made[0])) < EXACT


def test_few_numbers_of_an_input_are_kept() -> None:
    model, x = nn.Sequential(nn.Linear(640, 4)).train(), torch.randn(50, 640)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], velora_config={"num_groups": 8}))
    pf.leaves(adapter)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        pf.apply(model, adapter, x)
    assert 50 * 8 in kept
    assert 50 * 640 not in kept


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    model, x = model_and_batch()
    once = pf.init(model, config(init_type="batch_average_once"))
    pf.apply(model.eval(), once, x)
    with pytest.raises(ValueError, match="does not change by being run"):
        pf.apply(model.train(), once, x)
    for wrong in ({"num_groups": 0}, {"scale": 0.0}, {"init_type": "mean"}, {"groups": 3}):
        with pytest.raises(ValueError, match="velora_config"):
            config(**wrong)
