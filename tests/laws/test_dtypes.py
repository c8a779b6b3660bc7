"""What is computed in which dtype: the leaves, the outputs and the merged weights, in and outside autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import pytest
import registry
import torch
from bases import randn
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from peftfn.checkpoints import keys

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32, torch.float64]

# In units of the last place of the largest value. Ours scales before the product with B and peft after it, and
# where autocast is on each step is rounded: a sum of a few roundings, none of them larger than half a unit.
ROUNDING = 2.0
# A convolution may run with its kernel W + s·B·A, which is rounded before it is multiplied with; 3.6 were measured.
AS_ONE = 5.0


class Experts(nn.Module):
    """A bare parameter for each expert, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 24, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 16) -> (rows, 24)."""
        return torch.einsum("eoi,ni->no", self.up, x)


class Layer(NamedTuple):
    """One kind of layer, and its input."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]


LAYERS = {
    "linear": Layer(lambda: nn.Linear(16, 24), randn(4, 5, 16)),
    "linear, one row": Layer(lambda: nn.Linear(16, 24), randn(16)),
    "Conv1D of transformers": Layer(lambda: Conv1D(24, 16), randn(4, 5, 16)),
    "embedding": Layer(lambda: nn.Embedding(30, 24), lambda: torch.randint(0, 30, (4, 5))),
    "conv1d": Layer(lambda: nn.Conv1d(4, 6, 3, padding=1), randn(2, 4, 9)),
    "conv2d": Layer(lambda: nn.Conv2d(4, 6, 3, stride=2), randn(2, 4, 9, 9)),
    "conv3d": Layer(lambda: nn.Conv3d(2, 6, (1, 3, 3)), randn(2, 2, 3, 5, 5)),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3 of linear": ("linear", {"kind": "IA3Config", "feedforward_modules": []}),
    "ia3 of linear's input": ("linear", {"kind": "IA3Config", "feedforward_modules": ["0"]}),
    "ia3 of conv2d": ("conv2d", {"kind": "IA3Config", "feedforward_modules": []}),
    "ia3 of conv2d's input": ("conv2d", {"kind": "IA3Config", "feedforward_modules": ["0"]}),
    "adalora of linear": ("linear", {"kind": "AdaLoraConfig", "init_r": 4, "lora_alpha": 50, "total_step": 9}),
}
LAYERS |= {name: LAYERS[layer] for name, (layer, _) in OTHERS.items()}
if not oracle.IS_OLD:
    LAYERS["experts"] = Layer(Experts, randn(4, 16))
    OTHERS["adalora of conv2d"] = ("conv2d", OTHERS["adalora of linear"][1])
    LAYERS["adalora of conv2d"] = LAYERS["conv2d"]
