"""LoKr against peft: outputs, gradients, merges and files, on each kind of layer that peft has."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from torch import nn

import peftfn as pf


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
