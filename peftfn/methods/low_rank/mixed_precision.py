"""A product of an input in half precision with a wider factor, that keeps the input as it came for the backward pass.

`F.linear(x.to(A.dtype), A)` would keep x once more, at twice the size, for each of the sites that read the same x: on a
bfloat16 base with float32 adapters that is half of all that a training step saves.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, a: Tensor) -> Tensor:
    """x Aᵀ in the dtype of A, (..., in) -> (..., r); under autocast in autocast's."""
    # Under autocast x is not widened; and torch.compile itself keeps what is smaller.
    is_plain = x.dtype == a.dtype or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    return F.linear(x.to(a.dtype), a) if is_plain else cast("Any", _Linear).apply(x, a)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor) -> Any:
        return F.linear(x.to(a.dtype), a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, a = ctx.saved_tensors
        to_x, to_a = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            (grad @ a).to(x.dtype) if to_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]).to(a.dtype) if to_a else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, a = ctx.saved_tensors
        along_x, along_a = tangents
        parts = [] if along_x is None else [F.linear(along_x.to(a.dtype), a)]
        parts += [] if along_a is None else [F.linear(x.to(a.dtype), along_a)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
