"""`bind` of a base whose `forward` somebody has set on the object: accelerate, a kernel library, a trainer, oneself."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from bases import llama, text
from oracle import randomised
from snapshot import snapshot
from torch import nn

import peftfn as pf


def method(model: Any) -> None:
    model.forward = types.MethodType(lambda self, *args, **given: type(self).forward(self, *args, **given), model)


def own_method(model: Any) -> None:
    model.forward = model.forward


def of_a_function(model: Any) -> None:
    model.forward = types.MethodType(type(model).forward, model)


def partial(model: Any) -> None:
    model.forward = functools.partial(type(model).forward, model)


def partial_of_method(model: Any) -> None:
    model.forward = functools.partial(model.forward, use_cache=False)


def closure(model: Any) -> None:
    model.forward = lambda *args, **given: type(model).forward(model, *args, **given)


def wrapper(model: Any) -> None:
    old = model.forward

    @functools.wraps(old)
    def forward(*args: Any, **given: Any) -> Any:
        return old(*args, **given)

    model.forward = forward


def twice(model: Any) -> None:
    wrapper(model)
    method_of_old(model)


def method_of_old(model: Any) -> None:
    old = model.forward
    model.forward = types.MethodType(functools.wraps(old)(lambda self, *args, **given: old(*args, **given)), model)


def hook(model: Any) -> None:
    add_hook_to_module(model, ModelHook())


def prepared(model: Any) -> None:
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)


def closure_prepared(model: Any) -> None:
    closure(model)
    prepared(model)


def partial_prepared(model: Any) -> None:
    partial(model)
    prepared(model)


WAYS: dict[str, Callable[[Any], None]] = {
    one.__name__: one
    for one in (method, own_method, of_a_function, partial, partial_of_method, closure, wrapper, twice, method_of_old)
}
WAYS |= {one.__name__: one for one in (hook, prepared, closure_prepared, partial_prepared)}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: pf.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "prompt": lambda: pf.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: pf.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate remembers its first precision for the whole process."""
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(accelerate.state.PartialState, "_shared_state", {})


def base() -> Any:
    torch.manual_seed(1)
    return llama(pad_token_id=0, bos_token_id=1, eos_token_id=1)().eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_bind_computes_what_it_does_without(way: str, kind: str) -> None:
    plain, model = base(), base()
    WAYS[way](model)
    adapter, batch = randomised(pf.init(plain, CONFIGS[kind]())), text()
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}  # padded on the left
    before = snapshot(model)
    bound, expected = pf.bind(model, adapter), pf.bind(plain, adapter)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16, enabled="prepared" in way):
        logits, tokens = expected(**batch).logits.float(), expected.generate(**prompt, **how)
    assert torch.equal(bound(**batch).logits, logits)
    assert torch.equal(bound.generate(**prompt, **how), tokens)
    assert torch.equal(pf.apply(model, adapter, batch).logits, logits)
    if kind != "lora":  # then the forward is bind's own
        assert inspect.signature(bound.forward).parameters.keys() >= {"input_ids", "labels"}
    bound.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in bound.parameters() if parameter.requires_grad)
    assert snapshot(model) == before
    with torch.no_grad():  # and the bound module runs its own adapter, not what it was bound with
        for parameter in bound.parameters():
            if parameter.requires_grad:
                parameter.data = torch.zeros_like(parameter)
    assert not torch.equal(bound.eval()(**batch).logits, logits)


@pytest.mark.parametrize("way", [method_of_old, closure, wrapper])
def test_a_plain_module_with_a_forward_of_its_own_is_bound(way: Callable[[Any], None]) -> None:
    plain, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    adapter = randomised(pf.init(plain, pf.LoraConfig(r=2, target_modules=["0", "2"])))
    expected = pf.apply(plain, adapter, x)
    way(plain)
    before = snapshot(plain)
    bound = pf.bind(plain, adapter)
    assert torch.equal(bound(x), expected)
    assert snapshot(plain) == before


def test_a_layer_that_is_the_whole_model_is_bound() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    config = pf.LoraConfig(r=2, target_modules=["0"])
    outer = nn.Sequential(layer)
    method_of_old(layer)
    adapter = randomised(pf.init(outer, config))
    assert torch.equal(pf.bind(outer, adapter)(x), pf.apply(outer, adapter, x))
    assert not torch.equal(pf.bind(outer, adapter)(x), outer(x))