every_layer = pytest.mark.parametrize("name", LAYERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def base_of(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    batch = LAYERS[name].batch()
    return nn.Sequential(LAYERS[name].build()).to(dtype), batch.to(dtype) if batch.is_floating_point() else batch


def options(name: str, alpha: float = 5) -> dict[str, Any]:
    if name in OTHERS:
        return OTHERS[name][1] | {"target_modules": ["0"]}
    return {"r": 4, "lora_alpha": alpha} | (
        {"target_modules": [], "target_parameters": ["0.up"]} if name == "experts" else {"target_modules": ["0"]}
    )


def adapter_of(name: str, base: nn.Module, alpha: float = 5, dtype: torch.dtype | None = None) -> pf.Adapter:
    return oracle.randomised(pf.init(base, oracle.config_of(pf, options(name, alpha)), dtype=dtype))


def units(ours: Tensor, theirs: Tensor, computed: torch.dtype | None = None) -> float:
    """The largest difference, in units of the last place of the largest value in the dtype that it was computed in."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    ours, theirs = ours.detach(), theirs.detach()
    relative = (ours.double() - theirs.double()).abs().max() / theirs.abs().max()
    return float(relative) / torch.finfo(computed or ours.dtype).eps


@every_dtype
@every_layer
def test_fresh_leaves_have_pefts_dtype(name: str, dtype: torch.dtype) -> None:
    base, _ = base_of(name, dtype)
    found = {key: tensor.dtype for key, tensor in keys.to_keys(adapter_of(name, base)).items()}
    assert found == {key: tensor.dtype for key, tensor in oracle.file_of(oracle.made(base, options(name))).items()}
    assert set(found.values()) == {torch.float32 if dtype in HALVES else dtype}


@every_dtype
@pytest.mark.parametrize("given", DTYPES, ids=str)
@every_layer
def test_a_given_dtype_is_that_of_the_leaves_and_never_of_the_output(
    name: str, given: torch.dtype, dtype: torch.dtype
) -> None:
    base, batch = base_of(name, dtype)
    adapter = adapter_of(name, base, dtype=given)
    assert {tensor.dtype for leaf in adapter.params.values() for tensor in leaf.values()} == {given}
    assert pf.apply(base, adapter, batch).dtype == dtype
    assert {tensor.dtype for tensor in pf.merge(base.state_dict(), adapter).values()} == {dtype}


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@every_dtype
@every_layer
def test_outputs_and_gradients_are_pefts_to_rounding(name: str, dtype: torch.dtype, cast: bool, tmp_path: Path) -> None:
    base, batch = base_of(name, dtype)
    adapter = adapter_of(name, base)
    pf.save(adapter, tmp_path)
    theirs = oracle.loaded(base, tmp_path)
    computed = torch.bfloat16 if cast and dtype != torch.float64 else dtype  # autocast leaves float64 alone
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        ours, expected = pf.apply(base, adapter, batch), theirs(batch)
        if name.startswith("ia3 of conv2d"):  # peft gives what autocast computes the dtype of the input
            expected = expected.to(ours.dtype)
        assert units(ours, expected, computed) < (AS_ONE if "conv" in name else ROUNDING)
        assert ours.dtype == base(batch).dtype
        found, wanted = oracle.gradients(base, adapter, batch), oracle.gradients_of(theirs, batch)
    assert {key: tensor.dtype for key, tensor in found.items()} == {key: tensor.dtype for key, tensor in wanted.items()}
    assert oracle.furthest(found, wanted) < 2 * ROUNDING * torch.finfo(computed).eps  # forward and backward


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_layer
def test_leaves_in_half_precision_give_pefts_output_to_rounding(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, batch = base_of(name, dtype)
    adapter = adapter_of(name, base, dtype=dtype)
    pf.save(adapter, tmp_path)
    theirs = oracle.loaded(base, tmp_path, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in oracle.trained(theirs).values()} == {dtype}
    assert units(pf.apply(base, adapter, batch), theirs(batch)) < ROUNDING
    merged, expected = pf.merge(base.state_dict(), adapter), oracle.merged_of(theirs)
    assert max(units(merged[key], expected[key]) for key in merged if "bias" not in key) < ROUNDING


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d"])
def test_under_autocast_the_scaling_is_not_rounded(name: str, tmp_path: Path) -> None:
    base, batch = base_of(name, torch.float32)
    for parameter in base.parameters():
        parameter.data.zero_()  # then the output is the delta
    adapter = adapter_of(name, base, alpha=20 / 3)  # s = 1.6667, which bfloat16 has as 1.6641, 0.16 % less
    pf.save(adapter, tmp_path)
    theirs = oracle.loaded(base, tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = pf.apply(base, adapter, batch).double(), theirs(batch).double()
    # How much of peft's output is in ours: roundings cancel out over a hundred numbers, a factor does not.
    share = (ours * expected).sum() / expected.square().sum()
    assert share.item() == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear", "Conv1D of transformers"])
def test_merged_linear_weights_are_pefts_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, _ = base_of(name, dtype)
    adapter = adapter_of(name, base)
    pf.save(adapter, tmp_path)
    merged, theirs = pf.merge(base.state_dict(), adapter), oracle.merged_of(oracle.loaded(base, tmp_path))
    assert sorted(merged) == sorted(theirs)
    assert all(torch.equal(merged[key], theirs[key]) for key in theirs)


@every_dtype
@every_layer
def test_merged_weights_are_pefts_to_rounding(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    # peft rounds the delta of an embedding and of experts to the weight's dtype before it adds it.
    base, _ = base_of(name, dtype)
    adapter = adapter_of(name, base)
    pf.save(adapter, tmp_path)
    merged, theirs = pf.merge(base.state_dict(), adapter), oracle.merged_of(oracle.loaded(base, tmp_path))
    assert max(units(merged[key], theirs[key]) for key in merged if "bias" not in key) < ROUNDING


@every_layer
def test_merging_under_autocast_is_merging(name: str) -> None:
    base, _ = base_of(name, torch.float32)
    adapter = adapter_of(name, base)
    expected = pf.merge(base.state_dict(), adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = pf.merge(base.state_dict(), adapter)
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


def test_float64_leaves_are_computed_in_float64_whatever_the_scalings_dtype() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    adapter = pf.init(model, pf.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    single = adapter.replace(buffers={"0": {"scaling": adapter.buffers["0"]["scaling"].float()}})
    x, leaf = torch.randn(4, 8, dtype=torch.float64), adapter.params["0"]
    with torch.no_grad():
        weight = model[0].weight + 2 * leaf["lora_B"] @ leaf["lora_A"]
        merged = pf.merge(model.state_dict(), single)["0.weight"]
        torch.testing.assert_close(merged, weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pf.apply(model, single, x), x @ weight.mT + model[0].bias, rtol=1e-12, atol=1e-12)


# Two layers and what a method does between, each rounded once or twice, and a gradient the way back too.
IN_HALF = 16.0
ON_LINEAR = [one for one in registry.METHODS if {"linear", "linear-even", "transposed-square"} & {*one.kinds}]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", ON_LINEAR, ids=lambda one: one.name)
def test_every_method_runs_in_half_precision_and_is_the_truth_to_rounding(
    method: registry.Method, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(dtype).eval()  # PVeRA draws in training
    x = torch.randn(6, 8).to(dtype)
    adapter = oracle.randomised(pf.init(base, method.make(["0", "2"]), dtype=dtype))
    wide, exact = copy.deepcopy(base).double(), exact_of(adapter)
    assert {one.dtype for leaf in adapter.params.values() for one in leaf.values()} == {dtype}

    def value(model: nn.Module, one: pf.Adapter, x: Tensor) -> Callable[[Any], tuple[Tensor, Tensor]]:
        def loss(params: Any) -> tuple[Tensor, Tensor]:
            output = pf.apply(model, one.replace(params=params), x)
            return output.double().sin().sum(), output

        return loss

    pairs: list[tuple[Tensor, Tensor]] = []
    found, output = torch.func.grad(value(base, adapter, x), has_aux=True)(adapter.params)
    truth, expected = torch.func.grad(value(wide, exact, x.double()), has_aux=True)(exact.params)
    pairs.append((output, expected))
    pairs += [(found[path][name], one) for path, leaf in truth.items() for name, one in leaf.items()]
    merged, whole = pf.merge(base.state_dict(), adapter), pf.merge(wide.state_dict(), exact)
    pairs += [(merged[name], one) for name, one in whole.items()]
    largest = max(float(one.abs().max()) for leaf in truth.values() for one in leaf.values())
    for number, (one, other) in enumerate(pairs):
        assert one.dtype == dtype
        is_gradient = 0 < number <= sum(map(len, truth.values()))
        size = largest if is_gradient else float(other.abs().max())
        off = float((one.double() - other).abs().max()) / max(size, 1e-30)
        assert off <= IN_HALF * torch.finfo(dtype).eps, (number, off / torch.finfo(dtype).eps)


def exact_of(adapter: pf.Adapter) -> pf.Adapter:
    """The adapter with the same numbers in float64."""
    params, buffers = (
        {
            path: {name: one.double() if one.is_floating_point() else one for name, one in leaf.items()}
            for path, leaf in tree.items()
        }
        for tree in (adapter.params, adapter.buffers)
    )
    return adapter.replace(params=params, buffers=buffers)
