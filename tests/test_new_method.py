"""CONTRIBUTING.md says that a method is one file and one line: its example has to run as it stands there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import trained
from snapshot import snapshot
from torch import nn
from torch.func import functional_call, grad, vmap

import peftfn as pf
from peftfn import methods


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Any:
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1
    module = types.ModuleType("gain")
    monkeypatch.setitem(sys.modules, "gain", module)  # where dataclasses look a class's module up
    exec(blocks[0], module.__dict__)  # noqa: S102  # the block is the project's own
    monkeypatch.setattr(methods, "TABLE", (*methods.TABLE, module.METHOD))
    return module


def test_a_new_method_has_every_function_of_the_library(gain: Any, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 6)
    config = gain.GainConfig(target_modules=["0", "2"])
    fresh = pf.init(model, config)
    before = snapshot(model)
    assert torch.equal(pf.apply(model, fresh, x), model(x))
    one, other = trained(fresh, 1), trained(fresh, 2)
    expected = model[2]((model[0](x) * one.params["0"]["gain"]).relu()) * one.params["2"]["gain"]
    torch.testing.assert_close(pf.apply(model, one, x), expected)
    merged = pf.merge(dict(model.named_parameters()), one)
    torch.testing.assert_close(functional_call(model, merged, (x,)), expected)
    both = vmap(lambda adapter: pf.apply(model, adapter, x))(pf.stack([one, other]))
    torch.testing.assert_close(both[1], pf.apply(model, other, x))
    routed = pf.apply(model, pf.stack([one, other]), x, index=[1, -1, 0, 0])
    torch.testing.assert_close(routed[:2], torch.stack([both[1, 0], model(x)[1]]))
    assert grad(lambda p: pf.apply(model, one.replace(params=p), x).sum())(one.params)["0"]["gain"].shape == (8,)
    torch.testing.assert_close(pf.bind(model, one)(x), expected)
    again = pf.load(pf.save(one, tmp_path), model)
    assert again.config == one.config
    assert torch.equal(again.params["2"]["gain"], one.params["2"]["gain"])
    assert snapshot(model) == before


def test_a_new_method_combines_once_it_says_how(gain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(4, 6)
    fresh = pf.init(model, gain.GainConfig(target_modules=["0"]))
    one, other = trained(fresh, 1), trained(fresh, 2)
    with pytest.raises(ValueError, match="GainConfig has no weighted combination"):
        pf.combine([one, other], [0.7, -0.4])

    def combine(recipe: Any, configs: Any, path: str, leaves: Any) -> Any:
        return {"gain": sum(w * leaf["gain"] for w, leaf in zip(recipe.weights, leaves, strict=True))}, {}

    able = gain.METHOD._replace(combine=combine)
    monkeypatch.setattr(methods, "TABLE", (*methods.TABLE[:-1], able))
    mixed = pf.combine([one, other], [0.7, -0.4])
    expected = model(x) * (0.7 * one.params["0"]["gain"] - 0.4 * other.params["0"]["gain"])
    torch.testing.assert_close(pf.apply(model, mixed, x), expected)
