"""A private name of torch's or optree's that another version does not have costs time, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from cases import trained
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import peftfn as pf
from peftfn.core import transforms
from peftfn.models.attention import attention

NAMES = (
    "_stack",
    "_level",
    "_is_wrapper",
    "_is_batched",
    "_unwrap",
    "_kinds",
    "_engine_caller",
    "_unsafe_view",
    "_sdp_choice",
    "FLASH",
    "FLASH_BACKWARD",
)


def close(found: Any, expected: Any) -> None:
    """Sums in another order, in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Net(nn.Module):
    """Linear layers, a change in place, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 8) -> (rows, tokens, 8)."""
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.up(attention(q, q, q).transpose(1, 2).flatten(2)).relu_()


def results(model: nn.Module, a: pf.Adapter, b: pf.Adapter, x: Tensor) -> list[Any]:
    """What every way to run adapters gives."""

    def value(params: Any, adapter: pf.Adapter = a, x: Tensor = x) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), x).sin().sum()

    leaves = pf.leaves(a)
    stacked = pf.stack([a, b])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")  # without its kernel, torch loops and says so
        mapped = vmap(lambda one: pf.apply(model, one, x))(stacked)
        gradients = vmap(lambda one: grad(lambda params: value(params, one))(one.params))(stacked)
    along = torch_pytree.tree_map(torch.ones_like, a.params)
    linear = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    inner = trained(pf.init(linear, pf.LoraConfig(r=2, target_modules=["0"])))

    def of_linear(params: Any) -> Tensor:
        return pf.apply(linear, inner.replace(params=params), x).sum()

    def squared(params: Any) -> Tensor:
        return sum((one.square().sum() for one in torch_pytree.tree_leaves(grad(of_linear)(params))), torch.zeros(()))

    return [
        pf.apply(model, a, x),
        functional_call(model, pf.merge(dict(model.named_parameters()), a), (x,)),
        list(torch.autograd.grad(value(a.params), leaves)),
        torch_pytree.tree_leaves(grad(value)(a.params)),
        mapped,
        torch_pytree.tree_leaves(gradients),
        pf.apply(model, stacked, x, index=[1, -1, 0, 1]),
        pf.bind(model, a)(x),
        jvp(of_linear, (inner.params,), (torch_pytree.tree_map(torch.ones_like, inner.params),)),
        torch_pytree.tree_leaves(grad(squared)(inner.params)),
        torch_pytree.tree_leaves(along),
    ]


@pytest.fixture(scope="module")
def given() -> tuple[nn.Module, pf.Adapter, pf.Adapter, Tensor]:
    torch.manual_seed(0)
    model = Net().double()
    config = pf.LoraConfig(r=2, target_modules=["q", "up"])
    a, b = (trained(pf.init(model, config), seed) for seed in (1, 2))
    return model, a, b, torch.randn(4, 5, 8, dtype=torch.float64)


@pytest.mark.parametrize("gone", [*([name] for name in NAMES), list(NAMES)], ids=" ".join)
def test_a_name_of_torchs_that_is_gone_changes_no_number(
    gone: list[str], given: tuple[nn.Module, pf.Adapter, pf.Adapter, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    expected = results(*given)
    for name in gone:
        assert getattr(transforms, name) is not None  # it is there in this version, or the test would test nothing
        monkeypatch.setattr(transforms, name, None)
    torch.manual_seed(1)
    for found, wanted in zip(results(*given), expected, strict=True):
        close(found, wanted)


def test_dropout_runs_without_a_way_to_ask_for_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_level", None)
    model = nn.Sequential(nn.Linear(64, 64)).train()
    adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5)))
    first, second = (pf.apply(model, adapter, torch.ones(9, 64)) for _ in range(2))
    assert first.isfinite().all() and not torch.equal(first, second)


@pytest.mark.parametrize("path", [("torch", "_gone"), ("torch._gone", "name"), ("torch.ops", "aten", "_no_such_op")])
def test_a_name_that_is_not_there_is_none(path: tuple[str, ...]) -> None:
    assert transforms.private(*path) is None


def test_optrees_namespace_that_is_gone_has_to_be_given() -> None:
    script = """
import sys, types
import optree, optree.registry, torch
sys.modules["optree.registry"] = types.ModuleType("optree.registry")  # what asks for a name in it finds none
import peftfn as pf
a = pf.init(torch.nn.Sequential(torch.nn.Linear(4, 4)), pf.LoraConfig(r=2, target_modules=["0"]))
doubled = optree.tree_map(lambda t: 2 * t, a, namespace="peftfn")
assert torch.equal(doubled.params["0"]["lora_A"], 2 * a.params["0"]["lora_A"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_other_file_asks_torch_or_optree_in_private() -> None:
    folder = Path(pf.__file__).parent
    asking = ("torch._C", "torch._functorch", "torch._dynamo", "__GLOBAL_NAMESPACE", "ops.aten._")
    lines = [
        f"{path.relative_to(folder)}:{number}: {line.strip()}"
        for path in folder.rglob("*.py")
        if path.name != "transforms.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(name in line for name in asking)
    ]
    assert not lines
