"""A linear map whose weight is packed: one `torch.autograd.Function` for every format and every transform of torch.

The weight is a constant, so y = x Wᵀ + b is linear in x, and three products are all that derivatives of any order need:
the format's own kernel for y, its tangent dx Wᵀ, and its gradient dy W. The last two are taken with W unpacked a block
of rows at a time; nothing of the weight's size is kept for the backward pass but the packed tensors of the base itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.transforms import unviewed

Tensors = tuple[Tensor, ...]

_BLOCK = 2**22  # values of W that are unpacked at once: 16 MB in float32


class Format(NamedTuple):
    """How one kind of packed weight is computed with.

    Attributes:
        kernel: `(tensors, spec, x, b or None, mapped) -> x Wᵀ + b`, as the format computes it. `mapped` of x's leading
            axes are mapped by `vmap`: what a kernel decides from a whole batch, it decides for each of them apart.
        rows: `(tensors, spec, start, stop, dtype) -> W[start:stop]`, (stop - start, in), dense.
        step: `(spec) -> n`: `start` is a multiple of n.
        axis: 0 where `rows` gives rows; 1 where it gives columns, W[:, start:stop], (out, stop - start).
        pick: `(tensors, spec, ids, dtype) -> W[ids]`, (n, in), dense, for embeddings; `None` where there are none.
    """

    kernel: Callable[[Tensors, Any, Tensor, Tensor | None, int], Tensor]
    rows: Callable[[Tensors, Any, int, int, torch.dtype], Tensor]
    step: Callable[[Any], int]
    pick: Callable[[Tensors, Any, Tensor, torch.dtype], Tensor] | None = None
    axis: int = 0


class Packed(NamedTuple):
    """A packed weight: what the format is, its tensors, and its numbers.

    Attributes:
        form: the format.
        tensors: the base's own tensors, or what little is made of them.
        spec: a named tuple of numbers and names, with `shape`: (out, in).
    """

    form: Format
    tensors: Tensors
    spec: Any


Product = tuple[Packed, Tensor | None]
"""The W and b of x Wᵀ + b."""


def linear(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, (..., in) -> (..., out), differentiable in x and b."""
    inputs = packed.spec.shape[1]
    if x.shape[-1] != inputs:
        raise RuntimeError(f"the layer takes (..., {inputs}) and was given {tuple(x.shape)}")
    return _multiplied(_What(_KERNEL, 0, packed.form, packed.spec), x, bias, packed.tensors)


