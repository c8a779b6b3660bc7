"""What LoHa and LoKr have in common (LyCORIS, https://arxiv.org/abs/2309.14859): config, scaling, start, dropout."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders
from peftfn.methods.action import OnWeights
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import constant
from peftfn.methods.slots import Shape
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

VARIES = ("r", "alpha", "rank_pattern", "alpha_pattern", "init_weights")
"""The fields in which adapters of a stack may differ."""


@dataclasses.dataclass(frozen=True)
class LycorisConfig(LayeredConfig):
    """The fields that PEFT's configs of LoHa and LoKr share.

    Attributes:
        r: the rank of a factor that is a product.
        alpha: the scaling is alpha / r.
        rank_dropout: the probability in training that a row of the update (an output of the layer) is dropped.
        module_dropout: the probability in training that a layer goes without its update.
        rank_pattern: other ranks, by module name or regex; the first one that matches a path counts.
        alpha_pattern: other alphas, in the same way.

    Raises:
        ValueError: a rank is no positive integer, or a dropout no probability below 1.

    Example:
        >>> import peftfn as pf
        >>> pf.LoKrConfig(r=4, rank_pattern={"layer.0.query": 2}).alpha
        8
    """

    r: int = dataclasses.field(default=8, metadata=described("Rank of a factor that is a product."))
    alpha: float = dataclasses.field(default=8, metadata=described("Scaling is alpha / r."))
    rank_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Probability in training that a row of the update is dropped.")
    )
    module_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Probability in training that a layer goes without its update.")
    )
    rank_pattern: Mapping[str, int] | None = dataclasses.field(
        default_factory=dict[str, int], metadata=described("Other ranks, by module name or regex.")
    )
    alpha_pattern: Mapping[str, float] | None = dataclasses.field(
        default_factory=dict[str, float], metadata=described("Other alphas, by module name or regex.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            check_positive("r", rank)
        for field in ("rank_dropout", "module_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)!r}; expected a probability of at least 0 and below 1.")


def constants(config: LycorisConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling of one site, a 0-d tensor."""
    alpha = matching.pattern_value(config.alpha_pattern, path, config.alpha)
    return {"scaling": constant(alpha / matching.rank(config, path), leaf)}


def drawn(shape: Shape, generator: torch.Generator) -> Tensor:
    """Numbers as torch's own layers begin with: uniform within 1/√(all but the first axis)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(math.prod(shape[1:]))


def tucker_kernel(weight: WeightShape) -> tuple[int, ...]:
    """The kernel as PEFT holds it in a Tucker form: one of one axis has an axis of 1 behind it."""
    return weight.kernel if len(weight.kernel) > 1 else (*weight.kernel, 1)


def additive(delta: builders.Delta) -> OnWeights:
    """A method that adds a delta to a weight, `(config, leaf, shape of W) -> ΔW`, with dropout of its rows or whole."""
    return builders.additive(delta, forward=functools.partial(_run, delta))


def _run(
    delta: builders.Delta, config: Any, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    y, change = site(x, *args, **kwargs), delta(config, leaf, layouts.of_site(site))
    return builders.added(site, y, _dropped(config, change) if site.training else change, x, *args, **kwargs)


def _dropped(config: LycorisConfig, change: Tensor) -> Tensor:
    """The delta without some of its rows, or without any."""
    if config.rank_dropout:
        rescales = getattr(config, "rank_dropout_scale", True)  # LoKr may be told not to; LoHa always does, as in PEFT
        rows = change.shape[0]
        share = (torch.rand(rows, device=change.device, dtype=change.dtype) > config.rank_dropout).to(change.dtype)
        # All rows may be gone: then there is nothing to make up for, and no mean to divide by.
        share = share / share.mean().clamp(min=1 / rows) if rescales else share
        change = change * share.view(-1, *(1 for _ in change.shape[1:]))
    if config.module_dropout:
        change = change * (torch.rand((), device=change.device) > config.module_dropout).to(change.dtype)
    return change
