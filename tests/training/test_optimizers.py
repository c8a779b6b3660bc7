"""The functional optimizers against `torch.optim`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same import adapter_of, mlp
from torch import Tensor, nn

import peftfn as pf
from peftfn.training.optimizers import ADAMW, SGD, Optimizer

# The same formula in another order of products, over 20 steps.
ROUNDING = 1e-6
CASES: dict[str, tuple[Optimizer, type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = {
    "adamw": (ADAMW, torch.optim.AdamW, {}, {}),
    "adamw, all given": (
        ADAMW,
        torch.optim.AdamW,
        {"beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.3},
        {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3},
    ),
    "sgd": (SGD, torch.optim.SGD, {}, {}),
    "sgd, all given": (SGD, torch.optim.SGD, *[{"momentum": 0.9, "weight_decay": 0.3}] * 2),
}


def gradients(model: nn.Module, adapter: pf.Adapter, x: Tensor) -> Any:
    return torch.func.grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean())(adapter.params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_end_where_those_of_torch_end(name: str, dtype: torch.dtype) -> None:
    optimizer, theirs, ours, options = CASES[name]
    model = mlp().to(dtype)
    adapter = adapter_of(model)
    trained = adapter_of(model)
    reference = theirs(pf.leaves(trained), lr=0.05, **options)
    state = optimizer.init(adapter.params)
    for _ in range(20):
        x = torch.randn(8, 4, dtype=dtype)
        reference.zero_grad()
        pf.apply(model, trained, x).square().mean().backward()
        reference.step()
        grads = gradients(model, adapter, x)
        params, state = optimizer.update(adapter.params, grads, state, lr=0.05, **ours)
        adapter = adapter.replace(params=params)
    for path, leaf in adapter.params.items():
        for tensor, expected in zip(leaf.values(), trained.params[path].values(), strict=True):
            assert tensor.dtype == dtype
            bound = ROUNDING if dtype == torch.float32 else ROUNDING**2
            torch.testing.assert_close(tensor, expected.detach(), rtol=bound, atol=bound)
    assert float(state.step) == 20


def test_an_update_leaves_what_it_was_given_as_it_was() -> None:
    adapter = adapter_of(mlp())
    before = {name: t.clone() for name, t in adapter.params["0"].items()}
    state = ADAMW.init(adapter.params)
    ADAMW.update(adapter.params, adapter.params, state, lr=0.1)
    assert all(torch.equal(adapter.params["0"][name], tensor) for name, tensor in before.items())
    assert float(state.step) == 0
    assert not any(tensor.any() for tensor in state.first["0"].values())


def test_gradients_are_scaled_down_as_torch_does_it_and_small_ones_are_not() -> None:
    adapter = adapter_of(mlp())
    tensors = pf.leaves(adapter)
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    grads: Any = {path: {n: t.grad for n, t in leaf.items()} for path, leaf in adapter.params.items()}
    small = pf.optimizers.clipped(grads, 1e3)
    ours = pf.optimizers.clipped(grads, 0.5)
    norm = pf.optimizers.norm(grads)
    kept = [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(tensors, 0.5), norm)
    for path, leaf in adapter.params.items():
        for name, tensor in leaf.items():
            torch.testing.assert_close(ours[path][name], tensor.grad)
    assert all(
        torch.equal(t, k) for t, k in zip([t for leaf in small.values() for t in leaf.values()], kept, strict=True)
    )


def test_a_tree_without_tensors_has_norm_0_and_nothing_to_train() -> None:
    assert float(pf.optimizers.norm({})) == 0.0
    assert pf.optimizers.clipped({}, 1.0) == {}
    for optimizer in (ADAMW, SGD):
        with pytest.raises(ValueError, match=r"a tree without tensors; expected adapter\.params"):
            optimizer.init({})
