"""HiRA where the registry says nothing: how it starts, dropout, groups, two adapters, packed bases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import quantized
import torch
from exact import EXACT, off
from torch import nn
from torch.func import functional_call, grad, vmap

import peftfn as pf


def test_a_gaussian_start_is_pefts_and_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(2000, 4)), torch.randn(2, 2000)
    adapter = pf.init(model, pf.HiraConfig(r=4, target_modules=["0"], init_weights="gaussian"))
    assert abs(float(adapter.params["0"]["hira_A"].std()) - 1 / 4) < 0.01
    assert torch.equal(pf.apply(model, adapter, x), model(x))


def test_a_start_of_none_is_random_but_for_embeddings() -> None:
    """PEFT takes None for False, and for True where it makes an embedding's."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    adapter = pf.init(model, pf.HiraConfig(r=4, target_modules=["0", "1"], init_weights=None))
    assert bool((adapter.params["0"]["hira_embedding_A"] == 0).all())
    assert bool((adapter.params["1"]["hira_B"] != 0).all())


def test_dropout_is_on_what_the_update_is_given() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(1, 1, bias=False)).train(), torch.ones(4000, 1)
    adapter = oracle.randomised(pf.init(model, pf.HiraConfig(r=2, hira_dropout=0.25, target_modules=["0"])))
    leaf = adapter.params["0"]
    share = (pf.apply(model, adapter, x) - model(x)) / (model[0].weight * (leaf["hira_B"] @ leaf["hira_A"]))
    kept = share > 0.5
    torch.testing.assert_close(share, kept * (4 / 3), rtol=0, atol=1e-3)
    assert 0.7 < float(kept.float().mean()) < 0.8


def test_a_convolution_with_groups_has_the_inputs_of_one() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)).double(), torch.randn(2, 8, 5, 5).double()
    adapter = oracle.randomised(pf.init(model, pf.HiraConfig(r=3, target_modules=["0"])))
    a, b = (adapter.params["0"][name] for name in ("hira_A", "hira_B"))
    assert a.shape == (3, 4, 3, 3)
    weight = model[0].weight
    changed = weight + weight * torch.einsum("orxy,rikl->oikl", b, a)
    assert off(pf.apply(model, adapter, x), functional_call(model, {"0.weight": changed}, (x,))) < EXACT


def test_the_second_adapter_multiplies_what_the_first_one_made() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), torch.randn(3, 6).double()
    made = [oracle.randomised(pf.init(model, pf.HiraConfig(r=r, target_modules=["0"])), r) for r in (2, 3)]
    weight = model[0].weight
    for one in made:
        weight = weight * (1 + one.params["0"]["hira_B"] @ one.params["0"]["hira_A"])
    assert off(pf.apply(model, made, x), x @ weight.T + model[0].bias) < EXACT
    assert off(pf.merge(pf.merge(dict(model.named_parameters()), made[0]), made[1])["0.weight"], weight) < EXACT


def test_unlike_ranks_stack_and_padding_stays_nothing() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), torch.randn(3, 6).double()
    configs = [
        pf.HiraConfig(r=2, target_modules=["0"]),
        pf.HiraConfig(r=5, target_modules=["0"], rank_pattern={"0": 3}),
    ]
    adapters = [oracle.randomised(pf.init(model, config), seed) for seed, config in enumerate(configs)]
    stacked = pf.stack(adapters)
    together = vmap(lambda one: pf.apply(model, one, x))(stacked)
    value = lambda params, one: pf.apply(model, one.replace(params=params), x).square().sum()  # noqa: E731
    gradients = vmap(grad(value))(stacked.params, stacked)["0"]
    for number, adapter in enumerate(adapters):
        assert off(together[number], pf.apply(model, adapter, x)) < EXACT
    assert bool((gradients["hira_A"][0, 2:] == 0).all())
    assert bool((gradients["hira_B"][0, :, 2:] == 0).all())


@pytest.mark.parametrize("kind", ["nf4", "8-bit"])
def test_a_packed_weight_is_read_for_its_update(kind: str) -> None:
    model = quantized.packed(nn.Sequential(nn.Linear(64, 32)), kind)
    x = torch.randn(3, 64)
    fresh = pf.init(model, pf.HiraConfig(r=4, target_modules=["0"]))
    base = pf.apply(model, (), x)
    assert torch.equal(pf.apply(model, fresh, x), base)
    adapter = oracle.randomised(fresh)
    read = pf.merge(dict(model.named_parameters()), fresh, model=model)["0.weight"]
    leaf = adapter.params["0"]
    expected = base + x @ (read * (leaf["hira_B"] @ leaf["hira_A"])).T
    torch.testing.assert_close(pf.apply(model, adapter, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"r=0; expected a positive integer", {"rank_pattern": {"0": 0}}),
        (r"hira_dropout=1.0; expected a probability", {"hira_dropout": 1.0}),
        (r"init_weights='zero'; expected True, False or 'gaussian'", {"init_weights": "zero"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.HiraConfig(**options)


@oracle.by_new_peft
def test_ranks_by_pattern_come_back_and_pefts_files_do_not_have_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    options: dict[str, Any] = {"r": 3, "target_modules": ["0", "1"], "rank_pattern": {"1": 2}}
    adapter = pf.init(model, pf.HiraConfig(**options))
    assert {path: leaf["hira_A"].shape[0] for path, leaf in adapter.params.items()} == {"0": 3, "1": 2}
    assert off(pf.load(pf.save(adapter, tmp_path / "ours"), model).params, adapter.params) == 0.0
    other = peft.get_peft_model(copy.deepcopy(model), peft.HiraConfig(**options))
    assert other.base_model.model[1].hira_A["default"].shape[0] == 3
    other.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"rank 3, and the config says 2 \(peft 0\.21 makes every site of rank r"):
        pf.load(tmp_path / "theirs")


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rank_pattern"):
        pf.init(nn.Sequential(nn.Linear(4, 4)), pf.HiraConfig(target_modules=["0"], rank_pattern={"7": 3}))
