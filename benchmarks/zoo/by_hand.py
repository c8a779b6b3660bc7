"""Adapted models without any adapter: copies whose weights were replaced by W + sBA or lW, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftfn as pf


def adapted(model: nn.Module, adapter: pf.Adapter) -> Any:
    """A copy of the model whose weights are the adapted ones; weights that were tied are so no longer."""
    made = copy.deepcopy(model)
    for path, leaf in adapter.params.items():
        owner, name = place(made, path)
        for key, tensor in leaf.items():  # a layer may be saved whole and have a delta too: on what was saved
            if "lora_" not in key and "ia3_" not in key:
                _put(owner, key, tensor)
        if any("lora_" in key for key in leaf):
            _put(owner, name, weight(owner, name) + delta(owner, name, leaf, adapter.buffers[path]))
        elif "ia3_l" in leaf:
            _scale(owner, leaf["ia3_l"])
    return made


def place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the name of the parameter that an adapter's path says: a layer's weight, or a bare parameter."""
    owner, _, name = path.rpartition(".")
    parameters = dict(model.get_submodule(owner).named_parameters(recurse=False)) if path else {}
    return (model.get_submodule(owner), name) if name in parameters else (model.get_submodule(path), "weight")


def weight(owner: nn.Module, name: str) -> Tensor:
    return getattr(owner, name).detach()


def _put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(owner, name, nn.Parameter(tensor.detach().clone()))


def factors(leaf: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """LoRA's A and B."""
    a = next(tensor for key, tensor in leaf.items() if key in ("lora_A", "lora_embedding_A"))
    b = next(tensor for key, tensor in leaf.items() if key in ("lora_B", "lora_embedding_B"))
    return a, b


def delta(owner: nn.Module, name: str, leaf: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
    """What LoRA adds to that weight, in its shape."""
    a, b = factors(leaf)
    return shaped(owner, weight(owner, name), a, b) * buffers["scaling"].to(a.dtype)


def shaped(owner: nn.Module, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """BA in the shape of the base's weight."""
    if base.ndim == 3 and not isinstance(owner, nn.Conv1d):  # experts: E of them, rank r each
        count = base.shape[0]
        per = torch.einsum("ore,eri->eoi", b.reshape(b.shape[0], -1, count), a.reshape(count, -1, a.shape[1]))
        return per if per.shape == base.shape else per.mT
    if base.ndim > 2:  # convolutions: B is pointwise
        return torch.einsum("or,r...->o...", b.flatten(1), a)
    product = b @ a
    return product.mT if isinstance(owner, (Conv1D, nn.Embedding)) else product


def _scale(owner: nn.Module, vector: Tensor) -> None:
    """IA3: l times what the layer puts out (a column), or what it takes in (a row)."""
    base = weight(owner, "weight")
    if base.ndim > 2:  # a convolution's vector is shaped like what it puts out: one number for each channel
        _put(owner, "weight", base * vector.reshape(-1, *[1] * (base.ndim - 1)))
        if isinstance(owner.bias, Tensor):
            _put(owner, "bias", owner.bias.detach() * vector.flatten())
        return
    _put(owner, "weight", base * (vector.mT if isinstance(owner, Conv1D) else vector))
    outputs = vector.shape[0] if vector.ndim > 1 else 0
    bias = getattr(owner, "bias", None)
    if outputs > 1 and isinstance(bias, Tensor):
        _put(owner, "bias", bias.detach() * vector[:, 0])


def not_called(model: nn.Module, adapter: pf.Adapter, batch: Mapping[str, Any]) -> list[str]:
    """The adapter's layers whose forward does not run in a call of the bare model."""
    made = copy.deepcopy(model)
    ran: set[str] = set()
    for path in adapter.params:
        owner, _ = place(made, path)
        owner.register_forward_hook(lambda *_, path=path: ran.add(path))
    with torch.no_grad():
        made(**batch)
    return sorted(adapter.params.keys() - ran)


def gradients(made: Any, adapter: pf.Adapter, loss: Tensor) -> dict[str, dict[str, Tensor]]:
    """The gradient of each factor, from the gradients of the weights of a model of `adapted`."""
    spots = {path: place(made, path) for path in adapter.params}
    wanted = {
        path: {key: getattr(owner, key if "lora_" not in key else name) for key in adapter.params[path]}
        for path, (owner, name) in spots.items()
    }
    every = list({id(p): p for leaf in wanted.values() for p in leaf.values()}.values())
    found = torch.autograd.grad(loss, every, allow_unused=True)
    grads = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(every, found, strict=True)}
    result: dict[str, dict[str, Tensor]] = {}
    for path, leaf in adapter.params.items():
        owner, name = spots[path]
        result[path] = {key: grads[id(p)] for key, p in wanted[path].items() if "lora_" not in key}
        if any("lora_" in key for key in leaf):
            a, b = (tensor.detach().clone().requires_grad_() for tensor in factors(leaf))
            base = getattr(owner, name)
            product = shaped(owner, base, a, b) * adapter.buffers[path]["scaling"].to(a.dtype)
            ga, gb = torch.autograd.grad(product, (a, b), grads[id(base)])
            names = sorted(key for key in leaf if "lora_" in key)
            result[path] |= dict(zip(names, (ga, gb), strict=True))
    return result
