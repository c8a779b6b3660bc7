"""HRA where peft says nothing, or something else: its start, orthogonal vectors, padding, layers that peft has not."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import oracle
import peft
import pytest
import quantized
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import peftfn as pf


def chain(vectors: Tensor) -> Tensor:
    """The product of the reflections, one after the other."""
    product = torch.eye(vectors.shape[0], dtype=vectors.dtype)
    for column in vectors.T:
        unit = column / column.norm()
        product = product @ (torch.eye(len(column), dtype=vectors.dtype) - 2 * torch.outer(unit, unit))
    return product


def one_layer(**options: Any) -> tuple[nn.Module, Tensor, pf.Adapter]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5)).double(), torch.randn(3, 8).double()
    config = pf.HRAConfig(target_modules=["0"], **{"r": 4, "init_weights": False, **options})
    return model, x, pf.init(model, config, dtype=torch.float64)


def test_the_inputs_are_reflected_one_vector_after_the_other() -> None:
    model, x, adapter = one_layer()
    product = chain(adapter.params["0"]["hra_u"])
    assert off(product @ product.T, torch.eye(8, dtype=torch.float64)) < EXACT
    assert off(pf.apply(model, adapter, x), x @ product.T @ model[0].weight.T + model[0].bias) < EXACT


def test_orthogonal_vectors_are_pefts() -> None:
    model, x, adapter = one_layer(apply_GS=True)
    config = peft.HRAConfig(r=4, apply_GS=True, init_weights=False, target_modules=["0"])
    other = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).double()
    other.base_model.model[0].hra_u["default"].data.copy_(adapter.params["0"]["hra_u"])
    expected = other(x)
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    expected.square().sum().backward()
    ours = grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().sum())(adapter.params)
    assert off(ours["0"]["hra_u"], other.base_model.model[0].hra_u["default"].grad) < EXACT


def test_a_start_of_pairs_can_be_trained_and_is_exact_in_float32() -> None:
    model, _, _ = one_layer()
    model, x = model.float(), torch.randn(50, 8)
    adapter = pf.init(model, pf.HRAConfig(r=4, target_modules=["0"]))
    assert torch.equal(pf.apply(model, adapter, x), model(x))
    assert torch.equal(pf.merge(dict(model.named_parameters()), adapter)["0.weight"], model[0].weight)
    one = pf.init(model.double(), adapter.config, dtype=torch.float64)
    x = x.double()
    found = grad(lambda p: pf.apply(model, one.replace(params=p), x).square().sum())(one.params)["0"]["hra_u"]
    vectors = one.params["0"]["hra_u"].clone().requires_grad_()
    (x @ chain(vectors).T @ model[0].weight.T + model[0].bias).square().sum().backward()
    assert off(found, vectors.grad) < EXACT
    assert found.abs().max() > 1e-2


def test_a_start_that_is_none_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 5))
    odd = pf.init(model, pf.HRAConfig(r=3, target_modules=["0"])).params["0"]["hra_u"]  # as in peft, which warns of it
    assert len(odd.unique(dim=1).T) == 3
    with pytest.raises(ValueError, match="0: apply_GS has no start that changes nothing"):
        pf.init(model, pf.HRAConfig(apply_GS=True, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"r=0; expected a positive integer"):
        pf.HRAConfig(r=0)
    with pytest.raises(ValueError, match=r"bias='lora_only'; expected 'none', 'all' or 'hra_only'"):
        pf.HRAConfig(bias="lora_only")


@pytest.mark.parametrize("orthogonal", [False, True])
def test_unlike_numbers_of_reflections_stack_and_padding_stays_none(orthogonal: bool) -> None:
    model, x, _ = one_layer()
    options = {"apply_GS": orthogonal, "init_weights": False, "target_modules": ["0"]}
    adapters = [oracle.randomised(pf.init(model, pf.HRAConfig(r=r, **options)), r) for r in (2, 5)]
    stacked = pf.stack(adapters)

    def value(params: Any, adapter: pf.Adapter) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), x).square().sum()

    together = vmap(lambda one: pf.apply(model, one, x))(stacked)
    routed = pf.apply(model, stacked, x, index=[1, -1, 0])
    gradients = vmap(grad(value))(stacked.params, stacked)["0"]["hra_u"]
    for number, adapter in enumerate(adapters):
        assert off(together[number], pf.apply(model, adapter, x)) < EXACT
        alone = grad(value)(adapter.params, adapter)["0"]["hra_u"]
        assert off(gradients[number, :, : adapter.config.r], alone) < EXACT
    assert bool((gradients[0, :, 2:] == 0).all())
    assert off(routed[2], pf.apply(model, adapters[0], x)[2]) < EXACT
    assert torch.equal(routed[1], model(x)[1])


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(4, 6, (1, 3), stride=(1, 2), padding=(0, 1)), nn.Conv1d(4, 6, 2, dilation=2)]
)
def test_a_convolution_keeps_its_geometry(convolution: nn.Module) -> None:
    """peft runs it with a square kernel, one stride, one padding and no dilation."""
    model = nn.Sequential(convolution).double()
    x = torch.randn(2, 4, *([7] * len(convolution.kernel_size))).double()
    adapter = pf.init(model, pf.HRAConfig(r=4, target_modules=["0"], init_weights=False), dtype=torch.float64)
    weight = convolution.weight.detach()
    turned = (weight.flatten(1) @ chain(adapter.params["0"]["hra_u"])).view(weight.shape)
    assert off(pf.apply(model, adapter, x), functional_call(model, {"0.weight": turned}, (x,))) < EXACT


def test_a_packed_layer_runs_on_the_reflected_input_and_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized.packed(nn.Sequential(nn.Linear(64, 32)), "nf4")
    x = torch.randn(3, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = pf.init(model, pf.HRAConfig(r=4, target_modules=["0"]))
    assert torch.equal(pf.apply(model, fresh, x), pf.apply(model, (), x))
    adapter = oracle.randomised(fresh)
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    expected = x @ merged["0.weight"].T + model[0].bias
    made = quantized.products(monkeypatch)
    torch.testing.assert_close(pf.apply(model, adapter, x), expected, rtol=1e-5, atol=1e-5)
    assert made
