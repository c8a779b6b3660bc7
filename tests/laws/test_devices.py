"""Tensors are made where the base, the adapter or the input is: never on torch's default device, never mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import quantized
import torch
import torch.utils._pytree as torch_pytree
from cases import CASES, Case, lora, loss, mlp, output, trained
from oracle import IS_OLD
from same import assert_same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import grad, vmap
from transformers.pytorch_utils import Conv1D

import peftfn as pf

# The BERT of transformers 4 makes its masks on the default device.
DENSE = [case for case in CASES if case.pack is None and not (IS_OLD and case.name.endswith("-bert"))]
BOTH_WAYS = Case("both-ways", lambda: nn.Sequential(Conv1D(8, 8), nn.Linear(8, 8)), lora("0", "1"), torch.Tensor)
# A default device stops nn.MultiheadAttention's fused kernel, which sums in another order.
SAME = {"rtol": 1e-5, "atol": 1e-6}


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def call(model: nn.Module, batch: Any) -> Tensor:
    return output(model(**batch) if isinstance(batch, dict) else model(batch))


def devices(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in torch_pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


def same_with_another_default(compute: Callable[[], Any]) -> None:
    """What is made on the default device, here one that holds no values, cannot give the same."""
    torch.manual_seed(0)
    expected = compute()
    torch.manual_seed(0)
    with torch.device("meta"):
        found = compute()
    for one, other in zip(*map(torch_pytree.tree_leaves, (found, expected)), strict=True):
        torch.testing.assert_close(*map(quantized.parts_of, (one, other)), **SAME)


@each(CASES)
def test_adapter_is_the_same_whatever_the_default_device(case: Case) -> None:
    model = case.base()
    expected = pf.init(model, case.config)
    with torch.device("meta"):
        found = pf.init(model, case.config)
    assert_same(found, expected)


@each(DENSE)
def test_output_and_gradient_are_the_same_whatever_the_default_device(case: Case) -> None:
    model, batch = case.base().train(), case.batch()
    adapter = trained(pf.init(model, case.config))

    def gradient() -> Any:
        return grad(lambda params: loss(pf.apply(model, adapter.replace(params=params), batch)))(adapter.params)

    same_with_another_default(gradient)
    model.eval()
    same_with_another_default(lambda: call(pf.bind(model, adapter), batch))


@each(DENSE)
@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")  # of attention's kernels
def test_stack_and_routes_are_the_same_whatever_the_default_device(case: Case) -> None:
    model, batch = case.base(), case.batch()
    stacked = pf.stack([trained(pf.init(model, case.config), seed) for seed in range(3)])
    same_with_another_default(lambda: torch_pytree.tree_leaves(pf.unstack(stacked)))
    same_with_another_default(lambda: vmap(lambda one: output(pf.apply(model, one, batch)))(stacked))
    for index in ([0, 1, 2, -1], [2, 2, 0, 2], torch.tensor([1, 0, 1, 1])):
        same_with_another_default(lambda index=index: output(pf.apply(model, stacked, batch, index=index)))


@each([case for case in CASES if "merge" not in case.exceptions])
def test_merge_is_the_same_whatever_the_default_device(case: Case) -> None:
    model = case.base()
    adapter = trained(pf.init(model, case.config))
    params = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    same_with_another_default(lambda: dict(pf.merge(params, adapter, model=model)))


@pytest.mark.parametrize("method", ["linear", "svd", "dare_ties", "ties"])
def test_combination_is_the_same_whatever_the_default_device(method: str) -> None:
    model = mlp()
    adapters = [trained(pf.init(model, lora("0", "3")), seed) for seed in range(2)]
    more = {"density": 0.5} if "ties" in method else {}
    same_with_another_default(lambda: pf.combine(adapters, [0.7, 0.3], method=method, **more))


def test_ensemble_and_curvature_are_the_same_whatever_the_default_device() -> None:
    case = next(case for case in CASES if case.name == "llama")
    model, batch = case.base(), case.batch()
    stacked = pf.stack([trained(pf.init(model, case.config), seed) for seed in range(3)])
    same_with_another_default(lambda: tuple(pf.ensemble(model, stacked, batch)))
    plain, x = mlp().eval(), torch.randn(4, 8)
    adapter = trained(pf.init(plain, lora("0")))

    def of_row(params: Any, row: Tensor) -> Tensor:
        return pf.apply(plain, adapter.replace(params=params), row[None]).square().sum()

    def private() -> Any:
        return pf.curvature.private_gradient(of_row, adapter.params, x, 1.0, 1.0, torch.Generator().manual_seed(0))

    same_with_another_default(private)


# What decomposes a weight needs its numbers, which a device that only looks like one has not.
DECOMPOSED = ("kasa-", "osf-", "psoft-")


@each([*(case for case in DENSE if not case.name.startswith(DECOMPOSED)), BOTH_WAYS])
def test_fresh_adapter_is_where_its_base_is(case: Case) -> None:
    """On a device that only looks like one: shapes, dtypes and devices are kept, and no two devices mix."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with torch.no_grad():
        model = elsewhere(case.base(), mode)
        with mode:
            adapter = pf.init(model, case.config)
            assert devices(adapter) == {"cuda"}
            assert devices(pf.stack([adapter, adapter])) == {"cuda"}


def elsewhere(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with tensors on the device."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = looking_like(tensor, mode)
                held[name] = None if tensor is None else made[id(tensor)]
    return model


def looking_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    found = FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cuda:0"))
    return nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found
