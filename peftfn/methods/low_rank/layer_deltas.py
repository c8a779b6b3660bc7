"""The low-rank delta of each kind of layer: what `s·B·A` means for a linear layer, a table, a kernel, experts.

Letters as in the LoRA paper (https://arxiv.org/abs/2106.09685, section 4.1): h = W0·x + s·B·A·x. Every kind is a
tuple of functions of (A, B); scaling and dtype are the caller's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core import row_blocks
from peftfn.core.transforms import is_traced
from peftfn.methods.low_rank import mixed_precision
from peftfn.methods.low_rank.matmul import added, scaled
from peftfn.models import layers
from peftfn.models.layers import Site
from peftfn.weights import codecs


class LowRank(NamedTuple):
    """One kind of layer.

    Attributes:
        add: `(site, A, B, scaling, x, y) -> y + scaling * (B A x)`.
        delta: `(A, B, weight shape) -> B A`, in the weight's own layout.
    """

    add: Callable[[Site, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    delta: Callable[[Tensor, Tensor, torch.Size], Tensor]


def merged(kind: str, a: Tensor, b: Tensor, scaling: Tensor, weight: Tensor) -> Tensor:
    """W + s·B·A, in the dtype of W."""
    if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
        # Half-precision products are slow on CPU, and rounded once more: as PEFT, compute in float32.
        a, b = a.float(), b.float()
    with _without_autocast(weight.device.type):  # a weight is not rounded to what products run in
        if kind in _BY_ROWS and _only_values(a, b, scaling, weight):
            return _merged_by_blocks(kind, a, b, scaling, weight)
        delta = TABLE[kind].delta(a, b, weight.shape)
    return (weight + scaled(delta, scaling)).to(weight.dtype)


# The factors that make some rows of the weight's delta.
_BY_ROWS: dict[str, Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]] = {
    layers.LINEAR: lambda a, b, rows: (a, b[rows]),
    layers.TRANSPOSED: lambda a, b, rows: (a[:, rows], b),
    layers.EMBEDDING: lambda a, b, rows: (a[:, rows], b),
}


def _only_values(a: Tensor, b: Tensor, scaling: Tensor, weight: Tensor) -> bool:
    """Whether the result needs no gradient, no transform and no trace, on CPU."""
    tensors = (a, b, scaling, weight)
    if is_traced(*tensors):
        return False
    if not all(type(one) in (Tensor, nn.Parameter) and one.device.type == "cpu" for one in tensors):
        return False
    return not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))


def _merged_by_blocks(kind: str, a: Tensor, b: Tensor, scaling: Tensor, weight: Tensor) -> Tensor:
    """`merged`, a block of rows at a time, so that the delta is never held whole and stays in the cache."""
    made = torch.empty_like(weight, requires_grad=False)
    for rows in row_blocks.blocks(weight.shape[0], weight.shape[1]):
        old = weight.detach()[rows]
        delta = TABLE[kind].delta(*_BY_ROWS[kind](a, b, rows), old.shape)
        if delta.dtype == scaling.dtype == torch.promote_types(delta.dtype, old.dtype):
            made[rows] = delta.mul_(scaling).add_(old)  # in place, in memory that the next block reuses
        else:
            made[rows] = old + scaled(delta, scaling)
    return made


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device)  # the meta device is not
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


# --- linear layers: W is (out, in), or (in, out) in transformers' Conv1D ---------------------------------------------


def _linear_add(site: Site, a: Tensor, b: Tensor, scaling: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if a.dim() > 2:
        return _linear_add_rows(a, b, scaling, x.to(a.dtype), y)
    h = scaled(mixed_precision.linear(x, a), scaling)  # (..., r), scaled while it is narrow
    if y.dtype == h.dtype and y.dim() > 1:
        # One pass over y in place of two: see benchmarks/training_step.py.
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.T).view(y.shape)
    return y + F.linear(h, b)


def _linear_add_rows(a: Tensor, b: Tensor, scaling: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The same with A (rows, r, in), B (rows, out, r) and s (rows, 1, 1) of each row's own."""
    rows = a.shape[0]
    h = scaled(torch.bmm(x.view(rows, -1, x.shape[-1]), a.mT), scaling)  # (rows, tokens, r)
    return added(y.view(rows, -1, y.shape[-1]), h, b.mT).view(y.shape)


