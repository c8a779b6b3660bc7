"""An adapter is held against the layers once, and again when they are others: the error stays a clear one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import BASES
from cases import trained
from torch import Tensor, nn
from torch.func import grad

import peftfn as pf
from peftfn.methods.method import Method
from peftfn.runtime import remembered_checks


def put(layer: nn.Module) -> Callable[[Any], None]:
    return lambda model: model.__setitem__(0, layer)


def resized(model: Any) -> None:
    model[0].weight.data = torch.zeros(5, 4)
    model[0].bias.data = torch.zeros(5)


LORA = pf.LoraConfig(r=2, target_modules=["0"])
CHANGES: dict[str, tuple[pf.PeftConfig, Tensor, Callable[[Any], None]]] = {
    "another width": (LORA, torch.randn(3, 4), put(nn.Linear(4, 1))),
    "the weight resized": (LORA, torch.randn(3, 4), resized),
    "another kind": (LORA, torch.zeros(1, dtype=torch.long), put(nn.Embedding(4, 8))),
    "a vector that still fits": (
        pf.IA3Config(target_modules=["0"], feedforward_modules=[]),
        torch.randn(3, 4),
        put(nn.Linear(4, 1)),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("is_new", [False, True], ids=["the same adapter", "an equal one"])
def test_a_layer_that_was_changed_is_seen(what: str, is_new: bool) -> None:
    config, x, change = CHANGES[what]
    model = nn.Sequential(nn.Linear(4, 8))
    adapter = pf.init(model, config)
    if what != "another kind":
        pf.apply(model, adapter, x)
    change(model)
    for _ in range(2):  # a check that fails is not remembered
        with pytest.raises(ValueError, match=r"0: the adapter has .* It was made for a model of another size"):
            pf.apply(model, adapter.replace() if is_new else adapter, x)


@pytest.mark.parametrize("name", ["mlp", "llama", "bert"])
def test_what_is_new_is_checked_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = BASES[name].make(), BASES[name].inputs()
    adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"] if name == "mlp" else "all-linear")))
    counted: list[int] = []
    remember = remembered_checks.remember

    def counting(*args: Any) -> None:
        counted.append(1)
        remember(*args)

    monkeypatch.setattr(remembered_checks, "remember", counting)
    for _ in range(3):
        pf.apply(model, adapter, batch)
        adapter = adapter.replace(params={path: dict(leaf) for path, leaf in adapter.params.items()})
    assert len(counted) == 1
    grad(lambda params: _total(pf.apply(model, adapter.replace(params=params), batch)))(adapter.params)
    pf.apply(model, trained(pf.init(model, pf.LoraConfig(r=3, target_modules=adapter.config.target_modules))), batch)
    assert len(counted) == 2


def test_a_prompt_beside_it_does_not_have_lora_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = BASES["llama"].make(), BASES["llama"].inputs()
    lora = trained(pf.init(model, pf.LoraConfig(r=2, target_modules="all-linear")))
    prompt = pf.init(model, pf.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    held: list[str] = []
    check = Method.check

    def noting(self: Method, config: Any, leaf: Any, site: Any) -> str | None:
        held.append(site.path)
        return check(self, config, leaf, site)

    monkeypatch.setattr(Method, "check", noting)
    pf.apply(model, (lora, prompt), batch)
    assert len(held) > 10
    held.clear()
    pf.apply(model, (lora, prompt), batch)
    assert held == [""]  # the prompt's one site, which is the model


def _total(output: Any) -> Tensor:
    return (output if isinstance(output, Tensor) else output[0]).float().sum()


def test_neither_models_nor_adapters_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 8))
    adapter = pf.init(model, LORA)
    pf.apply(model, adapter, torch.randn(1, 4))
    gone = weakref.ref(model), weakref.ref(adapter)
    del model, adapter
    gc.collect()
    assert [one() for one in gone] == [None, None]
