"""A linear layer and its low-rank delta as one `torch.autograd.Function`: x Wᵀ + b + s·B·A·(m ∘ x).

Autograd's own way keeps m ∘ x and m, in A's dtype, for each of the layers that read x. Here x is kept as it came, with
h = s·(m ∘ x) Aᵀ, r numbers a token, and m as bits (`peftfn.methods.low_rank.dropout`). With z = s·(dy B):
dA = zᵀ (m ∘ x), dB = dyᵀ h, dx = dy W + m ∘ (z A); products with A and B are taken in their dtype.

Where it takes fewer multiplications, y and dx are each one product with W + s·B·A, which is made for it and not kept;
nothing ever computes the gradient of that sum, which is as large as W. RunLoRA (https://arxiv.org/abs/2312.03415)
has these and the other orders of the products. A packed W (`peftfn.weights.codecs.packed_linear`) is only multiplied
with.

A and B may be one pair for each group of tokens (`peftfn.methods.low_rank.matmul`).

The backward pass is made of ordinary operations of torch, so derivatives of any order follow. Under `vmap`, in forward
mode and while Dynamo traces the caller runs plain operations instead: there they are as fast, or faster.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.transforms import is_transforming, unviewed, without_graph
from peftfn.methods.low_rank import dropout
from peftfn.methods.low_rank.matmul import add_to, added, column_major, flat, laid_out_as, more, product, scaled
from peftfn.weights.codecs import packed_linear
from peftfn.weights.codecs.packed_linear import Packed

SMALL = 2**14  # values of W below which calls, not multiplications, are what takes time
_BLOCK = 5 * 2**15  # values of x that fit a core's cache with what is made of them


Weight = Tensor | Packed


class Delta(NamedTuple):
    """The tensors of s·B·A: (r, in), (out, r) and 0-d; or (groups, r, in), (groups, out, r) and (groups, 1, 1)."""

    a: Tensor
    b: Tensor
    s: Tensor


def linear(x: Tensor, weight: Weight, bias: Tensor | None, delta: Delta, bits: Tensor | None) -> Tensor:
    """x Wᵀ + b + s·B·A·(m ∘ x), in the dtype of x Wᵀ; `bits` is m, or `None` for all ones."""
    held, tensors = (weight, ()) if isinstance(weight, Tensor) else (None, weight.tensors)
    given = (x, held, bias, *delta)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        how = None if isinstance(weight, Tensor) else functools.partial(_packed, weight.form, weight.spec)
        return cast("Any", _Adapted).apply(x, held, bias, None, *delta, bits, how, *tensors)[0]
    if bits is not None or x.dtype != delta.a.dtype or is_transforming():
        return _run(x, _times(x, weight, bias), delta, bits, writes=not is_transforming())[0]
    rows = flat(x, delta.a)
    if held is not None and _adds_up(held, x, delta) and _is_shorter(rows.shape[0], held):
        return F.linear(x, _sum(held, delta), bias)
    y = _times(x, weight, bias)
    found = add_to(flat(y, delta.a), scaled(product(rows, delta.a.mT), delta.s), delta.b.mT)
    return y if y.is_contiguous() else found.view(y.shape)  # a contiguous y was written to in place


def add(x: Tensor, y: Tensor, delta: Delta, bits: Tensor | None) -> Tensor:
    """y + s·B·A·(m ∘ x), in the dtype of y."""
    if torch.is_grad_enabled():
        return cast("Any", _Adapted).apply(x, None, None, y, *delta, bits, None)[0]
    return _run(x, y, delta, bits, writes=False)[0]


def _packed(form: packed_linear.Format, spec: Any, tensors: packed_linear.Tensors) -> Packed:
    return Packed(form, tensors, spec)


def _is_shorter(tokens: int, weight: Tensor) -> bool:
    """Whether the product with W + s·B·A and its making are fewer multiplications than the three apart."""
    outputs, inputs = weight.shape
    return tokens * (inputs + outputs) > inputs * outputs


def _adds_up(weight: Weight, x: Tensor, delta: Delta) -> TypeGuard[Tensor]:
    """Whether W + s·B·A is as exact as the two apart, and W large enough for its making to count as multiplications."""
    if not isinstance(weight, Tensor) or delta.a.dim() > 2:
        return False
    return x.dtype == weight.dtype == delta.a.dtype and weight.numel() >= SMALL


def _sum(weight: Tensor, delta: Delta) -> Tensor:
    """W + s·B·A, in r·i·o multiplications."""
    return torch.addmm(weight, scaled(delta.b, delta.s), delta.a)


def _blocks(delta: Delta, x: Tensor, mask: Tensor | None, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """All of them, as many tokens at a time as stay in a core's own cache, where there are several passes over them."""
    given = (x, mask, *others)
    passes = mask is not None or x.dtype != delta.a.dtype
    size = max(_BLOCK // max(x.shape[-1] * dropout.ROWS, 1), 1) * dropout.ROWS
    if not passes or x.device.type != "cpu" or torch.is_grad_enabled() or delta.a.dim() > 2 or len(x) <= size:
        return [given]
    each: list[Iterable[Any]] = [itertools.repeat(None) if one is None else torch.split(one, size) for one in given]
    return zip(*each, strict=False)  # as many as there are of x


def _seen(x: Tensor, a: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """m ∘ x and m, in the dtype of A."""
    wide = x.to(a.dtype)
    if mask is None:
        return wide, None
    keep = mask.to(a.dtype)
    return wide * keep if wide is x or torch.is_grad_enabled() else wide.mul_(keep), keep


def _run(x: Tensor, y: Tensor, delta: Delta, bits: Tensor | None, writes: bool) -> tuple[Tensor, Tensor]:
    """y + h Bᵀ and h, (..., tokens, r), in y's memory where `writes` says so."""
    x, rows = flat(x, delta.a), flat(y, delta.a)
    a, b, s = delta
    mask = None if bits is None else dropout.mask(bits, x.shape)
    if not writes:
        h = scaled(product(_seen(x, a, mask)[0], a.mT), s)
        return added(rows, h, b.mT).to(y.dtype).view(y.shape), h
    parts: list[Tensor] = []
    rows_of_a, rows_of_b = a.mT, b.mT
    for x_here, mask_here, y_here in _blocks(delta, x, mask, rows):
        h = scaled(product(_seen(x_here, a, mask_here)[0], rows_of_a), s)
        parts.append(h)
        _ = add_to(y_here, h, rows_of_b)
    return rows.view(y.shape), parts[0] if len(parts) == 1 else torch.cat(parts)


class _Adapted(torch.autograd.Function):
    """y + h Bᵀ, where y is given or is x Wᵀ + b; and h, because only inputs and outputs can be kept.

    h has a gradient of its own only where second derivatives are taken.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:  # torch inspects the signature at each call: a short one is faster
        x, weight, bias, y, a, b, s, bits, how, *tensors = inputs
        delta = Delta(a, b, s)
        weight = weight if how is None else how(tuple(tensors))
        # T·o·r multiplications for h Bᵀ, and a pass over y; h itself is needed either way.
        if y is None and bits is None and x.numel() > x.shape[-1] ** 2 and _adds_up(weight, x, delta):
            y, h = F.linear(x, _sum(weight, delta), bias), scaled(flat(x, a) @ a.T, s)
        elif y is None:
            y, h = _run(x, _times(x, weight, bias), delta, bits, writes=True)
        else:
            y, h = _run(x, y, delta, bits, writes=False)
        return unviewed(y), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, _, a, b, s, bits, ctx.how, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, a, b, s, bits, output[1], *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # read once: a checkpoint computes them at each reading
        x, weight, a, b, s, bits, h, *tensors = saved
        weight = weight if ctx.how is None else ctx.how(tuple(tensors))
        to_x, to_weight, to_bias, to_y, *to_delta = ctx.needs_input_grad[:7]
        dy, into_h = grads
        if dy is None and into_h is None:
            return (None,) * len(ctx.needs_input_grad)
        delta = Delta(a, b, s)
        above = h.new_zeros(*h.shape[:-1], b.shape[-2]) if dy is None else flat(dy, a)
        with without_graph((*grads, *saved)):
            dx, *rest = _pulled(_Kept(flat(x, a), weight, delta, bits, h), above, into_h, to_x, to_delta)
        rows = above.reshape(-1, above.shape[-1])
        return (
            None if dx is None else dx.to(x.dtype).view(x.shape),
            rows.T @ x.reshape(-1, x.shape[-1]) if to_weight else None,
            rows.sum(0) if to_bias else None,
            dy if to_y else None,
            *rest,
            *(None for _ in range(2 + len(tensors))),
        )


class _Kept(NamedTuple):
    """The tensors that the backward pass reads; x is (tokens, in), or (groups, tokens, in)."""

    x: Tensor
    weight: Weight | None
    delta: Delta
    bits: Tensor | None
    h: Tensor


def _pulled(
    kept: _Kept, dy: Tensor, into_h: Tensor | None, to_x: bool, to_delta: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, A, B and s."""
    x, weight, delta, bits, h = kept
    a, b, s = delta
    tokens, mask = dy.shape[0], None if bits is None else dropout.mask(bits, x.shape)
    # T·i·r multiplications for z A, and a pass over dx
    sums = to_x and into_h is None and bits is None and tokens > dy.shape[-1]
    whole = _sum(weight, delta) if sums and weight is not None and _adds_up(weight, x, delta) else None
    dx = None if weight is None or not to_x else _back(dy, weight if whole is None else whole)
    found: list[Tensor | None] = [None, None, None]
    parts: list[Tensor] = []
    columns = column_major(b, tokens)
    for x_here, mask_here, *others in _blocks(delta, x, mask, dy, h, into_h, dx):
        dy_here, h_here, into_h_here, dx_here = others
        above = dy_here.to(b.dtype)
        dh = product(above, columns)  # (..., rows, r)
        dh = dh if into_h_here is None else dh + into_h_here
        z = scaled(dh, s)
        seen, keep = _seen(x_here, a, mask_here)
        found[0] = more(found[0], z.mT, seen) if to_delta[0] else None
        # In this order, and turned below: faster than dyᵀ h where r is small.
        found[1] = more(found[1], h_here.mT, above) if to_delta[1] else None
        if to_delta[2]:
            found[2] = _plus(found[2], (dh * product(seen, a.mT)).sum_to_size(s.shape).to(s.dtype))
        if to_x and whole is None:
            parts.append(_to_input(dx_here, z, a, keep))
    if parts and (dx is None or torch.is_grad_enabled()):
        dx = parts[0] if len(parts) == 1 else torch.cat(parts)
    return dx, found[0], None if found[1] is None else laid_out_as(b, found[1].mT), found[2]


def _times(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, where no derivative is asked of it."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else packed_linear.run(weight, x, bias)


def _back(dy: Tensor, weight: Weight) -> Tensor:
    """dy W."""
    rows = dy.reshape(-1, dy.shape[-1])
    dx = rows @ weight if isinstance(weight, Tensor) else packed_linear.pulled(weight, rows)
    return dx.view(*dy.shape[:-1], dx.shape[-1])


def _to_input(dx: Tensor | None, z: Tensor, a: Tensor, keep: Tensor | None) -> Tensor:
    """dx + m ∘ (z A); dx is written to where no derivative is asked of it."""
    if dx is None or torch.is_grad_enabled():
        delta = product(z, a) if keep is None else product(z, a) * keep
        return delta if dx is None else dx + delta
    return add_to(dx, z, a, keep)


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
