"""Methods that came after PEFT 0.5.0 against peft: outputs, gradients, merges, files and shapes, one row a case."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers.pytorch_utils import Conv1D

import peftfn as pf

Build = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
LINEAR: Build = (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)), lambda: torch.randn(3, 5, 12))
TURNED: Build = (lambda: nn.Sequential(Conv1D(20, 12), nn.Tanh(), Conv1D(6, 20)), lambda: torch.randn(3, 5, 12))
TABLE: Build = (lambda: nn.Sequential(nn.Embedding(9, 8), nn.Tanh()), lambda: torch.randint(9, (3, 5)))
CONV1D: Build = (lambda: nn.Sequential(nn.Conv1d(8, 12, 3, padding=1)), lambda: torch.randn(2, 8, 9))
CONV2D: Build = (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1)), lambda: torch.randn(2, 8, 7, 7))
CONV3D: Build = (lambda: nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3))), lambda: torch.randn(2, 2, 3, 4, 5))
GROUPED: Build = (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), lambda: torch.randn(2, 8, 7, 7))
POINTWISE: Build = (lambda: nn.Sequential(nn.Conv2d(8, 12, 1)), lambda: torch.randn(2, 8, 3, 3))


class Case(NamedTuple):
    """A method's options on a base; `wrong` says what peft has wrong there, and is then left out of the comparison."""

    name: str
    kind: str
    build: Build
    options: dict[str, Any]
    wrong: dict[str, str] = {}  # noqa: RUF012  # a row of a table, which nothing writes to
    in_old: bool = True


def lokr(name: str, build: Build, options: dict[str, Any], *args: Any, **kwargs: Any) -> Case:
    return Case(f"LoKr, {name}", "LoKrConfig", build, options, *args, **kwargs)


def dora(name: str, build: Build, *args: Any, **options: Any) -> Case:
    return Case(f"DoRA, {name}", "LoraConfig", build, {"r": 2, "lora_alpha": 3, "use_dora": True, **options}, *args)


def oft(name: str, build: Build, *args: Any, **options: Any) -> Case:
    # Before 0.18 peft's sum of powers was another one.
    in_old = not options.get("use_cayley_neumann", True)
    return Case(f"OFT, {name}", "OFTConfig", build, {"oft_block_size": 4, **options}, *args, in_old=in_old)


VIEW = "'view size is not compatible with input tensor's size and stride'"
FOLDED = {"outputs": "patches are added up where they overlap", "forward": "the same"}
TUCKER: dict[str, Any] = {"use_effective_conv2d": True, "r": 1}
CASES = [
    lokr("whole factors", LINEAR, {"r": 8}),
    lokr("a product", LINEAR, {"r": 1, "alpha": 3}),
    lokr("both products", LINEAR, {"r": 1, "decompose_both": True}),
    lokr("factor 4", LINEAR, {"r": 2, "decompose_factor": 4}),
    lokr("a factor that does not divide", LINEAR, {"r": 2, "decompose_factor": 5}),
    lokr("patterns", LINEAR, {"r": 8, "rank_pattern": {"2": 1}, "alpha_pattern": {"0": 3}}),
    lokr("convolution, whole", CONV2D, {"r": 8}),
    lokr("convolution, a product", CONV2D, {"r": 1}),
    lokr("convolution, Tucker", CONV2D, TUCKER),
    lokr("convolution 1d, whole", CONV1D, {"r": 8}, in_old=False),
    lokr("convolution 1d, a product", CONV1D, {"r": 1}, in_old=False),
    lokr("convolution 1d, Tucker", CONV1D, TUCKER, {"outputs": VIEW, "merge": VIEW}, in_old=False),
    lokr("convolution with groups", GROUPED, {"r": 1}, in_old=False),
    lokr("pointwise convolution", POINTWISE, TUCKER),
    dora("linear", LINEAR),
    dora("linear, patterns", LINEAR, rank_pattern={"2": 1}, alpha_pattern={"0": 5}, use_rslora=True),
    dora("transposed", TURNED, {}, fan_in_fan_out=True),
    dora("embedding", TABLE),
    dora("convolution 1d", CONV1D),
    dora("convolution 2d", CONV2D),
    dora("convolution 3d", CONV3D),
    dora("pointwise convolution", POINTWISE),
    oft("linear", LINEAR),
    oft("linear, blocks by number", LINEAR, oft_block_size=0, r=4),
    oft("linear, exact", LINEAR, use_cayley_neumann=False),
    *(oft(f"linear, {terms} terms", LINEAR, num_cayley_neumann_terms=terms) for terms in (1, 2, 3, 4, 7)),
    oft("linear, a size that does not divide", LINEAR, oft_block_size=7),
    oft("linear, one block for all", LINEAR, block_share=True),
    oft("linear, constrained", LINEAR, oft_block_size=0, r=4, coft=True, eps=0.5),
    oft("embedding", TABLE),
    oft("pointwise convolution", POINTWISE),
    oft("convolution 2d", CONV2D, FOLDED),
]
CASES = [case for case in CASES if case.in_old or not oracle.IS_OLD]