def run(packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, not recorded by autograd: for a Function that has a derivative of its own."""
    return _computed(_What(_KERNEL, 0, packed.form, packed.spec), x, bias, packed.tensors)


def pulled(packed: Packed, y: Tensor) -> Tensor:
    """y W, (..., out) -> (..., in), in the dtype of y, differentiable in y."""
    return _pulled(_What(_GRADIENT, 0, packed.form, packed.spec), y, packed.tensors)


def look_up(packed: Packed, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """W[ids], (...) -> (..., in)."""
    fill = (None for _ in range(_SLOTS - len(packed.tensors)))
    return cast("Any", _Rows).apply(ids, (packed.form, packed.spec, dtype), *packed.tensors, *fill)


def by_blocks(packed: Packed, x: Tensor) -> Tensor:
    """x Wᵀ with W unpacked a block at a time: the kernel of a format that has no other."""
    return _tangent(packed, x)


def dense(packed: Packed, dtype: torch.dtype) -> Tensor:
    """W, (out, in)."""
    blocks = [packed.form.rows(packed.tensors, packed.spec, *at, dtype) for at in _blocks(packed.form, packed.spec)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, packed.form.axis)


def _blocks(form: Format, spec: Any) -> Iterator[tuple[int, int]]:
    length, width = spec.shape[form.axis], spec.shape[1 - form.axis]
    step = form.step(spec)
    size = max(_BLOCK // max(width, 1) // step, 1) * step
    for start in range(0, length, size):
        yield start, min(start + size, length)


_KERNEL, _TANGENT, _GRADIENT = "kernel", "tangent", "gradient"
_SLOTS = 5  # a Function that torch.compile traces has a fixed number of arguments


@dataclasses.dataclass(frozen=True)
class _What:
    """One of the three products: which, of which weight, and how many of x's leading axes are mapped.

    No tuple: torch.func would look through it for tensors at each call.
    """

    product: str
    mapped: int
    form: Format
    spec: Any


def _product_of(what: _What, product: str) -> _What:
    return _What(product, what.mapped, what.form, what.spec)


def _multiplied(what: _What, x: Tensor, bias: Tensor | None, tensors: Sequence[Any]) -> Tensor:
    # torch.compile traces no Function with a jvp or a vmap rule of its own.
    function: Any = _Traced if torch.compiler.is_compiling() else _Product
    return function.apply(x, bias, what, *tensors, *(None for _ in range(_SLOTS - len(tensors))))


def _computed(what: _What, x: Tensor, bias: Tensor | None, tensors: Tensors) -> Tensor:
    """The product itself, not recorded by autograd."""
    outputs, inputs = what.spec.shape
    if x.numel() == 0 or outputs == 0:
        made = x.new_zeros(*x.shape[:-1], inputs if what.product == _GRADIENT else outputs)
        return made if bias is None else made + bias
    if what.product == _KERNEL:
        return what.form.kernel(tensors, what.spec, x, bias, what.mapped)
    with _without_autocast(x.device.type):
        product = _tangent if what.product == _TANGENT else _gradient
        return product(Packed(what.form, tensors, what.spec), x)


def _pulled(what: _What, grad: Tensor, tensors: Sequence[Any]) -> Tensor:
    """The product that a backward pass takes; a Function only where its own derivative may be asked for."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _multiplied(what, grad, None, tensors)
    return _computed(what, grad, None, tuple(tensor for tensor in tensors if tensor is not None))


class _Traced(torch.autograd.Function):
    """One of the three products; the tangent's gradient is the gradient's product, and the other way round."""

    generate_vmap_rule = True  # torch.compile knows no other

    @staticmethod
    # Each tensor by itself: torch.compile takes a Function of `*tensors` for one of the old kind, with a context first.
    def forward(x: Tensor, bias: Any, what: _What, one: Any, two: Any, three: Any, four: Any, five: Any) -> Any:  # noqa: PLR0917
        tensors = tuple(tensor for tensor in (one, two, three, four, five) if tensor is not None)
        return unviewed(_computed(what, x, bias, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, bias, what, *tensors = inputs
        ctx.what = what
        ctx.x_dtype, ctx.b_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.y_shape, ctx.y_dtype = output.shape, output.dtype
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x_grad = b_grad = None
        if ctx.needs_input_grad[0]:
            other = _TANGENT if ctx.what.product == _GRADIENT else _GRADIENT
            x_grad = _pulled(_product_of(ctx.what, other), grad, ctx.saved_tensors).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            b_grad = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.b_dtype)
        return x_grad, b_grad, None, *(None for _ in range(_SLOTS))


class _Product(_Traced):
    """The same in forward mode too, and for a mapped axis, which is folded into the rows: one kernel call."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        x, bias, what, *tensors = args
        if any(dim is not None for dim in in_dims[3:]):
            raise NotImplementedError("vmap over packed weights: their kernels take one weight. Map over adapters.")
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        what = _What(what.product, what.mapped + 1, what.form, what.spec)
        if bias is None or in_dims[1] is None:
            return _multiplied(what, x, bias, tensors), 0
        y = _multiplied(what, x, None, tensors)
        bias = bias.movedim(in_dims[1], 0)  # (K, out)
        return y + bias.view(bias.shape[0], *(1 for _ in y.shape[2:]), bias.shape[-1]).to(y.dtype), 0

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        along_x, along_b = tangents[:2]
        along = None
        if along_x is not None:
            product = _GRADIENT if ctx.what.product == _GRADIENT else _TANGENT
            what = _product_of(ctx.what, product)
            along = _multiplied(what, along_x, None, ctx.saved_tensors).to(ctx.y_dtype)
        if along_b is not None:
            moved = along_b.to(ctx.y_dtype)
            along = moved.expand(ctx.y_shape) if along is None else along + moved
        return along


class _Rows(torch.autograd.Function):
    """Rows of W by their numbers, which have no derivative."""

    @staticmethod
    def forward(ids: Tensor, what: tuple[Any, ...], one: Any, two: Any, three: Any, four: Any, five: Any) -> Any:  # noqa: PLR0917
        form, spec, dtype = what
        tensors = tuple(tensor for tensor in (one, two, three, four, five) if tensor is not None)
        return unviewed(form.pick(tensors, spec, ids.reshape(-1), dtype).view(*ids.shape, spec.shape[1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del inputs
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del grads
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        ids, *rest = args
        del info
        return cast("Any", _Rows).apply(ids.movedim(in_dims[0], 0), *rest), 0


def _tangent(packed: Packed, x: Tensor) -> Tensor:
    """x Wᵀ."""
    return _joined(x, packed) if packed.form.axis == 0 else _summed(x, packed)


def _gradient(packed: Packed, y: Tensor) -> Tensor:
    """y W."""
    return _summed(y, packed) if packed.form.axis == 0 else _joined(y, packed)


def _joined(x: Tensor, packed: Packed) -> Tensor:
    """The product with all of x and each block, side by side."""
    form, tensors, spec = packed
    parts = [_times(x, _rows(form, tensors, spec, at, x.dtype), form.axis == 0) for at in _blocks(form, spec)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _summed(x: Tensor, packed: Packed) -> Tensor:
    """The sum of the products of each block with its part of x."""
    form, tensors, spec = packed
    blocks = list(_blocks(form, spec))
    if len(blocks) == 1:
        return _times(x, _rows(form, tensors, spec, blocks[0], x.dtype), form.axis == 1)
    # Sums of halves are taken in float32, as one product would.
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(*x.shape[:-1], spec.shape[1 - form.axis], dtype=wide)
    for start, stop in blocks:
        weight = _rows(form, tensors, spec, (start, stop), x.dtype)
        total = total + _times(x[..., start:stop], weight, form.axis == 1)
    return total.to(x.dtype)


def _times(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return F.linear(x, weight) if transposed else x @ weight


def _rows(form: Format, tensors: Tensors, spec: Any, at: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return form.rows(tensors, spec, *at, dtype)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device)  # the meta device is not
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()
