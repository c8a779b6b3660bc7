"""What activation checkpointing needs of an adapted model, whose frozen base gives its blocks inputs without gradients.

torch's reentrant checkpoint runs a block without gradients, and again in the backward pass only if one of the block's
inputs requires grad: https://pytorch.org/docs/stable/checkpoint.html
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

_WANTS = "_peftfn_wants_grad"


def suit(bound: nn.Module) -> None:
    """Make a module record whether gradients are on when it is called, and its embeddings' output require grad."""
    bound.register_forward_pre_hook(_note)
    bound.register_forward_hook(_forget, always_call=True)
    for embedding in input_embeddings(bound):
        embedding.register_forward_hook(functools.partial(_require_grad, bound))


def wants_grad(bound: nn.Module) -> bool:
    """Whether gradients were on when the bound module was called: inside a checkpointed block they are off."""
    return bound.__dict__.get(_WANTS, False)


def _note(bound: nn.Module, inputs: Any) -> None:
    del inputs
    if not torch.compiler.is_compiling():
        bound.__dict__[_WANTS] = torch.is_grad_enabled()


def _forget(bound: nn.Module, inputs: Any, output: Any) -> None:
    del inputs, output
    bound.__dict__.pop(_WANTS, None)


def input_embeddings(bound: nn.Module) -> list[nn.Module]:
    """The input embeddings of every transformers model inside the module."""
    found: dict[int, nn.Module] = {}
    for module in bound.modules():
        find = getattr(module, "get_input_embeddings", None)
        try:
            embedding: Any = find() if callable(find) else None
        except NotImplementedError:
            continue
        if isinstance(embedding, nn.Module):
            found[id(embedding)] = embedding
    return list(found.values())


def _require_grad(bound: nn.Module, module: nn.Module, inputs: Any, output: Any) -> Any:
    del module, inputs
    if not (bound.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return output
    if not isinstance(output, Tensor) or output.requires_grad:
        return output
    checkpointing = any(one.__dict__.get("gradient_checkpointing") for one in bound.modules())
    return output.detach().requires_grad_(True) if checkpointing else output


def refuse_lost_gradient(path: str, tensors: Sequence[Tensor]) -> None:
    """Refuse the one case in which torch would silently lose an adapter's gradient: a site that runs only without them.

    Reentrant checkpointing runs a block without gradients first, and again in the backward pass only if one of the
    block's inputs requires grad. A frozen base gives it none.
    """
    if not any(tensor.requires_grad for tensor in tensors):
        return
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    if frame is None:
        return
    inputs = frame.f_locals.get("args", ())
    if not any(isinstance(one, Tensor) and one.requires_grad for one in inputs):
        raise RuntimeError(
            f"{path or 'the model'}: activation checkpointing with use_reentrant=True, and no input of the "
            "checkpointed block requires grad: the adapter would get no gradient. Use use_reentrant=False, or make "
            "the block's input require grad."
        )
