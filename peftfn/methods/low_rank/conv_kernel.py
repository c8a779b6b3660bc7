"""A convolution with the kernel W + s·B·A, which is made for it and not kept: x * (W + s·B·A) + b, `*` a convolution.

With h = x * A (r channels), o outputs and z = s·Bᵀ dy: dx is the one transposed convolution of dy with W + s·B·A, made
once more; dA is the gradient of a kernel for x and z, dB = s·Σ dy hᵀ, ds = Σ h ∘ Bᵀ dy. So nothing ever computes the
gradient of the sum, a convolution as large as the layer's own, and only h is kept beside x. It is RunLoRA's
forward with W + s·B·A (https://arxiv.org/abs/2312.03415), for a convolution.

As in `linear_kernel`, the backward pass is made of ordinary operations of torch, so derivatives of any order follow;
under `vmap`, in forward mode and while Dynamo traces the caller runs plain operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.transforms import unviewed
from peftfn.methods.low_rank.linear_kernel import Delta
from peftfn.methods.low_rank.matmul import scaled

_CALLS = 2**17  # see `is_cheaper`
_TRAINING = 4
_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Geometry(NamedTuple):
    """The geometry of a convolution, a number for each axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def is_cheaper(x: Tensor, weight: Tensor, stride: tuple[int, ...], trains: bool) -> bool:
    """Whether a convolution takes less time with the kernel W + s·B·A than beside its delta, by shape.

    With o outputs, and i·k inputs that each of them sees, the sum has o·i·k numbers, and the delta takes products and
    passes of o + i·k numbers at each position of the output; measured, one number takes as long as the other, whatever
    the rank (of 16 and less), and the delta's calls as long as `_CALLS` of them. A training step makes the sum twice,
    and has as many calls either way: there the delta has to have `_TRAINING` times what the sum has.
    `benchmarks/convolutions.py` prints both sides of it.
    """
    whole, outputs = weight.numel(), weight.shape[0]
    delta = x.numel() // x.shape[1 - weight.dim()] // math.prod(stride) * (outputs + whole // outputs)
    return delta > _TRAINING * whole if trains else delta + _CALLS > whole


def kernel(weight: Tensor, delta: Delta) -> Tensor:
    """W + s·B·A in the shape of W, in one pass."""
    left, right = scaled(delta.b.flatten(1), delta.s), delta.a.flatten(1)  # (out, r), (r, in·k)
    return torch.addmm(weight.flatten(1), left, right).view(weight.shape)


def convolution(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta) -> Tensor:
    """What the layer computes with the kernel W + s·B·A, and its gradients."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0,) * len(padding)  # noqa: SLF001  # torch has no public name for it
    how = Geometry(layer.stride, padding, layer.dilation)
    return cast("Any", _Convolved).apply(x, weight, bias, *delta, how)[0]


class _Convolved(torch.autograd.Function):
    """x * (W + s·B·A) + b; and h = x * A, because only inputs and outputs can be kept.

    h has a gradient of its own only where second derivatives are taken.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Any, a: Tensor, b: Tensor, s: Tensor, how: Geometry) -> Any:  # noqa: PLR0917  # a Function's tensors
        convolve = _CONVOLVE[x.dim()]
        h = convolve(x, a, None, *how)
        return unviewed(convolve(x, kernel(weight, Delta(a, b, s)), bias, *how)), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, a, b, s, ctx.how = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, a, b, s, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, a, b, s, h = ctx.saved_tensors
        to_x, to_weight, to_bias, to_a, to_b, to_s, _ = ctx.needs_input_grad
        dy, into_h = grads
        if dy is None and into_h is None:
            return (None,) * 7
        dy = h.new_zeros(h.shape[0], b.shape[0], *h.shape[2:]) if dy is None else dy
        rows = dy.flatten(2)  # (rows, out, positions)
        dh = b.flatten(1).T @ rows  # (rows, r, positions)
        z = scaled(dh, s).view(h.shape)
        z = z if into_h is None else z + into_h
        dx = _to_input(dy, x, kernel(weight, Delta(a, b, s)), ctx.how) if to_x else None
        if dx is not None and into_h is not None:
            dx = dx + _to_input(into_h, x, a, ctx.how)
        db = torch.bmm(rows, h.flatten(2).mT).sum(0) if to_b else None
        return (
            dx,
            _to_kernel(dy, x, weight, ctx.how) if to_weight else None,
            rows.sum((0, 2)) if to_bias else None,
            _to_kernel(z, x, a, ctx.how) if to_a else None,
            None if db is None else scaled(db, s).view(b.shape),
            (dh * h.flatten(2)).sum().to(s.dtype) if to_s else None,
            None,
        )


# torch.nn.grad's functions of these names take shapes, and copy as much as an input to have something of the shape.


def _to_input(dy: Tensor, x: Tensor, weight: Tensor, how: Geometry) -> Tensor:
    return _backward(dy, x, weight, how, (True, False, False))[0]


def _to_kernel(dy: Tensor, x: Tensor, weight: Tensor, how: Geometry) -> Tensor:
    return _backward(dy, x, weight, how, (False, True, False))[1]


def _backward(dy: Tensor, x: Tensor, weight: Tensor, how: Geometry, asked: tuple[bool, bool, bool]) -> list[Tensor]:
    none = (0,) * len(how.stride)
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *how, False, none, 1, asked)
