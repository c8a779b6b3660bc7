"""DEFT where the registry says nothing: PaRa, starts, dropout, what is off, two adapters, packed bases."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import peft
import pytest
import quantized
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import grad, vmap

import peftfn as pf

# peft computes in float32: a few sums of a few numbers.
FLOAT32 = 1e-6


def one_layer(**options: Any) -> tuple[nn.Module, Tensor, pf.Adapter]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(3, 8).double()
    adapter = pf.init(model, pf.DeftConfig(target_modules=["0"], **{"r": 3, **options}), dtype=torch.float64)
    return model, x, adapter


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_a_subspace_is_taken_out_and_another_matrix_put_in(method: str) -> None:
    model, x, adapter = one_layer(decomposition_method=method, alpha=6)
    adapter = oracle.randomised(adapter)
    p, r, weight = adapter.params["0"]["deft_P"], adapter.params["0"]["deft_R"], model[0].weight
    q, e = (p, p.relu()) if method == "relu" else (torch.linalg.qr(p).Q,) * 2
    changed = (torch.eye(6, dtype=torch.float64) - q @ e.T) @ weight + 2 * q @ r
    assert off(pf.apply(model, adapter, x), x @ changed.T + model[0].bias) < EXACT
    assert off(pf.merge(dict(model.named_parameters()), adapter)["0.weight"], changed) < EXACT


@oracle.by_new_peft
@pytest.mark.parametrize("method", ["relu", "qr"])
def test_para_is_pefts_and_takes_out_alone(method: str) -> None:
    model, x, adapter = one_layer(decomposition_method=method, para=True)
    assert set(adapter.params["0"]) == {"deft_P"}
    adapter = oracle.randomised(adapter)
    config = peft.DeftConfig(r=3, target_modules=["0"], decomposition_method=method, para=True)
    other = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    own = other.base_model.model[0].deft_P["default"]
    own.data.copy_(adapter.params["0"]["deft_P"])
    expected = other(x)
    assert off(pf.apply(model, adapter, x), expected) < FLOAT32
    expected.square().sum().backward()
    ours = grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().sum())(adapter.params)
    assert off(ours["0"]["deft_P"], own.grad) < FLOAT32


@pytest.mark.parametrize("options", [{}, {"decomposition_method": "qr"}, {"alpha": 6}, {"r": 9}])
def test_a_start_changes_nothing_to_the_last_bit_in_float32_too(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(50, 6)), torch.randn(9, 50)
    adapter = pf.init(model, pf.DeftConfig(target_modules=["0"], **{"r": 3, **options}))
    assert torch.equal(pf.apply(model, adapter, x), model(x))
    assert torch.equal(pf.merge(dict(model.named_parameters()), adapter)["0.weight"], model[0].weight)


def test_a_random_start_has_the_deviation_that_is_asked() -> None:
    model = nn.Sequential(nn.Linear(2000, 6))
    adapter = pf.init(model, pf.DeftConfig(r=3, target_modules=["0"], init_weights=False, init_scale=5.0))
    assert abs(float(adapter.params["0"]["deft_R"].std()) - 0.1) < 0.005


def test_dropout_is_on_what_is_put_in_alone() -> None:
    model, _, adapter = one_layer(deft_dropout=0.25)
    adapter, x = oracle.randomised(adapter), torch.ones(4000, 8).double()
    p, r = adapter.params["0"]["deft_P"], adapter.params["0"]["deft_R"]
    taken_out = (model[0].weight - p @ p.relu().T @ model[0].weight) @ x[0] + model[0].bias
    found = pf.apply(model.train(), adapter, x)
    # What is put in is linear in the mask, of which r parts can be seen: its mean is 1, its deviation √(p / (1 - p)).
    put_in = torch.linalg.lstsq(p, (found - taken_out).T).solution
    assert off((found - taken_out).T, p @ put_in) < EXACT
    assert off(put_in.mean(1), r.sum(1)) < 0.1
    assert off(put_in.std(1), (r.square().sum(1) / 3).sqrt()) < 0.1
    assert torch.equal(pf.apply(model.eval(), adapter, x), pf.apply(model, adapter, x))


def test_a_row_of_the_base_is_that_whatever_the_subspace() -> None:
    """Zeros have orthonormal columns too, by "qr"."""
    model, x, _ = one_layer()
    made = [oracle.randomised(one_layer(decomposition_method="qr", alpha=alpha)[2], alpha) for alpha in (3, 6)]
    stacked = pf.stack(made)
    routed = pf.apply(model, stacked, x, index=[1, -1, 0])
    assert torch.equal(routed[1], model(x)[1])
    assert off(routed[0], pf.apply(model, made[1], x)[0]) < EXACT
    together = vmap(lambda one: pf.apply(model, one, x))(stacked)
    assert off(together, torch.stack([pf.apply(model, one, x) for one in made])) < EXACT
    params = {
        path: {name: one.clone().requires_grad_() for name, one in leaf.items()}
        for path, leaf in stacked.params.items()
    }
    pf.apply(model, stacked.replace(params=params), x, index=[1, -1, 0]).sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in params["0"].values())


def test_the_second_adapter_takes_its_subspace_out_of_what_the_first_one_made() -> None:
    model, x, _ = one_layer()
    made = [oracle.randomised(one_layer()[2], seed) for seed in (1, 2)]
    merged = pf.merge(pf.merge(dict(model.named_parameters()), made[0]), made[1])
    assert off(pf.apply(model, made, x), torch.func.functional_call(model, merged, (x,))) < EXACT


def test_a_packed_weight_is_read_for_what_is_taken_out() -> None:
    model = quantized.packed(nn.Sequential(nn.Linear(64, 32)), "nf4")
    x = torch.randn(3, 64)
    fresh = pf.init(model, pf.DeftConfig(r=4, target_modules=["0"]))
    assert torch.equal(pf.apply(model, fresh, x), pf.apply(model, (), x))
    adapter = oracle.randomised(fresh)
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    expected = x @ merged["0.weight"].T + model[0].bias
    torch.testing.assert_close(pf.apply(model, adapter, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"decomposition_method='svd'; expected 'relu' or 'qr'", {"decomposition_method": "svd"}),
        (r"deft_dropout=1.0; expected a probability", {"deft_dropout": 1.0}),
        (r"bias='lora_only'; expected 'none', 'all' or 'deft_only'", {"bias": "lora_only"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.DeftConfig(**options)


def test_the_start_needs_the_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0: DEFT starts from what P takes out of the weight"):
        pf.init(model, pf.DeftConfig(target_modules=["0"]))