def _linear_delta(a: Tensor, b: Tensor, weight: torch.Size) -> Tensor:
    return b @ a


def _transposed_delta(a: Tensor, b: Tensor, weight: torch.Size) -> Tensor:
    return (b @ a).T


# --- embeddings: W is (rows, dim), A is (r, rows), B is (dim, r) -----------------------------------------------------


def _embedding_add(site: Site, a: Tensor, b: Tensor, scaling: Tensor, x: Tensor, y: Tensor) -> Tensor:
    layer = site.layer
    # padding_idx and scale_grad_by_freq act on gradients alone: A's rows get the treatment of W's.
    h = F.embedding(
        x,
        a.T,
        padding_idx=getattr(layer, "padding_idx", None),
        scale_grad_by_freq=bool(getattr(layer, "scale_grad_by_freq", False)),
    )  # (..., r)
    delta = F.linear(scaled(h, scaling), b)
    scale = codecs.lookup_scale(layer)
    return y + (delta if scale is None else delta * scale)


def _embedding_delta(a: Tensor, b: Tensor, weight: torch.Size) -> Tensor:
    return (b @ a).T


# --- convolutions: W is (out, in/g, *k), A is (r, in, *k) with the layer's stride, or (g, r/g, in/g, *k) with groups,
# and B is (out, r/g, 1...)

_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _convolution_add(site: Site, a: Tensor, b: Tensor, scaling: Tensor, x: Tensor, y: Tensor) -> Tensor:
    layer = site.layer
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    groups = layer.groups if a.dim() > b.dim() else 1
    kernel = a.flatten(0, 1) if a.dim() > b.dim() else a  # (r, in/g, *k)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        around = layer._reversed_padding_repeated_twice  # noqa: SLF001  # torch has no public name for it
        x, padding = F.pad(x, around, mode=layer.padding_mode), 0
    convolve = _CONVOLVE[b.dim()]
    h = convolve(x, kernel, None, layer.stride, padding, layer.dilation, groups)
    return y + convolve(scaled(h, scaling), b, groups=kernel.shape[0] // b.shape[1])


def _convolution_delta(a: Tensor, b: Tensor, weight: torch.Size) -> Tensor:
    if a.dim() == b.dim() and a.shape[1] != weight[1]:
        raise ValueError(
            f"the convolution has {a.shape[1] // weight[1]} groups and its lora_A of shape {tuple(a.shape)} reads all "
            f"channels, as peft makes it; no weight of shape {tuple(weight)} computes the same. Keep it unmerged, or "
            "train it with peftfn, whose lora_A follows the groups."
        )
    groups = a.shape[0] if a.dim() > b.dim() else 1
    left = b.reshape(groups, weight[0] // groups, b.shape[1])  # (g, out/g, r/g)
    right = a.reshape(groups, b.shape[1], weight[1:].numel())  # (g, r/g, in/g * k)
    return (left @ right).reshape(weight)


# --- bare parameters: (out, in), or experts (E, out, in) / (E, in, out); A is (E*r, in), B is (out, E*r) -------------


def _no_add(site: Site, a: Tensor, b: Tensor, scaling: Tensor, x: Tensor, y: Tensor) -> Tensor:
    raise AssertionError(f"{site.path}: a bare parameter has no forward of its own; its tensor is replaced")


def _parameter_delta(a: Tensor, b: Tensor, weight: torch.Size) -> Tensor:
    if len(weight) == 2:
        return b @ a
    experts = weight[0]
    left = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r): the expert is B's fastest axis in PEFT
    return left @ a.reshape(experts, -1, a.shape[1])  # (E, out, in)


def _transposed_experts_delta(a: Tensor, b: Tensor, weight: torch.Size) -> Tensor:
    standard = torch.Size((weight[0], weight[2], weight[1]))
    return _parameter_delta(a, b, standard).transpose(1, 2)


TABLE: dict[str, LowRank] = {
    layers.LINEAR: LowRank(_linear_add, _linear_delta),
    layers.TRANSPOSED: LowRank(_linear_add, _transposed_delta),
    layers.EMBEDDING: LowRank(_embedding_add, _embedding_delta),
    layers.CONVOLUTION: LowRank(_convolution_add, _convolution_delta),
    layers.PARAMETER: LowRank(_no_add, _parameter_delta),
    layers.EXPERTS_TRANSPOSED: LowRank(_no_add, _transposed_experts_delta),
}
