"""Weights that the base reads itself, by row: attention of torch in its forms, and mixtures of experts."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from bases import EXPERTS_ARE_PARAMETERS, mixtral
from cases import SelfAttention, lora, trained
from torch import Tensor, nn
from torch.func import grad

import peftfn as pf

# The same sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
INDEX = [2, -1, 0, 2]


class Attending(nn.Module):
    """Attention of torch, whose arguments are those of this module."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, q: Tensor, k: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """What the attention returns."""
        return self.attention(q, k, k, **kwargs)


def adapters_of(model: nn.Module, config: Any) -> list[pf.Adapter]:
    return [trained(pf.init(model, config), seed) for seed in range(3)]


MASKS: dict[str, dict[str, Tensor]] = {
    "no mask": {},
    "padding": {"key_padding_mask": torch.arange(6)[None] >= torch.tensor([[6], [3], [5], [1]])},
    "one mask": {"attn_mask": torch.ones(4, 6).tril(2) == 0},
    "a mask for each row and head": {"attn_mask": torch.ones(8, 4, 6).tril(1) == 0},
}


@pytest.mark.parametrize("batch_first", [False, True], ids=["batch second", "batch first"])
@pytest.mark.parametrize("wants", [False, True], ids=["output", "output and weights"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_of_each_row_is_what_its_adapter_gives(batch_first: bool, wants: bool, mask: str) -> None:
    model = Attending(batch_first).eval()
    adapters = adapters_of(model, lora("attention"))
    q, k = torch.randn(4, 4, 8), torch.randn(4, 6, 8)
    q, k = (q, k) if batch_first else (q.transpose(0, 1), k.transpose(0, 1))
    batch = {"q": q, "k": k, "need_weights": wants, **MASKS[mask]}
    output, weights = pf.apply(model, pf.stack(adapters), batch, index=INDEX)
    bound = pf.bind(model, pf.stack(adapters), index=INDEX)(**batch)
    assert (weights is not None) == wants
    torch.testing.assert_close(bound, (output, weights))
    for row, number in enumerate(INDEX):
        alone, shares = pf.apply(model, adapters[number] if number >= 0 else (), batch)
        pick = (lambda t: t[row]) if batch_first else (lambda t: t[:, row])  # noqa: B023  # called at once
        torch.testing.assert_close(pick(output), pick(alone), **CLOSE)
        if weights is not None:
            torch.testing.assert_close(weights[row], shares[row], **CLOSE)


def test_each_adapter_trains_on_its_rows() -> None:
    model, x = SelfAttention(), torch.randn(4, 5, 8)
    adapters = adapters_of(model, lora("attention"))
    stacked = pf.stack(adapters)
    together = grad(lambda p: pf.apply(model, stacked.replace(params=p), x, index=INDEX).sin().sum())(stacked.params)
    for number, chosen in ((0, [2]), (2, [0, 3])):
        adapter = adapters[number]
        alone = grad(lambda p: pf.apply(model, adapter.replace(params=p), x[chosen]).sin().sum())(adapter.params)  # noqa: B023  # called at once
        for path, leaf in alone.items():
            for name, expected in leaf.items():
                torch.testing.assert_close(together[path][name][number], expected, rtol=1e-5, atol=1e-5)


def experts() -> tuple[Any, list[pf.Adapter], dict[str, Tensor]]:
    model: Any = mixtral().eval()
    config = pf.LoraConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapters = [oracle.randomised(pf.init(model, config), seed) for seed in range(3)]
    return model, adapters, {"input_ids": torch.randint(0, 20, (4, 5))}


@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="this transformers has no experts as parameters")
def test_experts_of_each_row_are_what_its_adapter_makes_of_them() -> None:
    model, adapters, batch = experts()
    model.set_experts_implementation("batched_mm")
    together = pf.apply(model, pf.stack(adapters), batch, index=INDEX).logits
    for row, number in enumerate(INDEX):
        alone = pf.apply(model, adapters[number] if number >= 0 else (), batch).logits[row]
        torch.testing.assert_close(together[row], alone, **CLOSE)


@pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="this transformers has no experts as parameters")
def test_experts_that_decide_by_values_run_once_for_each_adapter_and_bound_are_one_clear_error() -> None:
    model, adapters, batch = experts()
    model.set_experts_implementation("eager")
    together = pf.apply(model, pf.stack(adapters), batch, index=INDEX).logits
    for row, number in enumerate(INDEX):
        alone = pf.apply(model, adapters[number] if number >= 0 else (), batch).logits[row]
        torch.testing.assert_close(together[row], alone, **CLOSE)
    with pytest.raises(ValueError, match=r"experts: MixtralExperts reads .* torch\.vmap cannot map over rows"):
        pf.bind(model, pf.stack(adapters), index=INDEX)(**batch)


def test_what_an_attention_reads_beside_its_weights_is_one_clear_error() -> None:
    x = torch.randn(4, 5, 8)
    for targets in (("attention",), ("head",)):
        model = SelfAttention()
        stacked = pf.stack(adapters_of(model, lora(*targets, bias="all")))
        with pytest.raises(ValueError, match=r"attention\.out_proj: nn\.MultiheadAttention reads the tensors of this"):
            pf.apply(model, stacked, x, index=INDEX)


class Gated(nn.Module):
    """A module that reads a parameter itself, and has a layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 8) -> (rows, 8)."""
        return x @ self.weight.T * self.gate(x)


def test_a_reader_with_an_adapted_layer_in_it_is_one_clear_error() -> None:
    model = nn.Sequential(Gated())
    config = pf.LoraConfig(r=2, target_parameters=["0.weight"], target_modules=["gate"])
    with pytest.raises(ValueError, match=r"Gated reads an adapted weight itself.* act on 0\.gate in another way too"):
        pf.apply(model, pf.stack(adapters_of(model, config)), torch.randn(4, 8), index=INDEX)
    alone = pf.LoraConfig(r=2, target_parameters=["0.weight"])
    adapters, x = adapters_of(model, alone), torch.randn(4, 8)
    together = pf.apply(model, pf.stack(adapters), x, index=INDEX)
    torch.testing.assert_close(together[0], pf.apply(model, adapters[2], x)[0], **CLOSE)
