"""CONTRIBUTING.md says that a method is one file and one line: its example has to run as it stands there."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import trained
from places import ROOT
from quantized import packed
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from peftfn import methods
from peftfn.methods.traits import Combining


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Any:
    text = (ROOT / "CONTRIBUTING.md").read_text()
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


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(3, 5, 6)),
    "linear without a bias": (lambda: nn.Linear(6, 8, bias=False), lambda: torch.randn(3, 6)),
    "transposed": (lambda: Conv1D(8, 6), lambda: torch.randn(3, 5, 6)),
    "embedding": (lambda: nn.Embedding(9, 8, padding_idx=2), lambda: torch.randint(9, (3, 5))),
    "square embedding": (lambda: nn.Embedding(8, 8), lambda: torch.randint(8, (3, 5))),
    "square transposed": (lambda: Conv1D(6, 6), lambda: torch.randn(3, 6)),
    "convolution 1d": (lambda: nn.Conv1d(4, 8, 3, groups=2), lambda: torch.randn(3, 4, 7)),
    "convolution 2d": (lambda: nn.Conv2d(4, 8, 3, 2, 1, padding_mode="reflect"), lambda: torch.randn(3, 4, 7, 7)),
    "convolution 3d": (lambda: nn.Conv3d(2, 4, 2), lambda: torch.randn(3, 2, 4, 4, 4)),
    "packed": (lambda: packed(nn.Sequential(nn.Linear(64, 64)), "nf4")[0], lambda: torch.randn(3, 5, 64)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_new_method_is_the_merged_layer_on_every_kind(layer: str, gain: Any) -> None:
    build, batch = LAYERS[layer]
    torch.manual_seed(0)
    model, x = nn.Sequential(build(), nn.Tanh()), batch()
    fresh = pf.init(model, gain.GainConfig(target_modules=["0"]))
    one, other = trained(fresh, 1, 0.3), trained(fresh, 2, 0.3)
    params = dict(model.named_parameters())
    bare = pf.apply(model, (), x)
    found = pf.apply(model, one, x)
    assert (found - bare).abs().max() > 1e-3
    for model_too in (model, None) if layer != "packed" else (model,):
        torch.testing.assert_close(pf.apply(model, (), x, params=pf.merge(params, one, model=model_too)), found)
    stacked = pf.stack([one, other])
    torch.testing.assert_close(vmap(lambda adapter: pf.apply(model, adapter, x))(stacked)[0], found)
    torch.testing.assert_close(
        pf.apply(model, stacked, x, index=[0, -1, 0]), torch.stack([found[0], bare[1], found[2]])
    )
    both = pf.apply(model, (one, other), x)
    torch.testing.assert_close(pf.apply(model, other, x, params=pf.merge(params, one, model=model)), both)


def test_a_method_that_reads_the_weight_sees_the_adapters_before_it(gain: Any) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(4, 6)
    lora = trained(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])), 1)
    gained = trained(pf.init(model, gain.GainConfig(target_modules=["0"])), 2)
    merged = pf.merge(dict(model.named_parameters()), lora)
    torch.testing.assert_close(pf.apply(model, (lora, gained), x), pf.apply(model, gained, x, params=merged))
    routed = pf.stack([lora, lora])
    with pytest.raises(ValueError, match="Put the other adapter first, or apply them apart"):
        pf.apply(model, (routed, gained), x, index=[0, 1, -1, 0])


def test_a_new_method_is_refused_where_it_says_nothing_of(gain: Any) -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match="Gain cannot act on a weight that the base reads itself"):
        pf.init(model, gain.GainConfig(target_modules=["0"]))


def test_a_new_method_combines_once_it_says_how(gain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(4, 6)
    fresh = pf.init(model, gain.GainConfig(target_modules=["0"]))
    one, other = trained(fresh, 1), trained(fresh, 2)
    with pytest.raises(ValueError, match="GainConfig has no weighted combination"):
        pf.combine([one, other], [0.7, -0.4])

    def combine(recipe: Any, configs: Any, path: str, leaves: Any) -> Any:
        return {"gain": sum(w * leaf["gain"] for w, leaf in zip(recipe.weights, leaves, strict=True))}, {}

    able = dataclasses.replace(gain.METHOD, combining=Combining(combine))
    monkeypatch.setattr(methods, "TABLE", (*methods.TABLE[:-1], able))
    mixed = pf.combine([one, other], [0.7, -0.4])
    expected = model(x) * (0.7 * one.params["0"]["gain"] - 0.4 * other.params["0"]["gain"])
    torch.testing.assert_close(pf.apply(model, mixed, x), expected)
