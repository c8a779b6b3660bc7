"""`bind`: the same class, paths and outputs as `apply`, and only the adapter trains."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from binding import ATTENTION, LLAMA, ROWS, Row, adapter_for, applied, flat, names_of, output, trained_names
from exact import EXACT, Float64, in_float64, off
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf
from peftfn import methods

rows = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


@rows
def test_a_bound_model_has_the_class_and_the_paths_of_the_base(row: Row) -> None:
    model = row.base.make()
    adapter = adapter_for(model, row.options)
    bound = pf.bind(model, adapter)
    assert type(bound) is type(model)
    ours, theirs = bound.state_dict(), model.state_dict()
    assert [name for name in ours if name in theirs] == list(theirs)
    method = methods.of(adapter.config)
    assert set(ours) - set(theirs) == {name for name in ours if name.endswith((*method.slots,))}
    own = set(names_of(model, adapter))
    assert all(ours[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters() if name not in own)


@rows
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_bound_model_computes_what_apply_does(row: Row, train: bool) -> None:
    model, batch = row.base.make().train(train), row.base.inputs()
    adapter = adapter_for(model, row.options)
    bound = pf.bind(model, adapter)
    before = snapshot(model)
    with torch.no_grad():  # where something requires grad, attention takes another kernel
        assert torch.equal(output(bound, batch), applied(model, adapter, batch))
        if not train:
            assert not torch.equal(output(bound, batch), applied(model, (), batch))
    assert snapshot(model) == before


@rows
def test_only_the_adapters_tensors_train_and_their_gradients_are_those_of_apply(row: Row) -> None:
    model, batch = row.base.make(), row.base.inputs()
    adapter = adapter_for(model, row.options)
    leaves = pf.leaves(adapter)
    expected = torch.autograd.grad(applied(model, adapter, batch).square().mean(), leaves, materialize_grads=True)
    for flag in (True, False):
        bound = pf.bind(model.requires_grad_(flag), adapter)
        parameters = dict(bound.named_parameters())
        assert trained_names(bound) == set(names_of(model, adapter))
        before = snapshot(model)
        output(bound, batch).square().mean().backward()
        assert snapshot(model) == before
        assert all(p.grad is None for p in bound.parameters() if not p.requires_grad)
        for name, grad in zip(names_of(model, adapter), expected, strict=True):
            found = parameters[name].grad
            torch.testing.assert_close(torch.zeros_like(grad) if found is None else found, grad)


def test_an_optimizer_on_a_bound_model_trains_the_adapter_in_place_and_nothing_else() -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    adapter = adapter_for(model, ATTENTION)
    start, before, bound = [t.clone() for t in flat(adapter)], snapshot(model), pf.bind(model, adapter)
    optimizer = torch.optim.AdamW(bound.parameters(), lr=0.1, weight_decay=0.5)
    output(bound, batch).square().mean().backward()
    optimizer.step()
    assert snapshot(model) == before
    assert not any(map(torch.equal, flat(adapter), start))
    assert all(map(torch.equal, flat(pf.unbind(bound)), flat(adapter)))
    with torch.no_grad():
        assert torch.equal(output(bound, batch), applied(model, pf.unbind(bound), batch))


def test_unbind_gives_the_adapter_as_the_module_has_it_after_it_was_moved() -> None:
    model = LLAMA.make()
    adapter = adapter_for(model, ATTENTION)
    bound = pf.bind(model, adapter).to(torch.float64)
    with torch.no_grad():
        bound.model.layers[0].self_attn.q_proj.lora_B.add_(1)
    now = pf.unbind(bound)
    assert now.config == adapter.config
    assert list(now.params) == list(adapter.params)
    site = "model.layers.0.self_attn.q_proj"
    assert torch.equal(now.params[site]["lora_B"], adapter.params[site]["lora_B"].double() + 1)
    assert flat(adapter)[0].dtype == torch.float32


def test_several_adapters_are_bound_together_and_none_is_a_plain_copy() -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    several = (adapter_for(model, ATTENTION), adapter_for(model, {"r": 3, "target_modules": ["q_proj", "o_proj"]}, 1))
    bound, bare = pf.bind(model, several), pf.bind(model, ())
    with torch.no_grad():
        assert torch.equal(output(bound, batch), applied(model, several, batch))
        assert torch.equal(output(bare, batch), output(model, batch))
    assert pf.unbind(bare) == ()
    assert trained_names(bare) == set()
    assert len(trained_names(bound)) == sum(len(flat(one)) for one in several)
    for one, other in zip(several, pf.unbind(bound), strict=True):
        assert one.config == other.config
        assert all(map(torch.equal, flat(one), flat(other)))


def test_an_adapter_that_is_bound_twice_over_has_each_tensor_once() -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    adapter = adapter_for(model, ATTENTION)
    bound = pf.bind(model, (adapter, adapter))
    assert len([p for p in bound.parameters() if p.requires_grad]) == len(flat(adapter))
    with torch.no_grad():
        assert torch.equal(output(bound, batch), applied(model, (adapter, adapter), batch))


# --- bases that somebody else has changed ----------------------------------------------------------------------------


def wrap_in_closures(model: Any) -> Any:
    """What many patches do: a function that calls the old, bound, forward, in place of it."""

    def patched(module: nn.Module) -> None:
        old = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return old(*args, **kwargs)

        module.forward = functools.wraps(old)(forward)

    for module in model.modules():
        patched(module)
    return model


def wrap_in_defaults(model: Any) -> Any:
    """The same in another spelling."""
    for module in model.modules():
        module.forward = lambda *args, old=module.forward, **kwargs: old(*args, **kwargs)
    return model


def add_hooks(model: Any) -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


def dispatch(model: Any) -> Any:
    from accelerate import dispatch_model

    main: Any = "cpu"  # compared with the map's values
    return dispatch_model(model, {"": main}, main_device=main, force_hooks=True)


@pytest.mark.parametrize("change", [wrap_in_closures, wrap_in_defaults, add_hooks, dispatch])
def test_a_base_whose_layers_have_a_forward_of_their_own_runs_adapted(change: Callable[[Any], Any]) -> None:
    model, batch = in_float64(LLAMA.make()), LLAMA.inputs()
    adapter = in_float64(adapter_for(model, ATTENTION | {"modules_to_save": ["norm"]}))
    with torch.no_grad():
        with Float64():  # a layer whose own forward is run adds up in another order
            expected = applied(model, adapter, batch)
            changed = change(model)
            before = snapshot(changed)
            bound = pf.bind(changed, adapter)
            assert off(output(bound, batch), expected) < EXACT
            assert off(applied(changed, adapter, batch), expected) < EXACT
        bound.to(torch.float32)  # accelerate's own `to` would move the base
    assert next(bound.parameters()).dtype == torch.float32
    assert snapshot(changed) == before


class Odd(nn.Module):
    """A module that keeps what cannot be copied, and what leads back to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.lock, self.random = threading.Lock(), torch.Generator()
        self.layers = [self.first, self.second]
        self.run = self.step
        self.last = self.first(torch.ones(1, 4))  # a tensor with a history
        self.first.register_forward_hook(lambda module, inputs, result: result + self.second.bias)

    def step(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> (rows, 4)."""
        return self.run(x)


def test_what_leads_back_to_the_base_leads_to_the_bound_model_and_what_cannot_be_copied_is_shared() -> None:
    model, x = Odd().eval(), torch.randn(3, 4)
    adapter = adapter_for(model, {"target_modules": ["first"], "bias": "all"})
    bound = pf.bind(model, adapter)
    assert (bound.lock, bound.layers[0], bound.run.__self__) == (model.lock, bound.first, bound)
    first, second = adapter.params["first"], adapter.params["second"]
    delta = adapter.buffers["first"]["scaling"] * first["lora_B"] @ first["lora_A"]
    hidden = x @ (model.first.weight + delta).T + first["bias"] + second["bias"]
    torch.testing.assert_close(bound(x), hidden @ model.second.weight.T + second["bias"])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_bound_is_said() -> None:
    model = LLAMA.make()
    adapter = adapter_for(model, ATTENTION)
    bound = pf.bind(model, adapter)
    with pytest.raises(ValueError, match=r"the adapter is a stack of 2; pass index="):
        pf.bind(model, pf.stack([adapter, adapter]))
    with pytest.raises(TypeError, match=r"bind was given a bound module; bind the base with a tuple"):
        pf.bind(bound, adapter)
    with pytest.raises(TypeError, match=r"unbind was given a LlamaForCausalLM that peftfn\.bind did not make"):
        pf.unbind(model)
    with pytest.raises(KeyError, match=r"has a site 'model\.layers\.0\.self_attn\.q_proj'"):
        pf.bind(nn.Linear(2, 2), adapter)
    model.get_submodule("model.layers.0.self_attn.q_proj").lora_A = nn.Identity()
    with pytest.raises(ValueError, match=r"Linear already has an attribute 'lora_A'"):
        pf.bind(model, adapter)
