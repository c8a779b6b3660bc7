"""LoKr against peft: outputs, gradients, merges and files, on each kind of layer that peft has."""

from __future__ import annotations

import copy
from collections.abc import Callable
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

LINEAR = (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)), lambda: torch.randn(3, 5, 12))
CONV2D = (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1)), lambda: torch.randn(2, 8, 7, 7))
CONV1D = (lambda: nn.Sequential(nn.Conv1d(8, 12, 3, padding=1)), lambda: torch.randn(2, 8, 9))
GROUPED = (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), lambda: torch.randn(2, 8, 7, 7))
POINTWISE = (lambda: nn.Sequential(nn.Conv2d(8, 12, 1)), lambda: torch.randn(2, 8, 3, 3))
TUCKER: dict[str, Any] = {"use_effective_conv2d": True, "r": 1}

Build = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
CASES: dict[str, tuple[Build, dict[str, Any]]] = {
    "linear, whole factors": (LINEAR, {"r": 8}),
    "linear, a product": (LINEAR, {"r": 1, "alpha": 3}),
    "linear, both products": (LINEAR, {"r": 1, "decompose_both": True}),
    "linear, factor 4": (LINEAR, {"r": 2, "decompose_factor": 4}),
    "linear, a factor that does not divide": (LINEAR, {"r": 2, "decompose_factor": 5}),
    "linear, patterns": (LINEAR, {"r": 8, "rank_pattern": {"2": 1}, "alpha_pattern": {"0": 3}}),
    "convolution, whole": (CONV2D, {"r": 8}),
    "convolution, a product": (CONV2D, {"r": 1}),
    "convolution, Tucker": (CONV2D, TUCKER),
    "convolution 1d, whole": (CONV1D, {"r": 8}),
    "convolution 1d, a product": (CONV1D, {"r": 1}),
    "convolution 1d, Tucker": (CONV1D, TUCKER),
    "convolution with groups": (GROUPED, {"r": 1}),
    "pointwise convolution": (POINTWISE, TUCKER),
}
if peft.__version__.startswith("0.17."):  # it has no nn.Conv1d, and takes groups for more inputs
    CASES = {name: case for name, case in CASES.items() if case[0] not in (CONV1D, GROUPED)}
every_case = pytest.mark.parametrize("name", CASES)
# peft's forward and its merge raise on this one: "view size is not compatible with input tensor's size and stride".
every_case_of_peft = pytest.mark.parametrize("name", [name for name in CASES if name != "convolution 1d, Tucker"])


def made(name: str, folder: Path) -> tuple[nn.Module, Tensor, pf.Adapter, Any]:
    """A base, a batch, our adapter that is felt, and peft's model with the same tensors, in float64."""
    (build, batch), options = CASES[name]
    torch.manual_seed(0)
    model, x = build().double().eval(), batch().double()
    adapter = oracle.randomised(pf.init(model, pf.LoKrConfig(target_modules="0|2", **options)))
    pf.save(adapter, folder)
    theirs: Any = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), str(folder), is_trainable=True, autocast_adapter_dtype=False
    )
    return model, x, adapter, theirs.eval()


@every_case_of_peft
def test_outputs_and_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    model, x, adapter, theirs = made(name, tmp_path)
    expected = theirs(x)
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    assert (expected - model(x)).abs().max() > 1e-2
    expected.square().mean().backward()
    ours = grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean())(adapter.params)
    named = {key: one.grad for key, one in theirs.named_parameters() if one.grad is not None}
    assert len(named) == sum(map(len, ours.values()))
    for path, leaf in ours.items():
        for leaf_name, found in leaf.items():
            assert off(found, named[f"base_model.model.{path}.{leaf_name}.default"]) < EXACT


@every_case_of_peft
def test_merging_gives_pefts_weights(name: str, tmp_path: Path) -> None:
    model, x, adapter, theirs = made(name, tmp_path)
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(merged, dict(theirs.merge_and_unload().named_parameters())) < EXACT
    assert off(functional_call(model, merged, (x,)), pf.apply(model, adapter, x)) < EXACT


@every_case
def test_files_are_read_both_ways(name: str, tmp_path: Path) -> None:
    model, x, adapter, theirs = made(name, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", model)
    assert off(again.params, adapter.params) == 0.0
    assert off(pf.apply(model, again, x), pf.apply(model, adapter, x)) == 0.0


@every_case
@pytest.mark.parametrize("init", [True, False, "lycoris"])
def test_a_fresh_adapter_has_pefts_shapes_and_is_the_identity(name: str, init: Any) -> None:
    (build, batch), options = CASES[name]
    model, x = build().eval(), batch()
    adapter = pf.init(model, pf.LoKrConfig(target_modules="0|2", init_weights=init, **options))
    config = peft.LoKrConfig(target_modules="0|2", init_weights=init, **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    expected = {key: tuple(one.shape) for key, one in theirs.named_parameters() if "lokr" in key}
    found = {
        f"base_model.model.{path}.{leaf_name}.default": tuple(one.shape)
        for path, leaf in adapter.params.items()
        for leaf_name, one in leaf.items()
    }
    assert found == expected
    assert torch.equal(pf.apply(model, adapter, x), model(x)) == bool(init)


@pytest.mark.parametrize("scale", [False, True])
def test_dropout_in_training_drops_rows_or_the_whole_update(scale: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 2000, bias=False)).train(), torch.randn(1, 12)
    config = pf.LoKrConfig(r=8, target_modules=["0"], rank_dropout=0.25, rank_dropout_scale=scale)
    adapter = oracle.randomised(pf.init(model, config))
    whole = pf.apply(model.eval(), adapter, x) - model(x)
    dropped = pf.apply(model.train(), adapter, x) - model(x)
    share = (dropped.abs() > 1e-6).float().mean()
    assert 0.7 < share < 0.8
    kept = dropped.abs() > 1e-6
    torch.testing.assert_close(dropped[kept] * (share if scale else 1.0), whole[kept], rtol=1e-3, atol=1e-4)
    config = pf.LoKrConfig(r=8, target_modules=["0"], module_dropout=0.5)
    adapter = adapter.replace(config=config)
    is_gone = [bool(((pf.apply(model, adapter, x) - model(x)).abs() < 1e-6).all()) for _ in range(60)]
    assert 10 < sum(is_gone) < 50


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"module_dropout=1.0; expected a probability", {"module_dropout": 1.0}),
        (r"decompose_factor=0; expected a positive integer", {"decompose_factor": 0}),
        (r"init_weights='zero'; expected True, False or 'lycoris'", {"init_weights": "zero"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.LoKrConfig(**options)
