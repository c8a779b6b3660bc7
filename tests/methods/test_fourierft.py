"""FourierFT where the tables of tests say nothing: its places, its mathematics, stacks of unlike numbers, refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from compiled import one_graph
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import grad, vmap

import peftfn as pf
from peftfn.methods import places


def config(**options: Any) -> pf.FourierFTConfig:
    return pf.FourierFTConfig(**{"n_frequency": 7, "target_modules": ["0"], "init_weights": True, **options})


def model(inputs: int = 10, outputs: int = 6) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


def test_places_are_torchs_permutation_whatever_is_around_them() -> None:
    expected = torch.randperm(60, generator=torch.Generator().manual_seed(5))[:7]
    before = torch.get_rng_state()

    def moved(x: Tensor) -> Tensor:
        with torch.device("meta"):
            return x + places.drawn(5, 60, 7, torch.device("cpu"))

    found = vmap(moved, randomness="different")(torch.zeros(3, 1))
    assert torch.equal(found, expected.float().expand(3, 7))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(places.drawn(5, 60, 3, torch.device("cpu")), expected[:3])


@one_graph
def test_layers_of_unlike_shape_compile_whole_together() -> None:
    base, x = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 5)).double(), torch.randn(3, 10).double()
    adapter = oracle.randomised(pf.init(base, config(target_modules=["0", "1"])))

    def value(params: Any) -> Tensor:
        return pf.apply(base, adapter.replace(params=params), x).square().sum()

    def slopes(params: Any) -> Any:
        return grad(value)(params)

    compiled = torch.compile(slopes, fullgraph=True, backend="aot_eager")
    assert off(compiled(adapter.params), slopes(adapter.params)) < EXACT


def test_the_update_is_a_sum_of_waves() -> None:
    base = model()
    adapter = oracle.randomised(pf.init(base, config(scaling=30.0)))
    change = pf.merge(dict(base.named_parameters()), adapter)["0.weight"] - base[0].weight
    rows, columns = torch.arange(6.0).double()[:, None], torch.arange(10.0).double()
    where = torch.randperm(60, generator=torch.Generator().manual_seed(777))[:7]
    waves = [
        value * torch.cos(2 * math.pi * (rows * (place // 10) / 6 + columns * (place % 10) / 10))
        for value, place in zip(adapter.params["0"]["fourierft_spectrum"], where, strict=True)
    ]
    assert off(change, 30.0 / 60 * sum(waves)) < EXACT


def test_it_begins_at_random_unless_it_is_asked_not_to() -> None:
    base, x = model(), torch.randn(3, 10).double()
    assert not torch.equal(pf.apply(base, pf.init(base, config(init_weights=False)), x), base(x))
    assert pf.FourierFTConfig().init_weights is False


def test_adapters_with_unlike_numbers_of_coefficients_and_scalings_stack() -> None:
    base, x = model(), torch.randn(4, 10).double()
    options = [{"n_frequency": 3, "scaling": 40.0}, {"n_frequency": 9, "n_frequency_pattern": {"0": 8}}]
    adapters = [oracle.randomised(pf.init(base, config(**one)), seed) for seed, one in enumerate(options)]
    stacked = pf.stack(adapters)
    assert stacked.params["0"]["fourierft_spectrum"].shape == (2, 8)
    routed = pf.apply(base, stacked, x, index=[0, 1, -1, 0])
    alone = [pf.apply(base, adapter, x) for adapter in adapters]
    assert off(routed, torch.stack([alone[0][0], alone[1][1], base(x)[2], alone[0][3]])) < EXACT

    def value(params: Any, adapter: pf.Adapter) -> Tensor:
        return pf.apply(base, adapter.replace(params=params), x).square().sum()

    gradients = vmap(grad(value))(stacked.params, stacked)["0"]["fourierft_spectrum"]
    assert off(gradients[1], grad(value)(adapters[1].params, adapters[1])["0"]["fourierft_spectrum"]) < EXACT
    assert torch.equal(gradients[0, 3:], torch.zeros(5).double()), "what is filled up is not trained"
    for one, adapter in zip(pf.unstack(stacked), adapters, strict=True):
        assert off(one.params, adapter.params) == 0.0


def test_adapters_with_unlike_places_do_not_stack() -> None:
    base = model()
    adapters = [pf.init(base, config(random_loc_seed=seed)) for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"random_loc_seed of \['1', '2'\]; expected one value"):
        pf.stack(adapters)


def test_more_coefficients_than_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0: n_frequency=1000, and its weight has 60 numbers"):
        pf.init(model(), config(n_frequency=1000))
    adapter = pf.init(model(), config(n_frequency=60))
    with pytest.raises(ValueError, match=r"has fourierft_spectrum \(60,\), expected fourierft_spectrum \(12,\)"):
        pf.apply(model(4, 3), adapter, torch.zeros(1, 4).double())
    pf.save(adapter.replace(config=dataclasses.replace(adapter.config, n_frequency=8)), tmp_path)
    with pytest.raises(ValueError, match="60 coefficients, and the config says 8 for '0'"):
        pf.load(tmp_path)


@pytest.mark.parametrize(
    ("error", "said", "options"),
    [
        (ValueError, r"n_frequency=0; expected a positive integer", {"n_frequency": 0}),
        (ValueError, r"n_frequency=-2; expected a positive integer", {"n_frequency_pattern": {"0": -2}}),
        (ValueError, r"bias='some'; expected 'none', 'all' or 'fourierft_only'", {"bias": "some"}),
        (TypeError, r"random_loc_seed=None\): expected int", {"random_loc_seed": None}),
        (ValueError, r"n_frequency_pattern=\{'\*': 3\}\): '\*' is no regex", {"n_frequency_pattern": {"*": 3}}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(error: Any, said: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=said):
        config(**options)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="n_frequency_pattern"):
        pf.init(model(), config(n_frequency_pattern={"query": 3}))
