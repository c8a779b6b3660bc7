"""Products with the factors of a low-rank pair, one pair or one for each group of tokens.

One pair is A (r, in) and B (out, r), of a matrix x (tokens, in). With an axis more in front they are slices, of an x in
as many groups, and every product is one batched product.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NARROW = 8  # columns of B up to which dy B is slow on CPU unless each lies in one piece: 2.4 times, at 512 tokens


def scaled(tensor: Tensor, s: Tensor) -> Tensor:
    """`s * tensor` in the dtype of the tensor; the scaling itself is never rounded to a half."""
    if tensor.dtype == s.dtype:
        return tensor * s
    return (tensor.to(torch.promote_types(tensor.dtype, s.dtype)) * s).to(tensor.dtype)


def flat(x: Tensor, a: Tensor) -> Tensor:
    """(tokens, n), or (groups, tokens, n) where A and B have slices, (groups, r, in) and (groups, out, r)."""
    if a.dim() == 2:
        return x.reshape(-1, x.shape[-1])
    groups = a.shape[0]
    return x if x.dim() == 3 and x.shape[0] == groups else x.reshape(groups, -1, x.shape[-1])


def product(one: Tensor, other: Tensor) -> Tensor:
    """The product of two matrices, or of each group's."""
    return torch.mm(one, other) if one.dim() == 2 else torch.bmm(one, other)


def added(total: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The total and the product, in the wider dtype, in one pass where they have the same."""
    if total.dtype != one.dtype:
        return total + product(one, other)
    return torch.addmm(total, one, other) if total.dim() == 2 else torch.baddbmm(total, one, other)


def add_to(total: Tensor, one: Tensor, other: Tensor, keep: Tensor | None = None) -> Tensor:
    """The total, to which the product, times `keep`, is added in place: in the wider dtype, and rounded once."""
    if torch.promote_types(total.dtype, one.dtype) != one.dtype:
        found = product(one, other)
        return total.add_(found if keep is None else found.mul_(keep))
    wide = total.to(one.dtype)
    if keep is not None:
        _ = wide.addcmul_(product(one, other), keep)
    else:
        _ = wide.addmm_(one, other) if total.dim() == 2 else wide.baddbmm_(one, other)
    return total if wide is total else total.copy_(wide)


def more(total: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """The sum so far plus one more product, in place."""
    return product(one, other) if total is None else add_to(total, one, other)


def column_major(b: Tensor, tokens: int) -> Tensor:
    """B, with its columns in one piece each where the product with so many tokens is faster for it."""
    is_slow = b.dim() == 2 and b.shape[1] <= _NARROW and b.device.type == "cpu" and tokens > _NARROW * _NARROW
    return b.mT.contiguous().mT if is_slow else b


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's layout, which autograd and optimizers expect."""
    return gradient if gradient.stride() == parameter.stride() else gradient.contiguous()
