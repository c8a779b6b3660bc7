"""What the tests of activation checkpointing share: gradients both ways, and modules that are checkpointed by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from bases import Base, llama, text
from oracle import called, loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftfn as pf

# The block is computed again with another kernel where something requires grad the second time only.
SAME: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}


def seeded(value: Callable[[], Tensor]) -> Tensor:
    """The value with the same dropout each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return value()


def with_apply(model: nn.Module, adapter: pf.Adapter, batch: Any) -> list[Tensor | None]:
    """The gradients of a call of `apply`, in the order of `pf.leaves`."""
    leaves = pf.leaves(adapter)
    for leaf in leaves:
        leaf.grad = None
    seeded(lambda: loss(pf.apply(model, adapter, batch))).backward()
    return [leaf.grad for leaf in leaves]


def with_bind(model: nn.Module, adapter: pf.Adapter, batch: Any) -> list[Tensor | None]:
    """The gradients of a call of the bound module, in the same order."""
    bound = pf.bind(model, adapter)
    seeded(lambda: loss(called(bound, batch))).backward()
    # Bound parameters are found by the tensors that they share memory with.
    grads = {parameter.data_ptr(): parameter.grad for parameter in bound.parameters()}
    return [grads[leaf.data_ptr()] for leaf in pf.leaves(adapter)]


def count_runs(module: nn.Module) -> list[int]:
    """A list that grows each time the module runs, in a call or in a backward pass."""
    runs: list[int] = []
    module.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    return runs


def enable(model: Any, use_reentrant: bool) -> Any:
    """The transformers model with checkpointing turned on."""
    with warnings.catch_warnings():
        # transformers 5 calls it by another name
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


DROPPING = Base(llama(attention_dropout=0.2), text)
DROP: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2}
INNER = "model.layers.0.self_attn.q_proj"


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
            x = x + (block(x) if self.use_reentrant is None else self.checkpointed(block, x))
        return self.head(x)

    def checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        """`block(x)`, computed again in the backward pass."""
        return checkpoint(block, x, use_reentrant=bool(self.use_reentrant))


def blocks(use_reentrant: bool | None, shared: bool = False) -> nn.Module:
    """Such a module, in training and always with the same weights."""
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
