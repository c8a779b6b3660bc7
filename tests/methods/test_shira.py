"""SHiRA where the tables of tests say nothing: its places, masks of one's own, files that are not whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from safetensors.torch import load_file, save_file
from torch import nn

import peftfn as pf
from peftfn.methods import shira


def config(**options: Any) -> pf.ShiraConfig:
    return pf.ShiraConfig(**{"r": 1, "target_modules": ["0"], **options})


def model(inputs: int = 6, outputs: int = 5) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


def places(adapter: pf.Adapter) -> torch.Tensor:
    return adapter.buffers["0"]["shira_indices"]


def test_a_seed_gives_the_places_of_peft_and_none_those_of_the_generator() -> None:
    base = model()
    with oracle.quiet_peft():
        other = peft.get_peft_model(model(), peft.ShiraConfig(r=1, target_modules=["0"], random_seed=7))
    theirs = other.base_model.model[0].shira_indices["default"]
    found = places(pf.init(base, config(random_seed=7), torch.Generator().manual_seed(1)))
    assert found.dtype == torch.int32
    assert torch.equal(found, theirs)
    one, other_one = (places(pf.init(base, config(), torch.Generator().manual_seed(seed))) for seed in (1, 2))
    assert not torch.equal(one, other_one)
    assert one.shape == (2, 11)


def test_only_its_places_change() -> None:
    base = model()
    adapter = oracle.randomised(pf.init(base, config()))
    change = pf.merge(dict(base.named_parameters()), adapter)["0.weight"] - base[0].weight
    rows, columns = places(adapter).long()
    assert int((change != 0).sum()) == 11
    assert off(change[rows, columns], adapter.params["0"]["shira_weight"]) < EXACT


def test_a_mask_of_ones_own() -> None:
    base, x = model(), torch.randn(3, 6).double()
    adapter = oracle.randomised(pf.init(base, config()))
    mask = torch.zeros(5, 6)
    mask[1], mask[3, :5] = 1, 1
    found = shira.with_masks(adapter, {"0": mask})
    change = torch.zeros(5, 6).double().masked_scatter(mask.bool(), adapter.params["0"]["shira_weight"])
    assert off(pf.apply(base, found, x) - base(x), x @ change.T) < EXACT
    with pytest.raises(ValueError, match="the mask of '0' has 6 places, and the adapter 11 numbers"):
        shira.with_masks(adapter, {"0": torch.eye(6)})
    with pytest.raises(KeyError, match="no site '1'; it has 0"):
        shira.with_masks(adapter, {"1": mask})
    with pytest.raises(ValueError, match="mask_type='mine' is read from files only"):
        pf.init(base, config(mask_type="mine"))


def test_a_stack_of_unlike_sites_adds_nothing_where_an_adapter_has_none() -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)).double()
    one, other = (oracle.randomised(pf.init(base, config(target_modules=[path]))) for path in "01")
    x = torch.randn(3, 6).double()
    routed = pf.apply(base, pf.stack([one, other]), x, index=[0, 1, -1])
    expected = [pf.apply(base, one, x)[0], pf.apply(base, other, x)[1], base(x)[2]]
    assert off(routed, torch.stack(expected)) < EXACT


def test_files_are_checked_and_those_from_windows_are_read(tmp_path: Path) -> None:
    adapter = pf.init(model(), config())
    path = pf.save(adapter, tmp_path) / "adapter_model.safetensors"
    whole = load_file(path)
    key = "base_model.model.0.shira_indices"
    assert whole[key].dtype == torch.int32
    save_file({**whole, key: whole[key].float()}, path)
    assert torch.equal(places(pf.load(tmp_path)), places(adapter))
    assert places(pf.load(tmp_path)).dtype == torch.int32
    save_file({**whole, key: whole[key][:, :4].contiguous()}, path)
    with pytest.raises(ValueError, match=r"shira_weight \(11,\) and shira_indices \(2, 4\)"):
        pf.load(tmp_path)
    save_file({one: tensor for one, tensor in whole.items() if one != key}, path)
    with pytest.raises(KeyError, match="but not both of shira_weight and shira_indices"):
        pf.load(tmp_path)


def test_more_numbers_than_a_weight_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0: r=3 asks for 33 numbers, .* its weight has 30; expected r of at most 2"):
        pf.init(model(), config(r=3))
    with pytest.raises(ValueError, match="r=0; expected a positive integer"):
        config(r=0)
    with pytest.raises(ValueError, match=r"has shira_indices \(2, 11\) and shira_weight \(11,\), expected"):
        pf.apply(model(8, 8), pf.init(model(), config()), torch.zeros(1, 8).double())
