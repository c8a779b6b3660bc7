"""Methods that add s·B·A: what makes one of them, and how its sites run.

Linear layers run as the Function of `linear_kernel` where only autograd is active, and so do convolutions as that of
`conv_kernel` where it takes less; under every other transform they are plain operations (`layer_deltas`), as other
layers always are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core import row_runs
from peftfn.core.row_runs import Runs
from peftfn.core.transforms import is_forward_mode, is_mapped, is_transforming
from peftfn.methods.action import OnWeights, one_by_one
from peftfn.methods.builders import LAYERS, MATRICES
from peftfn.methods.low_rank import conv_kernel, dropout, layer_deltas, linear_kernel
from peftfn.methods.low_rank.linear_kernel import Delta
from peftfn.models import layers, layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape
from peftfn.weights.codecs.packed_linear import Packed

_EVERYWHERE = (*LAYERS, layers.PARAMETER, layers.EXPERTS_TRANSPOSED)
_WHOLE = (layers.LINEAR, layers.CONVOLUTION)  # where the layer and its delta may be computed together


Factors = Callable[[Any, Mapping[str, Tensor], str, torch.Size], Delta]


def low_rank(
    factors: Factors,
    *,
    kinds: Sequence[str] = _EVERYWHERE,
    takes_rows: bool = False,
    takes_parts: bool = False,
) -> OnWeights:
    """A method that adds s·B·A, by kernels that never make it; `config.lora_dropout` acts on what A is given.

    Args:
        factors: `(config, leaf, kind, shape of a convolution's weight) -> (A, B, s)`, shaped as LoRA's.
        kinds: the kinds of layer that it acts on.
        takes_rows: whether linear layers take a leaf for each row.
        takes_parts: whether parts of fused projections can be adapted.
    """
    return OnWeights(
        kinds,
        functools.partial(_run_low_rank, factors),
        functools.partial(_merged_low_rank, factors),
        ("weight",),
        _is_whole_matrix if takes_rows else one_by_one,
        takes_parts,
        by_rows=True,
    )


def _run_low_rank(
    factors: Factors, config: Any, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    shape = site.shape if site.kind == layers.CONVOLUTION else torch.Size()
    delta = factors(config, leaf, site.kind, shape)
    if not delta.a.numel():  # no rank is left, and torch has no convolution with no channels
        return site(x, *args, **kwargs)
    if site.rows is None:
        return forward(site, delta, config.lora_dropout, x, *args, **kwargs)
    rows, y = row_runs.numbers(site.rows, x.device), site(x, *args, **kwargs)
    return y.index_copy(-1, rows, add(site, delta, config.lora_dropout, x, y.index_select(-1, rows)))


def _merged_low_rank(
    factors: Factors, config: Any, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    weight, kind = tensors["weight"], shape.kind
    a, b, scaling = factors(config, leaf, kind, weight.shape)
    if shape.rows is None:
        return {"weight": layer_deltas.merged(kind, a, b, scaling, weight)}
    axis, rows = layouts.output_axis(kind), row_runs.numbers(shape.rows, weight.device)
    part = layer_deltas.merged(kind, a, b, scaling, weight.index_select(axis, rows))
    return {"weight": weight.index_copy(axis, rows, part)}


def _is_whole_matrix(kind: str, rows: Runs | None) -> bool:
    return kind in MATRICES and rows is None


def forward(site: Site, delta: Delta, p: float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x) + s·B·A·drop(x), in the dtype of site(x); p is the probability of dropout in training."""
    own = site.product(x) if site.kind in _WHOLE and _only_autograd_is_active(x, delta) else None
    if own is None:
        return add(site, delta, p, x, site(x, *args, **kwargs))
    weight, bias = own
    if site.kind == layers.CONVOLUTION:
        if isinstance(weight, Packed) or not is_cheaper_as_one(site, delta, p, x, weight):
            return add(site, delta, p, x, site(x, *args, **kwargs))
        layer = cast("Any", site.layer)
        if _trains(x, weight, delta):
            return conv_kernel.convolution(layer, x, weight, bias, delta)
        return layer._conv_forward(x, conv_kernel.kernel(weight, delta), bias)  # noqa: SLF001  # all that torch's forward does
    seen, delta, bits = _drawn(site, delta, p, x)
    if (isinstance(weight, Tensor) and is_mapped(weight)) or (bits is not None and is_mapped(bits)):
        return _plain(site, delta, seen, site(x), bits)
    return linear_kernel.linear(x, weight, bias, delta, bits)


