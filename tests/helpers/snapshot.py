"""Everything about a base that no call may change."""

from __future__ import annotations

from typing import Any

import quantized
import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Objects, bits, gradients, flags, hooks, attributes and the global random state, to compare with `==`."""
    seen: dict[str, Any] = {"rng": torch.get_rng_state().tolist(), "packed": quantized.states(model)}
    seen |= {"rng of GPUs": [state.tolist() for state in torch.cuda.get_rng_state_all()]}
    for path, module in model.named_modules(remove_duplicate=False):
        own = module.__dict__
        seen[f"{path}: object"] = (id(module), type(module), sorted(own), module.training)
        hooks = {name: list(value) for name, value in own.items() if name.endswith("_hooks")}
        seen[f"{path}: hooks"] = hooks
        seen[f"{path}: plain"] = {name: repr(value) for name, value in own.items() if not name.startswith("_")}
        seen[f"{path}: children"] = [(name, id(child)) for name, child in own["_modules"].items()]
        for home in ("_parameters", "_buffers"):
            for name, tensor in own[home].items():
                seen[f"{path}.{name}"] = None if tensor is None else describe(tensor)
    return seen


def describe(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        id(tensor),
        [(one.data_ptr(), None if one.is_meta else quantized.bits_of(one)) for one in quantized.parts_of(tensor)],
        tensor._version,
        tensor.requires_grad,
        tensor.grad is None,
        tensor.dtype,
    )
