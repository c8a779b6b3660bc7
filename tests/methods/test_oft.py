"""OFT where peft says nothing: what files mean, sizes that do not divide, dropout, packed bases."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf
from peftfn.methods.oft import rotation


def test_exact_rotations_are_orthogonal_and_a_sum_of_many_powers_is_their_transpose() -> None:
    triangles = 0.05 * torch.randn(3, 28, dtype=torch.float64)
    exact = rotation(pf.OFTConfig(use_cayley_neumann=False), triangles)
    assert off(exact @ exact.mT, torch.eye(8, dtype=torch.float64).expand(3, 8, 8)) < EXACT
    summed = rotation(pf.OFTConfig(num_cayley_neumann_terms=60), triangles)
    assert off(summed, exact.mT) < EXACT


def test_a_file_from_before_the_sum_changed_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = oracle.randomised(pf.init(model, pf.OFTConfig(oft_block_size=4, target_modules=["0"])))
    pf.save(adapter, tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written["peft_version"] == "0.18.0"
    for version in (None, "0.17.1"):
        path.write_text(json.dumps({**written, "peft_version": version}))
        with pytest.raises(ValueError, match=r"use_cayley_neumann, which was another sum before 0\.18"):
            pf.load(tmp_path)
    path.write_text(json.dumps({**written, "peft_version": None, "use_cayley_neumann": False}))
    assert off(pf.load(tmp_path).params, adapter.params) == 0.0


def test_of_a_size_that_does_not_divide_the_nearest_is_taken_without_a_warning() -> None:
    adapter = pf.init(nn.Sequential(nn.Linear(12, 3)), pf.OFTConfig(oft_block_size=5, target_modules=["0"]))
    assert adapter.params["0"]["oft_R"].shape == (3, 6)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0 and oft_block_size=0; expected one of them to be 0", {"oft_block_size": 0}),
        (r"r=4 and oft_block_size=32; expected one of them", {"r": 4}),
        (r"module_dropout=1.0; expected a probability", {"module_dropout": 1.0}),
        (r"bias='lora_only'; expected 'none', 'all' or 'oft_only'", {"bias": "lora_only"}),
        (r"eps=0; expected a number above 0", {"eps": 0}),
        (r"num_cayley_neumann_terms=0; expected a positive", {"num_cayley_neumann_terms": 0}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.OFTConfig(**options)


def test_dropout_leaves_a_share_of_the_blocks_as_they_are_in_training_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 40, bias=False)), torch.randn(1, 40)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(40))
    config = pf.OFTConfig(oft_block_size=4, module_dropout=0.35, target_modules=["0"])
    adapter = oracle.randomised(pf.init(model, config))
    whole = pf.apply(model.eval(), adapter, x)
    kept: set[tuple[bool, ...]] = set()
    for _ in range(10):
        found = pf.apply(model.train(), adapter, x).view(10, 4)
        same, gone = found == x.view(10, 4), found == whole.view(10, 4)
        assert bool((same.all(1) | gone.all(1)).all())
        assert int(same.all(1).sum()) == 3
        kept.add(tuple(same.all(1).tolist()))
    assert len(kept) > 1


def test_trained_biases_are_those_of_its_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapter = pf.init(model, pf.OFTConfig(oft_block_size=4, target_modules=["0"], bias="oft_only"))
    assert {path: sorted(leaf) for path, leaf in adapter.params.items()} == {"0": ["bias", "oft_R"]}


def test_adapters_that_rotate_in_unlike_ways_do_not_stack() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    one = pf.init(model, pf.OFTConfig(oft_block_size=4, target_modules=["0"]))
    other = one.replace(config=dataclasses.replace(one.config, use_cayley_neumann=False))
    with pytest.raises(ValueError, match=r"use_cayley_neumann of \['False', 'True'\]; expected one value"):
        pf.stack([one, other])
