"""RoAd where the registry says nothing: what a pair is, biases, exclusions, sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf


def test_a_pair_of_outputs_is_turned_with_its_bias() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8)).double(), torch.randn(2, 3).double()
    adapter = oracle.randomised(pf.init(model, pf.RoadConfig(group_size=4, target_modules=["0"])))
    angles, scales = (adapter.params["0"][name] for name in ("road_theta", "road_alpha"))
    z, expected = model(x), torch.empty(2, 8, dtype=torch.float64)
    for number, (first, second) in enumerate([(0, 2), (1, 3), (4, 6), (5, 7)]):
        cosine, sine = (scales[number] * f(angles[number]) for f in (torch.cos, torch.sin))
        expected[:, first] = cosine * z[:, first] - sine * z[:, second]
        expected[:, second] = sine * z[:, first] + cosine * z[:, second]
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(merged["0.bias"], pf.apply(model, adapter, torch.zeros(1, 3).double())[0]) < EXACT


@oracle.by_new_peft
def test_an_adapter_names_what_is_left_of_its_targets_for_peft_excludes_nothing(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4)
    config = pf.RoadConfig(group_size=4, target_modules="0|2", exclude_modules=["2"])
    adapter = oracle.randomised(pf.init(model, config))
    pf.save(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "0"
    torch.testing.assert_close(oracle.loaded(model, tmp_path)(x), pf.apply(model, adapter, x))
    assert set(pf.load(tmp_path).params) == {"0"}


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"variant='road_3'; expected one of road_1, road_2, road_4", {"variant": "road_3"}),
        (r"group_size=3; expected an even number above 0", {"group_size": 3}),
        (r"group_size=0; expected an even number above 0", {"group_size": 0}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.RoadConfig(**options)


def test_outputs_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0: group_size=64 does not divide its 6 outputs"):
        pf.init(nn.Sequential(nn.Linear(8, 6)), pf.RoadConfig(target_modules=["0"]))


def test_unlike_variants_do_not_stack() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    made = [pf.init(model, pf.RoadConfig(variant=v, group_size=4, target_modules=["0"])) for v in ("road_1", "road_2")]
    with pytest.raises(ValueError, match=r"variant of \['road_1', 'road_2'\]; expected one value"):
        pf.stack(made)
