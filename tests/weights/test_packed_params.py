"""A state dict of a quantized model as `params`: what it computes is what the model does, or `merge` made of it."""

from __future__ import annotations

import oracle
import pytest
import torch
from quantized import eight_bit, four_bit
from torch import Tensor, nn

import peftfn as pf

PACK = {"4 bits": four_bit, "8 bits": eight_bit}
CLOSE = {"4 bits": 1e-5, "8 bits": 2e-2}  # of the largest output: 8-bit layers round their inputs, dense ones do not


def off(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs().max() / other.abs().max()).detach())


@pytest.mark.parametrize("kind", PACK)
def test_a_state_dict_of_packed_weights_is_taken_as_it_is_and_merged(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[PACK[kind](nn.Linear(64, 64)) for _ in range(2)])
    x = torch.randn(4, 64)
    bare = pf.apply(model, (), x)
    adapter = oracle.randomised(pf.init(model, pf.LoraConfig(r=4, target_modules=["0"])))
    adapted = pf.apply(model, adapter, x)
    state = model.state_dict()
    assert torch.equal(pf.apply(model, (), x, params=state), bare)
    assert torch.equal(pf.apply(model, adapter, x, params=state), adapted)
    merged = pf.merge(state, adapter, model=model)
    assert off(pf.apply(model, (), x, params=merged), adapted) < CLOSE[kind]
    torch.manual_seed(1)
    other = nn.Sequential(*[PACK[kind](nn.Linear(64, 64)) for _ in range(2)])  # another model's, in the same format
    expected = pf.apply(other, (), x)
    assert off(pf.apply(model, (), x, params=other.state_dict()), expected) < CLOSE[kind]
    assert off(bare, expected) > 0.1
    with pytest.raises(KeyError, match="which Sequential does not have"):
        pf.apply(model, (), x, params={**state, "0.scales": x})