def every_case(of: str = "") -> Any:
    having = [case for case in CASES if of not in case.wrong]
    return pytest.mark.parametrize("case", having, ids=[case.name for case in having])


def fresh(case: Case, **more: Any) -> tuple[nn.Module, Tensor, pf.Adapter]:
    """A base, a batch and an adapter as it begins, in float64."""
    build, batch = case.build
    torch.manual_seed(0)
    model = build().double().eval()
    x = batch()
    config = getattr(pf, case.kind)(target_modules="0|2", **case.options, **more)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* does not divide")
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


@every_case("outputs")
def test_outputs_and_gradients_are_pefts(case: Case, tmp_path: Path) -> None:
    model, x, adapter, other = made(case, tmp_path)
    expected = other(x)
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    is_felt = case.options.get("num_cayley_neumann_terms") != 1
    assert ((expected - model(x)).abs().max() > 1e-2) == is_felt
    if not is_felt:
        return
    expected.square().mean().backward()
    ours = grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean())(adapter.params)
    named = {key.replace(".default", ""): one.grad for key, one in other.named_parameters() if one.grad is not None}
    named = {key.removesuffix(".weight"): one for key, one in named.items()}
    assert len(named) == sum(map(len, ours.values()))
    for path, leaf in ours.items():
        for name, found in leaf.items():
            assert off(found, named[f"base_model.model.{path}.{name}"]) < EXACT


@every_case("merge")
def test_merging_gives_pefts_weights(case: Case, tmp_path: Path) -> None:
    model, x, adapter, other = made(case, tmp_path)
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(merged, dict(other.merge_and_unload().named_parameters())) < EXACT
    assert off(functional_call(model, merged, (x,)), pf.apply(model, adapter, x)) < EXACT


@every_case()
def test_files_are_read_both_ways(case: Case, tmp_path: Path) -> None:
    model, x, adapter, other = made(case, tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", model)
    assert off(again.params, adapter.params) == 0.0
    assert off(pf.apply(model, again, x), pf.apply(model, adapter, x)) == 0.0


@every_case()
@pytest.mark.parametrize("is_neutral", [True, False])
def test_a_fresh_adapter_has_pefts_shapes_and_is_the_identity(case: Case, is_neutral: bool) -> None:
    init = "init_lora_weights" if case.kind == "LoraConfig" else "init_weights"
    model, x, adapter = fresh(case, **{init: is_neutral})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, case.kind)(target_modules="0|2", **case.options, **{init: is_neutral})
        other = peft.get_peft_model(copy.deepcopy(model), config)
    expected = {
        key.replace(".default", "").removesuffix(".weight"): tuple(one.shape)
        for key, one in other.named_parameters()
        if one.requires_grad
    }
    found = {
        f"base_model.model.{path}.{name}": tuple(one.shape)
        for path, leaf in adapter.params.items()
        for name, one in leaf.items()
    }
    assert found == expected
    stays = is_neutral or case.options.get("num_cayley_neumann_terms") == 1 or case.options.get("use_dora")
    if stays and not (case.options.get("use_dora") and not is_neutral):
        assert torch.equal(pf.apply(model, adapter, x), model(x))