def is_cheaper_as_one(site: Site, delta: Delta, p: float, x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution with a delta can and should run with one kernel (`conv_kernel.is_cheaper`)."""
    layer, trains = cast("Any", site.layer), _trains(x, weight, delta)
    if not conv_kernel.is_cheaper(x, weight, layer.stride, trains) or (p and layer.training):
        return False
    if trains and (isinstance(layer.padding, str) or x.dim() != weight.dim()):
        return False
    if is_mapped(weight) or not x.dtype == weight.dtype == delta.a.dtype:
        return False
    return delta.a.dim() == delta.b.dim() and delta.a.shape[1:] == weight.shape[1:]


def _trains(x: Tensor, weight: Tensor, delta: Delta) -> bool:
    """Whether any of the tensors requires a gradient."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, *delta))


def add(site: Site, delta: Delta, p: float, x: Tensor, y: Tensor) -> Tensor:
    """y + s·B·A·drop(x), in the dtype of y."""
    seen, delta, bits = _drawn(site, delta, p, x)
    alone = site.kind in MATRICES and _only_autograd_is_active(x, delta)
    if alone and not is_mapped(y) and (bits is None or not is_mapped(bits)):
        return linear_kernel.add(x, y, delta, bits)
    return _plain(site, delta, seen, y, bits)


def _drawn(site: Site, delta: Delta, p: float, x: Tensor) -> tuple[Tensor, Delta, Tensor | None]:
    """x after dropout, or x and the bits of a mask that is still to be applied; and the delta, scaled for it."""
    if _is_routed(site, delta):
        delta = Delta(delta.a, delta.b, delta.s.view(-1, 1, 1))
    if not p or not site.training or not (x.is_floating_point() or x.is_complex()):
        return x, delta, None
    if x.is_complex():
        return x * F.dropout(torch.ones_like(x.real), p, training=True), delta, None
    if torch.compiler.is_compiling():  # the compiler fuses torch's own dropout, and chooses what to keep
        return F.dropout(x.to(delta.a.dtype), p, training=True), delta, None
    tokens = x.numel() // max(x.shape[-1], 1)
    kept = dropout.draw(tokens, x.shape[-1], p, x.device)
    return x, delta._replace(s=delta.s * kept.scale), kept.bits


def _plain(site: Site, delta: Delta, x: Tensor, y: Tensor, bits: Tensor | None) -> Tensor:
    a, b, s = delta
    if x.is_complex() or a.is_complex():
        a, b, x = _as_complex(site, a, b, x, y)
    if x.is_floating_point() and (bits is not None or site.kind not in MATRICES):
        x = x.to(a.dtype)  # the product of a linear layer takes any dtype (`mixed_precision.linear`)
    if bits is not None:
        x = x * dropout.mask(bits, x.shape).to(x.dtype)
    return layer_deltas.TABLE[site.kind].add(site, a, b, s, x, y).to(y.dtype)


def _as_complex(site: Site, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and x in the one dtype that holds them; ids of a table stay ids."""
    if not y.is_complex():
        raise ValueError(
            f"{site.path}: the adapter's tensors are {a.dtype} and the layer computes in {y.dtype}, which has no "
            "imaginary part; give the adapter real tensors (pf.init(..., dtype=torch.float32))."
        )
    dtype = torch.promote_types(a.dtype, x.dtype) if x.is_complex() else a.dtype
    return a.to(dtype), b.to(dtype), x.to(dtype) if x.is_complex() or x.is_floating_point() else x


def _is_routed(site: Site, delta: Delta) -> bool:
    """Whether the delta of a linear layer has an axis for the rows of x."""
    return site.kind in MATRICES and delta.a.dim() > 2


def _only_autograd_is_active(x: Tensor, delta: Delta) -> bool:
    """Whether no compilation, autocast, forward mode or `vmap` over these tensors is active; for x (..., in), real."""
    return (
        not torch.compiler.is_compiling()
        and x.dim() > 1
        and not (x.is_complex() or delta.a.is_complex())
        and not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
        and not is_forward_mode()
        and (not is_transforming() or not any(map(is_mapped, (x, *delta))))
    )
