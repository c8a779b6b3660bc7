"""Activation checkpointing gives the gradients that it gives without, with `apply` and with `bind`, or one clear error.

torch runs a checkpointed block twice: without keeping activations, and again in the backward pass, when the call that
it belonged to is long over. https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import BASES, Base, ids
from binding import EXPERTS, adapter_for
from checkpoints import DROP, DROPPING, INNER, INSIDE, SAME, blocks, count_runs, enable, seeded, with_apply, with_bind
from oracle import called, loss
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf

reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
frozen = pytest.mark.parametrize("frozen", [True, False], ids=["frozen base", "base that requires grad"])
ways = pytest.mark.parametrize("gradients", [with_apply, with_bind], ids=["apply", "bind"])

# --- transformers ---------------------------------------------------------------------------------------------------

# a base, a layer inside a checkpointed block of it, and what is adapted
MODELS: dict[str, tuple[Base, str, dict[str, Any]]] = {
    "llama": (DROPPING, INNER, DROP),
    "llama, all linear": (DROPPING, INNER, {"target_modules": "all-linear"}),
    "llama, embedding": (DROPPING, INNER, {"target_modules": ["embed_tokens"]}),
    "llama, norms": (DROPPING, INNER, DROP | {"modules_to_save": ["input_layernorm"]}),
    "bert": (BASES["bert"], "bert.encoder.layer.0.attention.self.query", {"target_modules": ["query"]}),
    "t5": (BASES["t5"], "encoder.block.0.layer.0.SelfAttention.q", {"target_modules": ["q", "v"]}),
    "vit": (BASES["vit"], "layernorm_before", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "mixtral": (BASES["mixtral"], INNER, EXPERTS),
}


def check_transformer(name: str, reentrant: bool, frozen: bool, gradients: Any) -> None:
    base, inner, options = MODELS[name]
    model, batch = base.make().train(), base.inputs()
    adapter = adapter_for(model, options)
    runs = count_runs(next(module for path, module in model.named_modules() if path.endswith(inner)))
    expected = gradients(model, adapter, batch)
    assert len(runs) == 1
    enable(model.requires_grad_(not frozen), reentrant)
    before = snapshot(model)
    torch.testing.assert_close(gradients(model, adapter, batch), expected, **SAME)
    assert len(runs) == 3  # once, and again in the backward pass: it was checkpointed
    assert snapshot(model) == before


@pytest.mark.parametrize("name", MODELS)
@reentrant
@ways
def test_a_checkpointed_transformer_has_the_gradients_that_it_has_without(
    name: str, reentrant: bool, gradients: Any
) -> None:
    check_transformer(name, reentrant, False, gradients)


@reentrant
@ways
def test_a_checkpointed_transformer_that_is_frozen_has_them_too(reentrant: bool, gradients: Any) -> None:
    check_transformer("llama", reentrant, True, gradients)


@reentrant
def test_checkpointing_can_be_turned_on_at_the_bound_model(reentrant: bool) -> None:
    model, batch = DROPPING.make().train(), DROPPING.inputs()
    adapter = adapter_for(model, DROP)
    expected = with_bind(model, adapter, batch)
    bound = pf.bind(model, adapter)
    before = snapshot(model)
    runs = count_runs(bound.get_submodule(INNER))
    seeded(lambda: loss(called(enable(bound, reentrant), batch))).backward()
    assert len(runs) == 2
    assert snapshot(model) == before
    found = [parameter.grad for parameter in bound.parameters() if parameter.requires_grad]
    assert {g.shape for g in found if g is not None} == {g.shape for g in expected if g is not None}
    assert sum(float(g.square().sum()) for g in found) == pytest.approx(sum(float(g.square().sum()) for g in expected))


@reentrant
@frozen
def test_base_parameters_given_by_name_get_the_gradients_that_they_get_without(reentrant: bool, frozen: bool) -> None:
    model, batch = DROPPING.make().train().requires_grad_(not frozen), DROPPING.inputs()
    adapter = adapter_for(model, DROP)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"]
    params = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    every = [*pf.leaves(adapter), *params.values()]

    def gradients() -> list[Tensor | None]:
        for tensor in every:
            tensor.grad = None
        seeded(lambda: loss(pf.apply(model, adapter, batch, params=params))).backward()
        return [tensor.grad for tensor in every]

    expected = gradients()
    enable(model, reentrant)
    runs = count_runs(model.get_submodule(INNER))
    torch.testing.assert_close(gradients(), expected, **SAME)
    assert len(runs) == 2


class Wrapper(nn.Module):
    """A transformers model inside another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Tensor) -> Any:
        """What the inner model returns."""
        return self.inner(**batch)


