"""MiSS where the registry says nothing: its forms' starts, dropout, sizes, what a stack may mix."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import quantized
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf


def test_runs_of_inputs_share_an_update_and_the_last_run_may_be_shorter() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(10, 6)).double(), torch.randn(3, 10).double()
    adapter = oracle.randomised(pf.init(model, pf.MissConfig(r=4, target_modules=["0"])))
    block = adapter.params["0"]["miss_block"]
    assert block.shape == (4, 6)
    weight = model[0].weight + torch.stack([block[column % 4] for column in range(10)], 1)
    assert off(pf.apply(model, adapter, x), x @ weight.T + model[0].bias) < EXACT


@pytest.mark.parametrize(("form", "shape"), [("mini", (4, 3)), ("bat", (3, 4, 4))])
def test_a_form_starts_with_zeros_of_its_shape(form: str, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(3, 8)
    adapter = pf.init(model, pf.MissConfig(r=4, mini_r=3, target_modules=["0"], init_weights=form))
    assert adapter.params["0"]["miss_block"].shape == shape
    assert torch.equal(pf.apply(model, adapter, x), model(x))
    assert torch.equal(pf.merge(dict(model.named_parameters()), adapter)["0.weight"], model[0].weight)


def test_dropout_is_that_of_the_inputs_and_bat_has_none() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(400, 400, bias=False)).train(), torch.ones(4, 400)
    adapter = pf.init(model, pf.MissConfig(r=400, miss_dropout=0.25, target_modules=["0"]))
    adapter = adapter.replace(params={"0": {"miss_block": torch.eye(400)}})
    found = pf.apply(model, adapter, x) - model(x)
    kept = found > 0.5
    torch.testing.assert_close(found, kept * (4 / 3), rtol=0, atol=1e-5)
    assert 0.7 < float(kept.float().mean()) < 0.8
    assert torch.equal(pf.apply(model.eval(), adapter, x), pf.apply(model, adapter, x))
    bat = pf.MissConfig(r=4, miss_dropout=0.25, target_modules=["0"], init_weights="bat")
    adapter = oracle.randomised(pf.init(model, bat))
    assert torch.equal(pf.apply(model.train(), adapter, x), pf.apply(model.eval(), adapter, x))


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"0: r=9, and the layer has 8 inputs and 12 outputs; expected at most so many inputs", {"r": 9}),
        (r"0: init_weights='bat' needs blocks of r=8 that divide", {"r": 8, "init_weights": "bat"}),
        (r"0: mini_r=5 does not divide", {"r": 4, "init_weights": "mini", "mini_r": 5}),
    ],
)
def test_sizes_that_do_not_divide_are_refused_where_the_layer_is_known(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.init(nn.Sequential(nn.Linear(8, 12)), pf.MissConfig(target_modules=["0"], **options))


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"mini_r=0; expected a positive integer", {"mini_r": 0}),
        (r"miss_dropout=1.0; expected a probability", {"miss_dropout": 1.0}),
        (r"init_weights='big'; expected True, False, 'bat' or 'mini'", {"init_weights": "big"}),
        (r"bias='miss_only'; expected 'none', 'all' or 'MiSS_only'", {"bias": "miss_only"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.MissConfig(**options)


def test_forms_of_unlike_shapes_do_not_stack_and_a_random_start_does() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    plain, drawn, bat = (
        pf.init(model, pf.MissConfig(r=4, target_modules=["0"], init_weights=how)) for how in (True, False, "bat")
    )
    assert pf.stack([plain, drawn]).params["0"]["miss_block"].shape == (2, 4, 8)
    with pytest.raises(ValueError, match=r"0.miss_block has shapes"):
        pf.stack([plain, bat])


def test_bat_reads_a_packed_weight() -> None:
    model = quantized.packed(nn.Sequential(nn.Linear(64, 32)), "nf4")
    x = torch.randn(3, 64)
    fresh = pf.init(model, pf.MissConfig(r=8, target_modules=["0"], init_weights="bat"))
    assert torch.equal(pf.apply(model, fresh, x), pf.apply(model, (), x))
    adapter = oracle.randomised(fresh)
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    expected = x @ merged["0.weight"].T + model[0].bias
    torch.testing.assert_close(pf.apply(model, adapter, x), expected, rtol=1e-5, atol=1e-5)
