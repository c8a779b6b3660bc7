"""PEANuT where peft says nothing, or something else."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf


def test_a_second_adapter_sees_the_weight_that_the_first_one_makes() -> None:
    """peft gives both the base's weight, so that merging one and running the other is not the two together."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20)).double(), torch.randn(3, 12).double()
    one, other = (
        oracle.randomised(pf.init(model, pf.PeanutConfig(r=3, depth=1, target_modules=["0"])), seed) for seed in (1, 2)
    )
    merged = pf.merge(dict(model.named_parameters()), one)
    assert off(pf.apply(model, (one, other), x), pf.apply(model, other, x, params=merged)) < EXACT
    assert off(pf.apply(model, (one, other), x), pf.apply(model, (other, one), x)) > 1e-6


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"act_fn='rectified'; expected one of .*relu", {"act_fn": "rectified"}),
        (r"depth=33; expected a number from 0 to 32", {"depth": 33}),
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"0: Peanut cannot act on this embedding", {}),
    ],
)
def test_what_makes_no_sense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.init(nn.Sequential(nn.Embedding(4, 4)), pf.PeanutConfig(target_modules=["0"], **options))