@ways
def test_a_checkpointed_transformer_inside_another_module_has_them_too(gradients: Any) -> None:
    model, batch = Wrapper(DROPPING.make()).train(), DROPPING.inputs()
    adapter = adapter_for(model, DROP)
    expected = gradients(model, adapter, batch)
    enable(model.inner, True)
    if hasattr(model.inner, "_require_grads_hook"):  # transformers 4 has not turned it on
        model.inner.disable_input_require_grads()
    runs = count_runs(model.get_submodule(f"inner.{INNER}"))
    torch.testing.assert_close(gradients(model, adapter, batch), expected, **SAME)
    assert len(runs) == 2


# --- modules that checkpoint by themselves ----------------------------------------------------------------------------

# torch warns of what it is about to lose; the warning comes before the error.
loses = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


@loses
@pytest.mark.parametrize("options", INSIDE.values(), ids=list(INSIDE))
@pytest.mark.parametrize("embedding", [False, True], ids=["frozen input", "adapted input"])
@reentrant
@frozen
@ways
def test_blocks_that_are_checkpointed_by_hand_have_their_gradients_or_an_error_says_that_torch_would_lose_them(
    options: dict[str, Any], embedding: bool, reentrant: bool, frozen: bool, gradients: Any
) -> None:
    options = options | {"target_modules": [*options["target_modules"], *(["embed"] if embedding else [])]}
    tokens = ids(3, 4)
    adapter = adapter_for(blocks(None), options)
    expected = gradients(blocks(None), adapter, tokens)
    model = blocks(reentrant).requires_grad_(not frozen)
    before = snapshot(model)
    if reentrant and not embedding:
        with pytest.raises(RuntimeError, match=r"use_reentrant=True, and no input of the checkpointed block requires"):
            gradients(model, adapter, tokens)
    else:
        torch.testing.assert_close(gradients(model, adapter, tokens), expected, **SAME)
    assert snapshot(model) == before


@reentrant
@ways
def test_one_block_that_runs_under_two_checkpoints_has_the_sum_of_its_gradients(
    reentrant: bool, gradients: Any
) -> None:
    tokens, options = ids(3, 4), {"target_modules": ["blocks.0.0", "embed"]}
    adapter = adapter_for(blocks(None, shared=True), options)
    expected = gradients(blocks(None, shared=True), adapter, tokens)
    torch.testing.assert_close(gradients(blocks(reentrant, shared=True), adapter, tokens), expected, **SAME)


@loses
@ways
def test_a_call_without_gradients_through_a_reentrant_checkpoint_just_runs(gradients: Any) -> None:
    model, tokens = blocks(True), ids(3, 4)
    adapter = adapter_for(model, INSIDE["linear"])
    leaves = pf.leaves(adapter)
    run = (lambda: pf.apply(model, adapter, tokens)) if gradients is with_apply else pf.bind(model, adapter)
    with torch.no_grad():
        found = seeded(lambda: run(tokens) if isinstance(run, nn.Module) else run())
        assert torch.equal(found, seeded(lambda: pf.apply(blocks(None), adapter, tokens)))
    assert all(leaf.grad is None for leaf in leaves)
