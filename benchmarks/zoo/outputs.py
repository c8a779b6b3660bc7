"""A model's output as tensors by name, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Caches hold what the last step needs, in shapes of their own; a loss is there only with labels.
LEFT_OUT = {"past_key_values", "cache", "cache_params", "past_key_values_image", "mems", "state", "encoder_cache"}


def tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """Every floating tensor of an output, by its path in it."""
    if isinstance(output, Tensor):
        return {name or "output": output} if output.is_floating_point() and output.numel() else {}
    if isinstance(output, Mapping):
        parts = {str(key): value for key, value in output.items() if str(key) not in LEFT_OUT}
    elif isinstance(output, (list, tuple)):
        parts = {str(number): value for number, value in enumerate(output)}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in parts.items():
        found |= tensors(value, f"{name}.{key}" if name else key)
    return found


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two outputs, infinite where their tensors or shapes are not the same."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    worst = 0.0
    for name, tensor in one.items():
        a, b = tensor.detach().double(), other[name].detach().double()
        same = (a == b) | (a.isnan() & b.isnan())  # infinities of masks are equal, and their difference is not a number
        difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf"))
        worst = max(worst, float(difference.max()))
    return worst


def largest(one: Mapping[str, Tensor]) -> float:
    """The largest finite number of an output."""
    finite = [t.detach().double()[t.isfinite()].abs() for t in one.values()]
    return max((float(t.max()) for t in finite if t.numel()), default=0.0)
