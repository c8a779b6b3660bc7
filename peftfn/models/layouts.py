"""How each kind of layer stores its weight, and the one way in which methods see all of them: (out, in, *kernel)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peftfn.core import row_runs
from peftfn.core.adapter import SiteInfo
from peftfn.core.row_runs import Runs
from peftfn.models import layers
from peftfn.models.layers import Site

_TURNED = frozenset({layers.TRANSPOSED, layers.EMBEDDING, layers.EXPERTS_TRANSPOSED})
"""Kinds whose weight has its inputs before its outputs."""


class WeightShape(NamedTuple):
    """The shape of a weight, in a method's words.

    Attributes:
        kind: the kind of layer, one of those in `peftfn.models.layers`.
        outputs: how many numbers come out; of an embedding, of one token.
        inputs: how many go in, of one group of a convolution; of an embedding, how many tokens it knows.
        kernel: what a convolution has beside them, () elsewhere.
        groups: of a convolution; 1 elsewhere.
        experts: how many such weights one tensor holds; 1 but for a mixture of experts.
        rows: those of its outputs, where a method acts on a part of a fused projection; `outputs` counts them alone.
        input_side: whether the method acts on what goes in there, where it could act on either side.
        has_bias: whether the layer has a bias beside the weight.
    """

    kind: str
    outputs: int
    inputs: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 1
    rows: Runs | None = None
    input_side: bool = False
    has_bias: bool = True

    @property
    def fan_in(self) -> int:
        """How many numbers each output is a sum over."""
        return self.inputs * math.prod(self.kernel)


def seen(kind: str, weight: Tensor) -> Tensor:
    """A layer's weight as methods see it: (out, in, *kernel), or (experts, out, in)."""
    return weight.mT if kind in _TURNED else weight


def stored(kind: str, weight: Tensor) -> Tensor:
    """The inverse of `seen`: a transposition, or nothing, either of which is its own inverse."""
    return seen(kind, weight)


def output_axis(kind: str) -> int:
    """The axis of the outputs in a weight as the layer stores it, a matrix or a convolution's."""
    return 1 if kind in _TURNED else 0


def of_site(site: Site) -> WeightShape:
    """The shape of a site's weight; of a part of a fused projection, of its own rows."""
    found = of_stored(site.kind, site.shape, int(getattr(site.layer, "groups", 1)))
    assert found is not None, f"{site.path}: a {site.kind} has no weight of shape {tuple(site.shape)}"
    return acted_on(found, site.rows, site.input_side)._replace(has_bias=site.bias is not None)


def acted_on(weight: WeightShape, rows: Runs | None, input_side: bool) -> WeightShape:
    """The shape of that part of a weight that a method acts on: these rows, on this side."""
    outputs = weight.outputs if rows is None else row_runs.count(rows)
    return weight._replace(outputs=outputs, rows=rows, input_side=input_side)


def of_stored(kind: str, shape: torch.Size, groups: int = 1) -> WeightShape | None:
    """The shape of a weight that a layer of this kind stores in `shape`; `None` where no layer of the kind does."""
    if kind == layers.CONVOLUTION:
        return WeightShape(kind, shape[0], shape[1], tuple(shape[2:]), groups) if len(shape) > 2 else None
    most = 3 if kind in layers.WEIGHT_KINDS else 2
    if not 2 <= len(shape) <= most or (kind == layers.EXPERTS_TRANSPOSED and len(shape) < most):
        return None
    outputs, inputs = shape[-2:][:: -1 if kind in _TURNED else 1]
    return WeightShape(kind, outputs, inputs, experts=shape[0] if len(shape) > 2 else 1)


def of_tensor(kind: str, weight: Tensor, info: SiteInfo) -> WeightShape:
    """The shape of a weight, with what an adapter knows of it; a convolution's groups are not known here."""
    found = of_stored(kind, weight.shape)
    assert found is not None, f"a {kind} has no weight of shape {tuple(weight.shape)}"
    return acted_on(found, info.rows, info.input_side)


def possible(kind: str, shape: torch.Size) -> Iterator[WeightShape]:
    """Every such shape: it does not tell of a bias, nor a convolution's of its groups, which divide its outputs."""
    first = of_stored(kind, shape)
    if first is not None:
        yield first
        yield first._replace(has_bias=False)
        if kind == layers.CONVOLUTION:
            yield from (first._replace(groups=g) for g in range(2, first.outputs + 1) if first.outputs % g == 0)
