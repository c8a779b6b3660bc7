"""What is FRoD's alone: a decomposition of all layers of a category, places of a seed, and files that need the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from exact import off
from torch import nn

import peftfn as pf

SAME = 1e-4
"""How far two decompositions in float32 may be from each other, of the largest value: CPUs add up in other orders."""


class Block(nn.Module):
    """Two layers of unlike parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).tanh())


class Blocks(nn.Module):
    """Two of them, as transformers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))


def base() -> nn.Module:
    torch.manual_seed(1)
    return Blocks()


CONFIG: dict[str, Any] = {"target_modules": ["up", "down"], "sparse_rate": 0.1, "projection_prng_key": 3}


@oracle.by_new_peft
def test_the_start_is_pefts() -> None:
    adapter = pf.init(base(), pf.FrodConfig(**CONFIG))
    other: Any = peft.get_peft_model(base(), peft.FrodConfig(**CONFIG, progressbar=False))
    assert sorted(adapter.buffers)[:2] == ["*.down", "*.up"]
    for name in ("up", "down"):
        ours = adapter.buffers[f"*.{name}"]
        assert torch.equal(ours["frod_s_indices"], other.base_model.frod_s_indices[name]["default"])
        assert torch.equal(ours["frod_s_size"], other.base_model.frod_s_size[name]["default"])
        assert off(ours["frod_V"], other.base_model.frod_V[name]["default"]) < SAME
        layer = other.base_model.model.layers[1].get_submodule(name)
        assert off(adapter.params[f"layers.1.{name}"]["frod_lambda_l"], layer.frod_lambda_l["default"]) < SAME


def test_what_is_trained_makes_the_weight_of_the_formula() -> None:
    model = base().double()
    adapter = oracle.randomised(pf.init(model, pf.FrodConfig(**CONFIG)))
    path, home = "layers.0.down", adapter.buffers["*.down"]
    own = {**adapter.params[path], **adapter.buffers[path]}
    s = torch.zeros(9, 9, dtype=torch.float64)
    s[tuple(home["frod_s_indices"])] = own["frod_lambda_s_values"]
    expected = own["frod_U"] @ (s + own["frod_lambda_l"].diag()) @ home["frod_V"].T
    merged = pf.merge(dict(model.named_parameters()), adapter)
    assert off(merged[f"{path}.weight"], expected) < 1e-6  # U is rounded to float32, as in peft


def test_a_file_is_read_with_the_base_and_without_one_refused(tmp_path: Path) -> None:
    for is_saved in (True, False):
        adapter = oracle.randomised(pf.init(base(), pf.FrodConfig(**CONFIG, save_projection=is_saved)))
        pf.save(adapter, tmp_path / str(is_saved))
        with pytest.raises(ValueError, match=r"pass the base: peftfn.load\(folder, model\)"):
            pf.load(tmp_path / str(is_saved))
        again = pf.load(tmp_path / str(is_saved), base())
        assert off(again.buffers, adapter.buffers) == 0.0
        assert off(again.params, adapter.params) == 0.0
        assert {info.shares for info in again.sites.values()} == {"*.up", "*.down"}


def test_layers_of_one_category_and_unlike_inputs_are_refused_by_name() -> None:
    model = nn.ModuleDict({"0": nn.ModuleDict({"up": nn.Linear(4, 5)}), "1": nn.ModuleDict({"up": nn.Linear(6, 5)})})
    with pytest.raises(ValueError, match=r"FRoD has one V for 0.up, 1.up, whose inputs are of unlike numbers"):
        pf.init(model, pf.FrodConfig(target_modules=["up"]))


def test_without_places_only_l_is_trained() -> None:
    model, x = base().eval(), torch.randn(3, 6)
    adapter = pf.init(model, pf.FrodConfig(target_modules=["up"], sparse_rate=0.0))
    assert adapter.params["layers.0.up"]["frod_lambda_s_values"].shape == (0,)
    assert torch.equal(pf.apply(model, adapter, x), model(x))
    assert off(pf.apply(model, oracle.randomised(adapter), x), model(x)) > 1e-3


def test_dropout_is_on_what_is_added_alone() -> None:
    model, x = base().train(), torch.randn(3, 6)
    adapter = pf.init(model, pf.FrodConfig(**CONFIG, frod_dropout=0.5))
    assert torch.equal(pf.apply(model, adapter, x), copy.deepcopy(model).eval()(x))
    noisy = oracle.randomised(adapter)
    assert off(pf.apply(model, noisy, x), pf.apply(model, noisy, x)) > 1e-3


@pytest.mark.parametrize("wrong", [{"sparse_rate": 1.5}, {"frod_dropout": 1.0}, {"bias": "vera_only"}])
def test_a_field_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}="):
        pf.FrodConfig(**wrong)
