"""Fused attention that `torch.vmap` maps over: the mapped axis is a part of the batch, in the forward and the backward.

torch has no batching rule for the kernel that `scaled_dot_product_attention` runs on CPU, and calls it for one slice
after the other, with a warning. Where torch would run that kernel, it is run here as a Function with a rule; where it
would not (dropout, a bias with a gradient, `sdpa_kernel(SDPBackend.MATH)`, other devices), torch does what it does.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peftfn.core import transforms

_MATH = "Compute it within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which has it."


def of_transformers(*args: Any, **kwargs: Any) -> Any:
    """What the `sdpa` attention of transformers returns, computed with `attention`."""
    run = _sdpa_attention_forward()
    if not any(isinstance(one, Tensor) and transforms.is_mapped(one) for one in (*args, *kwargs.values())):
        return run(*args, **kwargs)
    with _Instead():
        return run(*args, **kwargs)


@functools.cache
def _sdpa_attention_forward() -> Callable[..., Any]:
    found: Any = importlib.import_module("transformers.integrations.sdpa_attention")
    return found.sdpa_attention_forward


class _Instead(TorchFunctionMode):
    """A mode in which `F.scaled_dot_product_attention` is `attention`, in this thread.

    It surrounds one call of attention only: around a whole model its cost in Python, for each operation, would exceed
    that of torch's loop over slices.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = attention if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))


def attention(  # noqa: PLR0917  # as torch's own
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · query keyᵀ + attn_mask) value: `F.scaled_dot_product_attention`, with a rule for `torch.vmap`.

    Shapes: query (B, H, L, D), key and value (B, H or fewer, S, D), attn_mask (L, S) or what expands to (B, H, L, S).
    """
    how: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if not _is_fused(query, key, value, attn_mask, dropout_p, how):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **how)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return cast("Any", _Fused).apply(query, key, value, attn_mask, _How(is_causal, scale))[0]


def _is_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, how: dict[str, Any]
) -> bool:
    """Whether torch would run the kernel for one slice."""
    given = (query, key, value, *(() if mask is None else (mask,)))
    if any(one.device.type != "cpu" for one in given) or (mask is not None and transforms.requires_any_grad(mask)):
        return False
    # torch is asked with tensors of these shapes: it gives no answer for mapped ones
    like: list[Tensor | None] = [torch.empty(one.shape, dtype=one.dtype) for one in given]
    like = like if mask is not None else [*like, None]
    return transforms.would_run_flash(*like, dropout_p, **how)


class _How(NamedTuple):
    """The arguments of the kernel that are no tensors."""

    is_causal: bool
    scale: float | None


class _Fused(torch.autograd.Function):
    """(output, log of the sums of the softmax, which the backward pass reads)."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: _How) -> Any:
        given = map(_in_rows, (query, key, value))
        return transforms.FLASH(*given, 0.0, how.is_causal, attn_mask=mask, scale=how.scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.how = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*cast("Any", _FusedBackward).apply(grads[0], *ctx.saved_tensors, ctx.how), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"torch's fused attention has no forward mode. {_MATH}")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _mapped(_Fused, info, in_dims, inputs, mask_at=3)


class _FusedBackward(torch.autograd.Function):
    """The gradients of query, key and value."""

    @staticmethod
    def forward(dy: Tensor, *rest: Any) -> Any:
        query, key, value, mask, output, sums, how = rest
        given = (*map(_in_rows, (dy, query, key, value, output)), sums, 0.0, how.is_causal)
        return transforms.FLASH_BACKWARD(*given, attn_mask=mask, scale=how.scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"torch's fused attention has no second derivative. {_MATH}")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"torch's fused attention has no second derivative. {_MATH}")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _mapped(_FusedBackward, info, in_dims, inputs, mask_at=4)


def _in_rows(one: Tensor) -> Tensor:
    """The tensor with a contiguous last axis: the kernel reads on from there, whatever the stride says.

    torch asks the tensors of a call for their strides before it chooses the kernel; those of a mapped call have other
    ones in memory, by where the mapped axis is.
    """
    return one if one.stride(-1) == 1 else one.contiguous()


def _mapped(function: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...], mask_at: int) -> Any:
    """What the function returns, with the mapped axis folded into the batch's before it and unfolded after it."""
    size, batch = info.batch_size, _batch(inputs[0], in_dims[0])

    def folded(number: int) -> Any:
        one, dim = inputs[number], in_dims[number]
        if not isinstance(one, Tensor):
            return one
        if number == mask_at:
            return _folded_mask(one, dim, size, batch)
        moved = one.expand(size, *one.shape) if dim is None else one.movedim(dim, 0)
        return moved.flatten(0, 1)

    found = function.apply(*map(folded, range(len(inputs))))
    return tuple(one.unflatten(0, (size, batch)) for one in found), (0,) * len(found)


def _batch(one: Tensor, dim: int | None) -> int:
    return one.shape[0] if dim is None else one.movedim(dim, 0).shape[1]


def _folded_mask(mask: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """The mask for size * batch rows; as it is, where it is the same for all of them."""
    if dim is None:
        if mask.dim() == 2 or mask.shape[0] == 1:
            return mask
        return mask.expand(size, *mask.shape).flatten(0, 1)
    mask = mask.movedim(dim, 0)
    mask = mask[:, None, None] if mask.dim() == 3 else mask
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)
