"""PSOFT against peft, which decomposes in float32 alone, and its formula: both are held to the float64 truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from exact import assert_close_to_truth, off
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import grad

import peftfn as pf

OPTIONS: dict[str, dict[str, Any]] = {
    "a rotation": {"psoft_alpha": 6},
    "both factors have roots": {"ab_svd_init": "pissa_init"},
    "a sum of powers, kept short": {"use_cayley_neumann": True, "cayley_neumann_eps": 0.3},
    "a sum of three powers": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "psoft_mag_b": False},
    "any matrix": {"psoft_orth": False, "psoft_mag_a": False},
    "a random projection": {"psoft_svd": "lowrank", "random_seed": 5, "psoft_svd_lowrank_niter": 2},
}


def model_and_batch() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)), torch.randn(3, 5, 12)


def config(**options: Any) -> pf.PsoftConfig:
    return pf.PsoftConfig(**{"r": 4, "target_modules": ["0", "2"], **options})


def by_hand(config: pf.PsoftConfig, leaf: Any, a: Tensor, b: Tensor) -> Tensor:
    """s·B·(R - I)·A, (out, in), in float64."""
    given, r = leaf["psoft_R"], config.r
    eye, rotation = torch.eye(r, dtype=torch.float64), given
    if config.psoft_orth:
        q = torch.zeros(r, r, dtype=torch.float64)
        q[tuple(torch.triu_indices(r, r, 1))] = given
        q = q - q.T
        if config.use_cayley_neumann:
            most = config.cayley_neumann_eps
            q = q if most is None or q.norm() <= most else q * (most / (q.norm() + 1e-12))
            powers = [torch.linalg.matrix_power(q, n) for n in range(config.num_cayley_neumann_terms)]
            rotation = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
        else:
            rotation = (eye + q) @ torch.linalg.inv(eye - q)
    rotation = torch.diag(leaf.get("psoft_vector_b", torch.ones(r).double())) @ rotation
    rotation = rotation @ torch.diag(leaf.get("psoft_vector_a", torch.ones(r).double()))
    return config.psoft_alpha / r * b.double() @ (rotation - eye) @ a.double()


@oracle.by_new_peft
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_outputs_gradients_merges_and_files_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = model_and_batch()
    fresh, before = pf.init(model, config(**options)), snapshot(model)
    assert torch.equal(pf.apply(model, fresh, x), model(x))
    adapter = oracle.randomised(fresh)
    pf.save(adapter, tmp_path / "ours")
    theirs = oracle.loaded(model, tmp_path / "ours")
    for path, held in adapter.buffers.items():
        layer = theirs.base_model.model[int(path)]
        assert torch.equal(held["psoft_A"], layer._psoft_A_cache["default"])
        assert off(held["psoft_B"], layer._psoft_B_cache["default"]) < 1e-6  # products of another kernel

    def truth(params: Any) -> Tensor:
        hidden = x.double()
        for path in ("0", "2"):
            held = adapter.buffers[path]
            change = by_hand(adapter.config, params[path], held["psoft_A"], held["psoft_B"])
            layer = model[int(path)]
            hidden = hidden @ (layer.weight.double() + change).T + layer.bias.double()
            hidden = hidden.tanh() if path == "0" else hidden
        return hidden

    exact = {path: {name: one.double() for name, one in leaf.items()} for path, leaf in adapter.params.items()}
    expected, found = theirs(x), pf.apply(model, adapter, x)
    assert_close_to_truth(found, expected, truth(exact))
    assert off(found, model(x)) > 1e-2
    ours = grad(lambda p: pf.apply(model, adapter.replace(params=p), x).square().mean())(adapter.params)
    slopes = grad(lambda p: truth(p).square().mean())(exact)
    named = oracle.gradients_of(theirs, x)
    keys = {"psoft_R": "weight", "psoft_vector_a": "vector_a", "psoft_vector_b": "vector_b"}
    reference = {
        path: {name: named[f"base_model.model.{path}.psoft_R.{keys[name]}"] for name in leaf}
        for path, leaf in ours.items()
    }
    assert_close_to_truth(ours, reference, {p: {n: t * 1.0 for n, t in leaf.items()} for p, leaf in slopes.items()}, 32)
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(merged, {name: one for name, one in oracle.merged_of(theirs).items() if name in merged}) < 1e-6
    with oracle.quiet_peft():
        theirs.save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", model)
    assert off((again.params, again.buffers), (adapter.params, adapter.buffers)) == 0.0
    assert snapshot(model) == before


def test_the_factors_of_a_file_are_made_of_the_base_again(tmp_path: Path) -> None:
    model, _ = model_and_batch()
    pf.save(pf.init(model, config()), tmp_path)
    with pytest.raises(ValueError, match="made of the base's weights, and its file does not hold it; pass the base"):
        pf.load(tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    with pytest.raises(ValueError, match="the model is on the meta device"):
        pf.load(tmp_path, empty)


def test_dropout_acts_in_training_alone() -> None:
    model, x = model_and_batch()
    adapter = oracle.randomised(pf.init(model, config(psoft_dropout=0.5)))
    assert torch.equal(pf.apply(model, adapter, x), pf.apply(model, adapter, x)) is False
    assert torch.equal(pf.apply(model.eval(), adapter, x), pf.apply(model, adapter, x))


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"2: r=7, and the weight has no more than 6 singular values", {"r": 7}),
        (r"psoft_svd='fast'; expected 'full' or 'lowrank'", {"psoft_svd": "fast"}),
        (r"ab_svd_init='zeros'; expected", {"ab_svd_init": "zeros"}),
        (r"cayley_neumann_eps=1.5; expected a number between", {"cayley_neumann_eps": 1.5}),
        (r"psoft_dropout=1.0; expected a probability", {"psoft_dropout": 1.0}),
    ],
)
def test_what_makes_no_sense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.init(model_and_batch()[0], config(**options))
