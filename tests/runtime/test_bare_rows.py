"""A row of the bare base (index -1) beside adapters that are spoilt: it depends on none of them, nor do gradients."""

from __future__ import annotations

from typing import Any

import pytest
import registry
import torch
from cases import gpt2, llama, trained
from torch import Tensor, nn

import peftfn as pf

# Float64 rounding of kernels that are batched otherwise.
EXACT = 1e-11
NAMED = [one for one in registry.METHODS if {"linear", "transposed-square", "linear-even"} & {*one.kinds}]
PROMPTS: dict[str, Any] = {
    "prompt": pf.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "p-tuning": pf.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "prefix": pf.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "adaption": pf.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
}


def pair(model: nn.Module, config: Any) -> list[pf.Adapter]:
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    made = [trained(pf.init(model, config, one, dtype=torch.float64), 3, size=0.1) for one in draws]
    spoilt = {
        path: {n: torch.full_like(t, torch.nan) for n, t in leaf.items()} for path, leaf in made[0].params.items()
    }
    return [made[0].replace(params=spoilt), made[1]]


def assert_apart(model: nn.Module, both: list[pf.Adapter], batch: Any) -> None:
    """Hold [bare, second, bare] of a stack whose first adapter is of NaN against each alone, with gradients."""
    stacked = pf.stack(both)
    for leaf in stacked.params.values():
        for tensor in leaf.values():
            tensor.requires_grad_()
    found = pf.apply(model, stacked, batch, index=[-1, 1, -1])
    found = getattr(found, "logits", found)
    alone = [getattr(one, "logits", one) for one in (pf.apply(model, a, batch) for a in ((), both[1], ()))]
    for row, expected in enumerate(alone):
        assert (found[row, -1] - expected[row, -1]).abs().max() <= EXACT
    found.square().sum().backward()
    for leaf in stacked.params.values():
        for tensor in leaf.values():
            assert tensor.grad is not None
            assert tensor.grad[1].isfinite().all()


@pytest.mark.parametrize("method", NAMED, ids=lambda one: one.name)
def test_a_spoilt_adapter_spoils_no_row_of_the_base(method: registry.Method) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double().eval()
    batch: Tensor = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 1, 8).requires_grad_()
    assert_apart(model, pair(model, method.make(["0", "2"])), batch)
    assert batch.grad is not None
    assert batch.grad.isfinite().all()


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_spoilt_prompt_spoils_no_row_of_the_base(kind: str) -> None:
    torch.manual_seed(1)
    model = llama().double().eval() if kind == "adaption" else gpt2().double().eval()
    assert_apart(model, pair(model, PROMPTS[kind]), {"input_ids": torch.arange(12).view(3, 4)})
