"""Methods that came after PEFT 0.5.0 against peft: outputs, gradients, merges, files and shapes, one row a case."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import peft
import pytest
import registry
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from peftfn import methods
from peftfn.core.adapter import SHARED, is_shared

Build = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
LINEAR: Build = (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)), lambda: torch.randn(3, 5, 12))
TURNED: Build = (lambda: nn.Sequential(Conv1D(20, 12), nn.Tanh(), Conv1D(6, 20)), lambda: torch.randn(3, 5, 12))
TABLE: Build = (lambda: nn.Sequential(nn.Embedding(9, 8), nn.Tanh()), lambda: torch.randint(9, (3, 5)))
CONV1D: Build = (lambda: nn.Sequential(nn.Conv1d(8, 12, 3, padding=1)), lambda: torch.randn(2, 8, 9))
CONV2D: Build = (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1)), lambda: torch.randn(2, 8, 7, 7))
CONV3D: Build = (lambda: nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3))), lambda: torch.randn(2, 2, 3, 4, 5))
GROUPED: Build = (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), lambda: torch.randn(2, 8, 7, 7))
POINTWISE: Build = (lambda: nn.Sequential(nn.Conv2d(8, 12, 1)), lambda: torch.randn(2, 8, 3, 3))


BASES = {
    "linear": LINEAR,
    "transposed": TURNED,
    "embedding": TABLE,
    "conv1d": CONV1D,
    "conv2d": CONV2D,
    "conv2d-groups": GROUPED,
    "pointwise": POINTWISE,
    "conv3d": CONV3D,
}


class Case(NamedTuple):
    """What a method's row in the registry holds against peft."""

    method: registry.Method
    held: registry.AgainstPeft

    @property
    def name(self) -> str:
        return f"{self.method.title}, {self.held.base}, {self.held.name}"

    @property
    def options(self) -> dict[str, Any]:
        """Of the config, here and in peft."""
        return {**self.method.options, "target_modules": "0|2", **self.held.options}


CASES = [Case(method, held) for method in registry.METHODS for held in method.peft if held.in_old or not oracle.IS_OLD]


@pytest.fixture(autouse=True)
def butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle.give_butterflies(monkeypatch)


def every_case(of: str = "") -> Any:
    having = [case for case in CASES if of not in case.held.wrong]
    return pytest.mark.parametrize("case", having, ids=[case.name for case in having])


def within(case: Case) -> float:
    """How far from peft's, of the largest value: what a few hundred sums in float32 lose, where peft takes float32."""
    return 1e-6 if case.held.in_float32 else EXACT


def keyed(tensors: Mapping[str, Mapping[str, Any]], config: pf.PeftConfig) -> dict[str, Any]:
    """What belongs to the trained tensors of an adapter, by the names that they have in a peft model."""
    names = methods.of(config).names
    first = next(path for path in tensors if not is_shared(path))  # there peft's model has what all of its layers share
    return {
        f"base_model.model.{_in_peft(path, first, names[name].removesuffix('.weight'))}": one
        for path, leaf in tensors.items()
        for name, one in leaf.items()
    }


def _in_peft(path: str, first: str, name: str) -> str:
    return f"{first}.{name}{path.removeprefix(SHARED)}" if is_shared(path) else f"{path}.{name}"


def fresh(case: Case, **more: Any) -> tuple[nn.Module, Tensor, pf.Adapter]:
    """A base, a batch and an adapter as it begins, in float64."""
    build, batch = BASES[case.held.base]
    torch.manual_seed(0)
    model = build().double().eval()
    x = batch()
    config = getattr(pf, case.method.config)(**{**case.options, **more})
    return model, x.double() if x.is_floating_point() else x, pf.init(model, config)


def made(case: Case, folder: Path) -> tuple[nn.Module, Tensor, pf.Adapter, Any]:
    """The same with an adapter that is felt, and peft's model with the same tensors."""
    model, x, adapter = fresh(case)
    adapter = oracle.randomised(adapter)
    pf.save(adapter, folder)
    return model, x, adapter, theirs(model, folder).eval()


def theirs(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Invalid|fan_in_fan_out)")
        return peft.PeftModel.from_pretrained(
            copy.deepcopy(model), str(folder), is_trainable=True, autocast_adapter_dtype=False
        )


def loss(y: Tensor) -> Tensor:
    """A number that every output changes, and that turning them into each other changes too."""
    return (y * torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)).square().mean()


@every_case("outputs")
def test_outputs_and_gradients_are_pefts(case: Case, tmp_path: Path) -> None:
    model, x, adapter, other = made(case, tmp_path)
    expected = other(x)
    assert off(pf.apply(model, adapter, x), expected) < within(case)
    assert ((expected - model(x)).abs().max() > 1e-3 * expected.abs().max()) == case.held.is_felt
    if not case.held.is_felt or "gradients" in case.held.wrong:
        return
    loss(expected).backward()
    ours = grad(lambda p: loss(pf.apply(model, adapter.replace(params=p), x)))(adapter.params)
    named = {key.replace(".default", ""): one.grad for key, one in other.named_parameters() if one.grad is not None}
    named = {key.removesuffix(".weight"): one for key, one in named.items()}
    found = keyed(ours, adapter.config)
    assert found.keys() == named.keys()
    assert all(off(one, named[name]) < within(case) for name, one in found.items())


@every_case("merge")
def test_merging_gives_pefts_weights(case: Case, tmp_path: Path) -> None:
    model, x, adapter, other = made(case, tmp_path)
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(merged, dict(other.merge_and_unload().named_parameters())) < within(case)
    assert off(functional_call(model, merged, (x,)), pf.apply(model, adapter, x)) < EXACT


@every_case()
def test_files_are_read_both_ways(case: Case, tmp_path: Path) -> None:
    model, x, adapter, other = made(case, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter 'default': . LoRA")  # it takes a bias for half a factor
        other.save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", model)
    assert off(again.params, adapter.params) == 0.0
    assert off(pf.apply(model, again, x), pf.apply(model, adapter, x)) == 0.0


@every_case()
@pytest.mark.parametrize("is_neutral", [True, False])
def test_a_fresh_adapter_has_pefts_shapes_and_may_be_the_identity(case: Case, is_neutral: bool) -> None:
    start = case.method.start
    if start is None and not is_neutral:
        return
    more = {} if start is None else {start[0]: start[1 if is_neutral else 2]}
    model, x, adapter = fresh(case, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, case.method.config)(**{**case.options, **more})
        other = peft.get_peft_model(copy.deepcopy(model), config)
    expected = {
        key.replace(".default", "").removesuffix(".weight"): tuple(one.shape)
        for key, one in other.named_parameters()
        if one.requires_grad
    }
    assert {name: tuple(one.shape) for name, one in keyed(adapter.params, adapter.config).items()} == expected
    if is_neutral and "identity" not in case.method.exceptions:
        assert torch.equal(pf.apply(model, adapter, x), model(x))
