"""Activation checkpointing under transforms, and with backward passes that come late, twice, or in another order."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import ids
from binding import adapter_for
from checkpoints import DROP, DROPPING, INNER, INSIDE, SAME, blocks, count_runs, enable, seeded, with_apply, with_bind
from oracle import called, loss
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

import peftfn as pf

reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
frozen = pytest.mark.parametrize("frozen", [True, False], ids=["frozen base", "base that requires grad"])
ways = pytest.mark.parametrize("gradients", [with_apply, with_bind], ids=["apply", "bind"])

# --- transforms ------------------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Callable[[Any, Any], Any]] = {
    "grad": lambda value, params: grad(value)(params),
    "vjp": lambda value, params: vjp(value, params)[1](torch.ones(())),
    "jvp": lambda value, params: jvp(value, (params,), (params,)),
}
UNSUPPORTED = r"^torch\.func transforms cannot go through activation checkpointing .* Turn it off"


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@reentrant
@frozen
def test_a_transform_of_a_checkpointed_transformer_is_refused_in_a_sentence(
    transform: Any, reentrant: bool, frozen: bool
) -> None:
    model, batch = DROPPING.make().train().requires_grad_(not frozen), DROPPING.inputs()
    adapter = adapter_for(model, DROP)
    enable(model, reentrant)
    with pytest.raises(RuntimeError, match=UNSUPPORTED):
        transform(lambda params: loss(pf.apply(model, adapter.replace(params=params), batch)), adapter.params)


@pytest.mark.parametrize("options", [INSIDE["linear"], {"target_modules": ["embed"]}], ids=["linear", "embedding"])
@reentrant
def test_grad_through_blocks_that_are_checkpointed_by_hand_is_refused_in_a_sentence(
    options: dict[str, Any], reentrant: bool
) -> None:
    model, tokens = blocks(reentrant), ids(3, 4)
    adapter = adapter_for(model, options)
    with pytest.raises(RuntimeError, match=UNSUPPORTED):
        grad(lambda params: loss(pf.apply(model, adapter.replace(params=params), tokens)))(adapter.params)


def test_a_models_own_error_about_transforms_is_not_taken_for_one_about_checkpointing() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            """(rows, 2) -> (rows, 2), with a call that torch.func refuses."""
            return super().forward((x * 1.0).requires_grad_())

    model, x = nn.Sequential(Odd(2, 2)), torch.ones(1, 2)
    adapter = adapter_for(model, {"target_modules": ["0"]})
    with pytest.raises(RuntimeError, match=r"You are attempting to call Tensor\.requires_grad_"):
        vmap(lambda scale: pf.apply(model, adapter, x * scale))(torch.ones(2))


def test_autograd_grad_works_where_torch_itself_can_and_is_refused_by_torch_where_not() -> None:
    model, batch = DROPPING.make().train(), DROPPING.inputs()
    adapter = adapter_for(model, DROP)
    expected = with_apply(model, adapter, batch)
    value = seeded(lambda: loss(pf.apply(enable(model, False), adapter, batch)))
    torch.testing.assert_close(list(torch.autograd.grad(value, pf.leaves(adapter))), expected, **SAME)
    value = seeded(lambda: loss(pf.apply(enable(model, True), adapter, batch)))
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(value, pf.leaves(adapter))


# --- the order of calls and backward passes --------------------------------------------------------------------------


@reentrant
@ways
def test_two_backward_passes_give_twice_the_gradient(reentrant: bool, gradients: Any) -> None:
    model, batch = DROPPING.make().train(), DROPPING.inputs()
    adapter = adapter_for(model, DROP)
    expected = [2 * g for g in gradients(model, adapter, batch)]
    enable(model, reentrant)
    bound = pf.bind(model, adapter)
    parameters = pf.leaves(adapter)
    for leaf in parameters:
        leaf.grad = None
    if gradients is with_bind:
        found = {parameter.data_ptr(): parameter for parameter in bound.parameters()}
        parameters = [found[leaf.data_ptr()] for leaf in parameters]
    value = seeded(lambda: loss(called(bound, batch) if gradients is with_bind else pf.apply(model, adapter, batch)))
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], expected, **SAME)


@reentrant
@ways
def test_adapters_that_change_between_forward_and_backward_have_the_gradients_of_separate_runs(
    reentrant: bool, gradients: Any
) -> None:
    """peft computes the block again with the adapter that is active by then: wrong gradients, without a word."""
    model, batch = DROPPING.make().train(), DROPPING.inputs()
    adapters = [adapter_for(model, DROP, seed) for seed in range(3)]
    expected = [gradients(model, adapter, batch) for adapter in adapters]
    enable(model, reentrant)
    runs = count_runs(model.get_submodule(INNER))
    for adapter in adapters:
        for leaf in pf.leaves(adapter):
            leaf.grad = None
    if gradients is with_bind:
        bounds = [pf.bind(model, adapter) for adapter in adapters]
        values = [seeded(lambda bound=bound: loss(called(bound, batch))) for bound in bounds]
        found = {p.data_ptr(): p for bound in bounds for p in bound.parameters() if p.requires_grad}
        parameters = [[found[leaf.data_ptr()] for leaf in pf.leaves(adapter)] for adapter in adapters]
        del bounds
    else:
        values = [seeded(lambda one=adapter: loss(pf.apply(model, one, batch))) for adapter in adapters]
        parameters = [pf.leaves(adapter) for adapter in adapters]
    gc.collect()  # only autograd holds the first two calls now
    (values[0] + values[2]).backward()
    values[1].backward()
    torch.testing.assert_close([[p.grad for p in some] for some in parameters], expected, **SAME)
    assert len(runs) == 6
