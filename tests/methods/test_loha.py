"""LoHa where the tables of tests say nothing: rank, dropout, files that lack a part, stacks of unlike rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from safetensors.torch import load_file, save_file
from torch import nn

import peftfn as pf

WEIGHTS = "adapter_model.safetensors"


def config(**options: Any) -> pf.LoHaConfig:
    return pf.LoHaConfig(**{"r": 2, "target_modules": ["0"], **options})


def test_the_update_has_the_square_of_its_rank() -> None:
    model = nn.Sequential(nn.Linear(20, 24, bias=False)).double()
    adapter = oracle.randomised(pf.init(model, config(r=3)))
    change = pf.merge(dict(model.named_parameters()), adapter)["0.weight"] - model[0].weight
    assert int(torch.linalg.matrix_rank(change)) == 9


def test_dropout_drops_rows_and_makes_up_for_them_or_drops_the_whole_update() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 2000, bias=False)).train(), torch.randn(1, 12)
    adapter = oracle.randomised(pf.init(model, config(rank_dropout=0.25)))
    whole = pf.apply(model.eval(), adapter, x) - model(x)
    left = pf.apply(model.train(), adapter, x) - model(x)
    kept = left.abs() > 1e-6
    share = kept.float().mean()
    assert 0.7 < share < 0.8
    torch.testing.assert_close(left[kept] * share, whole[kept], rtol=1e-2, atol=1e-4)
    adapter = adapter.replace(config=config(module_dropout=0.5))
    is_gone = [bool(((pf.apply(model, adapter, x) - model(x)).abs() < 1e-6).all()) for _ in range(60)]
    assert 10 < sum(is_gone) < 50


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
def test_where_every_row_is_dropped_nothing_is_added(kind: str) -> None:
    """peft divides by the mean of what is kept, which is then zero."""
    model, x = nn.Sequential(nn.Linear(3, 2)).train(), torch.randn(4, 3)
    extra = {"rank_dropout_scale": True} if kind == "LoKrConfig" else {}
    made = getattr(pf, kind)(r=2, target_modules=["0"], rank_dropout=0.95, **extra)
    adapter = oracle.randomised(pf.init(model, made))
    found = [pf.apply(model, adapter, x) for _ in range(40)]
    assert all(bool(one.isfinite().all()) for one in found)
    assert any(torch.equal(one, model(x)) for one in found)


def test_adapters_of_unlike_rank_stack_in_tucker_form_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 1)).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    options = {"target_modules": ["0", "2"], "use_effective_conv2d": True}
    adapters = [oracle.randomised(pf.init(model, config(r=r, alpha=4 * r, **options)), r) for r in (1, 3)]
    stacked = pf.stack(adapters)
    assert stacked.params["0"]["hada_t1"].shape == (2, 3, 3, 3, 3)
    routed = pf.apply(model, stacked, x, index=[1, 0])
    for row, number in enumerate([1, 0]):
        assert off(routed[row], pf.apply(model, adapters[number], x)[row]) < EXACT
    for one, adapter in zip(pf.unstack(stacked), adapters, strict=True):
        assert off(one.params, adapter.params) == 0.0


@pytest.mark.parametrize(
    ("said", "change"),
    [
        (r"no hada_w2_a for '0'; expected a whole adapter", {"gone": "hada_w2_a"}),
        (r"no hada_t2 for '0'; expected a whole adapter", {"gone": "hada_t2"}),
        (r"rank 2, and the config says 4 for '0'", {"r": 4}),
    ],
)
def test_a_file_that_is_not_whole_is_refused(said: str, change: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    adapter = pf.init(model, config(use_effective_conv2d=True))
    if "r" in change:
        adapter = adapter.replace(config=dataclasses.replace(adapter.config, r=change["r"]))
    pf.save(adapter, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key: one for key, one in tensors.items() if change.get("gone", "none") not in key}, tmp_path / WEIGHTS)
    with pytest.raises((KeyError, ValueError), match=said):
        pf.load(tmp_path)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"r=-1; expected a positive integer", {"rank_pattern": {"0": -1}}),
        (r"rank_dropout=1.0; expected a probability", {"rank_dropout": 1.0}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        config(**options)
