"""Variants of LoRA whose factors are made of smaller ones: LoRA's own kernels run with what they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from peftfn.methods import lora
from peftfn.methods.action import OnWeights
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

Expand = Callable[[Any, Mapping[str, Tensor], WeightShape], Mapping[str, Tensor]]


def action(expand: Expand, kinds: Sequence[str]) -> OnWeights:
    """What LoRA does with the expanded leaf.

    Args:
        expand: `(config, leaf, shape of W) -> leaf of LoRA`, also where each tensor has an axis for rows before the
            others.
        kinds: the kinds of layer that it acts on.
    """
    run, merge = functools.partial(_run, expand), functools.partial(_merged, expand)
    return OnWeights(kinds, run, merge, ("weight",), takes_rows=lora.ACTION.takes_rows)


def _run(
    expand: Expand, config: Any, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    return lora.ACTION.forward(config, expand(config, leaf, layouts.of_site(site)), site, x, *args, **kwargs)


def _merged(
    expand: Expand, config: Any, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    return lora.ACTION.merge(config, expand(config, leaf, shape), shape, tensors)
