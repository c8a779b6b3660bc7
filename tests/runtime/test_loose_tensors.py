"""Tensors of a base that are neither parameters nor buffers, and what else a call must leave as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfn as pf

LORA = pf.LoraConfig(r=2, target_modules=["lin"])


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.count = torch.zeros(())
        self.means = {"all": [torch.zeros(4)]}
        self.half = self.lin.weight[:2]
        self.scale = torch.ones(4, requires_grad=True)
        self.register_buffer("seen", torch.zeros(4))
        self.first = self.seen[:1]

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x) * self.scale
        self.count += 1
        self.means["all"][0].add_(y.detach()[0])
        self.first += 1
        return y[:, :2] + x @ self.half.T + self.seen[0]


@pytest.mark.parametrize("run", [pf.apply, lambda model, adapter, x: pf.bind(model, adapter)(x)], ids=["apply", "bind"])
def test_a_tensor_that_is_an_attribute_is_not_written_to(run: Any) -> None:
    model = Loose()
    adapter = pf.init(model, LORA)
    x = torch.ones(3, 4)
    pf.leaves(adapter)
    output = run(model, adapter, x)
    output.sum().backward()
    written = [bool(one.any()) for one in (model.count, model.means["all"][0], model.seen, model.first)]
    assert written == [False] * 4
    assert model.lin.weight.grad is None and model.scale.grad is None
    if run is pf.apply:
        torch.testing.assert_close(output, model(x))  # which sees its own buffer through its view, too


def test_init_does_not_write_to_a_layer_whose_weight_is_computed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))
    before = copy.deepcopy(model.state_dict())
    pf.init(model, pf.LoraConfig(r=2, target_modules=["1"]))
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, before[name])] == []


@pytest.mark.parametrize("config", [LORA, pf.VeraConfig(r=2, target_modules=["lin"])], ids=["lora", "vera"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_init_does_not_ask_for_torch_s_default_dtype(config: Any, default: torch.dtype) -> None:
    model = Loose()
    want = pf.init(model, config)
    torch.set_default_dtype(default)
    try:
        got = pf.init(model, config)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in ((got.params, want.params), (got.buffers, want.buffers)):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_a_new_adapter_is_trained_over_a_fixed_one() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    config = pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    fixed, new = pf.init(model, config), pf.init(model, config)
    kept = {name: one.clone() for name, one in fixed.params["0"].items()}
    pf.leaves(new)
    bound = pf.bind(model, (fixed, new))
    trained = [one for one in bound.parameters() if one.requires_grad]
    assert len(trained) == len(new.params["0"])
    bound.requires_grad_(True)
    bound(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD([one for one in bound.parameters() if one.requires_grad], lr=1.0).step()
    torch.testing.assert_close(fixed.params["0"], kept, atol=0, rtol=0)
    torch.testing.assert_close(pf.unbind(bound)[0].params["0"], kept, atol=0, rtol=0)


def test_a_module_at_two_paths_has_what_is_in_it_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) - 2 * self.b(x.flip(0))

    model, x = Twice(), torch.randn(2, 4)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    want = pf.apply(model, adapter, x)
    other = pf.Adapter({"b.0": adapter.params["a.0"]}, {"b.0": adapter.buffers["a.0"]}, adapter.config)
    torch.testing.assert_close(pf.apply(model, other, x), want, atol=0, rtol=0)
    torch.testing.assert_close(pf.apply(model, adapter, x, params=model.state_dict()), want, atol=0, rtol=0)


def test_a_compiled_layer_is_adapted() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    want = pf.apply(model, adapter, x)
    model[0].compile(backend="eager")
    torch.testing.assert_close(pf.apply(model, adapter, x), want, atol=0, rtol=0)
    torch.testing.assert_close(pf.bind(model, adapter)(x), want, atol=1e-6, rtol=0)


def test_a_module_that_holds_integers_is_run_as_it_is() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4
            self.own = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.long))

        def forward(self, x: Tensor, times: float = 1.0) -> Tensor:
            return torch.tanh(x @ (self.own * self.mask).T) * times

    model, x = nn.Sequential(nn.Linear(4, 4), Masked()), torch.randn(3, 4)
    torch.testing.assert_close(pf.apply(model, (), x), model(x), atol=0, rtol=0)
    torch.testing.assert_close(pf.apply(model[1], (), (x, 2.0)), model[1](x, 2.0), atol=0, rtol=0)
