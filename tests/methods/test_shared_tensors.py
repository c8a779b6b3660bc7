"""Tensors that all layers of an adapter have in common, whatever the method."""

from __future__ import annotations

import dataclasses
from typing import Any

import oracle
import pytest
import torch
from exact import off
from torch import nn

import peftfn as pf


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))


def test_constants_of_unlike_rank_come_apart_from_a_stack_as_they_went_in() -> None:
    adapters = [pf.init(base(), pf.VeraConfig(r=r, target_modules=["0", "2"])) for r in (2, 3)]
    again = pf.unstack(pf.stack(adapters))
    assert [one.buffers["*"]["vera_A"].shape for one in again] == [(2, 20), (3, 20)]
    assert all(off(one.buffers, two.buffers) == 0.0 for one, two in zip(again, adapters, strict=True))


@pytest.mark.parametrize(
    "config",
    [pf.VeraConfig(r=3), pf.PveraConfig(r=3), pf.RandLoraConfig(r=3, randlora_alpha=3), pf.FrodConfig()],
    ids=lambda config: config.peft_type,
)
def test_constants_of_half_precision_act_on_what_is_trained_in_float32(config: Any) -> None:
    # So a file is whose base has half precision: peft trains in float32, and rounds what it does not train.
    model, x = base().eval(), torch.randn(3, 12)
    adapter = oracle.randomised(pf.init(model, dataclasses.replace(config, target_modules=["0", "2"])))

    def rounded(dtype: torch.dtype) -> pf.Adapter:
        buffers = {
            path: {
                name: one.to(torch.bfloat16).to(dtype) if one.is_floating_point() and one.dim() else one
                for name, one in leaf.items()
            }
            for path, leaf in adapter.buffers.items()
        }
        return adapter.replace(buffers=buffers)

    half, whole = (pf.apply(model, rounded(dtype), x) for dtype in (torch.bfloat16, torch.float32))
    assert half.dtype == torch.float32
    assert off(half, whole) < 1e-6
