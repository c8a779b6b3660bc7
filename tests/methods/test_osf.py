"""OSF where peft says nothing, or something else: gradients off the larger parts, Conv1D, two adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers.pytorch_utils import Conv1D

import peftfn as pf


def model_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double(), torch.randn(3, 12).double()


def made(model: nn.Module, seed: int = 0, **options: Any) -> pf.Adapter:
    return oracle.randomised(pf.init(model, pf.OSFConfig(target_modules=["0", "2"], **options)), seed)


def test_gradients_have_nothing_along_the_parts_that_stay() -> None:
    model, x = model_and_batch()
    adapter = made(model, effective_rank=4)
    slopes = grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean())(adapter.params)
    for path in ("0", "2"):
        u, _, vh = torch.linalg.svd(model[int(path)].weight.detach(), full_matrices=False)
        along_u = u[:, :4].T @ slopes[path]["osf_U_low"]
        along_v = slopes[path]["osf_V_low"] @ vh[:4].T
        # The parts are of a float32 decomposition, as peft's.
        assert along_u.abs().max() < 1e-4 * slopes[path]["osf_U_low"].abs().max()
        assert along_v.abs().max() < 1e-4 * slopes[path]["osf_V_low"].abs().max()
        assert slopes[path]["osf_S_low"].abs().min() > 0


@pytest.mark.parametrize(("share", "stays"), [(None, 6), (0.75, 9), (1, 1), (5, 5)])
def test_a_share_and_a_number_say_how_many_parts_stay(share: Any, stays: int) -> None:
    model, _ = model_and_batch()
    adapter = pf.init(model, pf.OSFConfig(target_modules=["0"], effective_rank=share))
    assert adapter.params["0"]["osf_S_low"].shape == (12 - stays,)
    assert torch.equal(adapter.params["0"]["osf_U_low"], adapter.buffers["0"]["osf_U_start"])


def test_a_conv1d_is_trained_and_two_adapters_add_up() -> None:
    model, x = nn.Sequential(Conv1D(20, 12), nn.Tanh(), Conv1D(6, 20)).double(), torch.randn(3, 12).double()
    one, other = made(model, 1), made(model, 2)
    params = dict(model.named_parameters())
    assert off(functional_call(model, pf.merge(params, one), (x,)), pf.apply(model, one, x)) < EXACT
    both = functional_call(model, pf.merge(params, (one, other)), (x,))
    assert off(pf.apply(model, (one, other), x), both) < EXACT
    assert off(both, pf.apply(model, one, x)) > 1e-2


@oracle.by_new_peft
def test_parts_of_a_half_precision_weight_are_rounded_as_pefts(tmp_path: Path) -> None:
    model = model_and_batch()[0].to(torch.bfloat16)
    adapter = pf.init(model, pf.OSFConfig(target_modules=["0"]))
    pf.save(adapter, tmp_path)
    layer = oracle.loaded(model, tmp_path).base_model.model[0]
    held = adapter.buffers["0"]
    assert held["osf_U_start"].dtype == torch.float32
    assert torch.equal(held["osf_U_start"], layer._osf_U_low_init["default"].float())
    assert torch.equal(held["osf_V_start"], layer._osf_V_low_init["default"].float())
    assert torch.equal(held["osf_U_high"], layer._osf_U_high["default"].float())


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"0: 12 of the 12 singular parts would stay", {"effective_rank": 12}),
        (r"effective_rank=2.5; expected a number of singular parts", {"effective_rank": 2.5}),
        (r"rank_pattern has 'q_proj', which is found in none of the 2 sites' paths", {"rank_pattern": {"q_proj": 2}}),
    ],
)
def test_what_makes_no_sense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        made(model_and_batch()[0], **options)


def test_all_linear_layers_are_taken_where_peft_knows_no_names(tmp_path: Path) -> None:
    model, x = model_and_batch()
    adapter = pf.init(model, pf.OSFConfig())
    assert list(adapter.params) == ["0", "2"]
    again = pf.load(pf.save(oracle.randomised(adapter), tmp_path), model)
    assert off(pf.apply(model, again, x), pf.apply(model, oracle.randomised(adapter), x)) == 0.0
