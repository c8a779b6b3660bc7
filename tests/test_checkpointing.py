"""Activation checkpointing gives the gradients that it gives without, with `apply` and with `bind`, or one clear error.

torch runs a checkpointed block twice: without keeping activations, and again in the backward pass, when the call that
it belonged to is long over. https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import BASES, Base, ids, llama, text
from oracle import called, loss, randomised
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import peftfn as pf

# The block is computed again with another kernel where something requires grad the second time only.
SAME: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}

reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
frozen = pytest.mark.parametrize("frozen", [True, False], ids=["frozen base", "base that requires grad"])


def adapter_for(model: nn.Module, options: dict[str, Any], seed: int = 0) -> pf.Adapter:
    return randomised(pf.init(model, pf.LoraConfig(**{"r": 2} | options)), seed)


def seeded(value: Callable[[], Tensor]) -> Tensor:
    """The value with the same dropout each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return value()


def with_apply(model: nn.Module, adapter: pf.Adapter, batch: Any) -> list[Tensor | None]:
    leaves = pf.leaves(adapter)
    for leaf in leaves:
        leaf.grad = None
    seeded(lambda: loss(pf.apply(model, adapter, batch))).backward()
    return [leaf.grad for leaf in leaves]


def with_bind(model: nn.Module, adapter: pf.Adapter, batch: Any) -> list[Tensor | None]:
    bound = pf.bind(model, adapter)
    seeded(lambda: loss(called(bound, batch))).backward()
    # Bound parameters are found by the tensors that they share memory with.
    grads = {parameter.data_ptr(): parameter.grad for parameter in bound.parameters()}
    return [grads[leaf.data_ptr()] for leaf in pf.leaves(adapter)]


ways = pytest.mark.parametrize("gradients", [with_apply, with_bind], ids=["apply", "bind"])


def count_runs(module: nn.Module) -> list[int]:
    runs: list[int] = []
    module.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    return runs


# --- transformers ----------------------------------------------------------------------------------------------------


def enable(model: Any, use_reentrant: bool) -> Any:
    with warnings.catch_warnings():
        # transformers 5 calls it by another name
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


DROPPING = Base(llama(attention_dropout=0.2), text)
DROP: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2}
INNER = "model.layers.0.self_attn.q_proj"
# a base, a layer inside a checkpointed block of it, and what is adapted
MODELS: dict[str, tuple[Base, str, dict[str, Any]]] = {
    "llama": (DROPPING, INNER, DROP),
    "llama, all linear": (DROPPING, INNER, {"target_modules": "all-linear"}),
    "llama, embedding": (DROPPING, INNER, {"target_modules": ["embed_tokens"]}),
    "llama, norms": (DROPPING, INNER, DROP | {"modules_to_save": ["input_layernorm"]}),
    "bert": (BASES["bert"], "bert.encoder.layer.0.attention.self.query", {"target_modules": ["query"]}),
    "t5": (BASES["t5"], "encoder.block.0.layer.0.SelfAttention.q", {"target_modules": ["q", "v"]}),
    "vit": (BASES["vit"], "layernorm_before", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "mixtral": (BASES["mixtral"], INNER, {"target_parameters": ["experts.gate_up_proj"]}),
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


# --- a module that checkpoints by itself -----------------------------------------------------------------------------


class Attending(nn.Module):
    """torch's own attention, which reads its weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 8) -> the same."""
        return self.attention(x, x, x, need_weights=False)[0]


class Blocks(nn.Module):
    """An embedding, blocks that are checkpointed by hand (`use_reentrant`; `None` for not at all), and a head."""

    def __init__(self, use_reentrant: bool | None, shared: bool = False) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.embed = nn.Embedding(40, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2), nn.LayerNorm(8), Attending()) for _ in range(2)
        )
        if shared:
            self.blocks[1] = self.blocks[0]
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, 3)."""
        x = self.embed(tokens)
        for block in self.blocks:
            again = x + (block(x) if self.use_reentrant is None else self.checkpointed(block, x))
            x = again
        return self.head(x)

    def checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=bool(self.use_reentrant))


def blocks(use_reentrant: bool | None, shared: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Blocks(use_reentrant, shared).train()


INSIDE: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["blocks.0.0", "blocks.1.0"]},
    "attention": {"target_modules": ["attention"]},
    "attention's output": {"target_modules": ["blocks.0.4.attention.out_proj"]},
    "parameter": {"target_modules": ["head"], "target_parameters": ["blocks.0.0.weight"]},
    "replaced norm": {"target_modules": ["head"], "modules_to_save": ["blocks.1.3"]},
    "biases": {"target_modules": ["head"], "bias": "all"},
}


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
