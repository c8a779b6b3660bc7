"""RoAd: pairs of a layer's outputs, each turned by an angle and scaled (https://arxiv.org/abs/2409.00119, equation 4).

In each group of `group_size` outputs the first half is paired with the second. Of a pair (z₁, z₂), z = W x + b,

    z₁' = z₁·α cos θ - z₂·α sin θ,    z₂' = z₂·α cos θ + z₁·α sin θ,

the bias too. `variant` says what share θ and α: a pair ("road_1"), nothing ("road_2", each output has its own), or
nothing and sine and cosine apart ("road_4"). The weight is not read, so any packed base will do.

PEFT has linear layers; transformers' `Conv1D` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import TargetedConfig
from peftfn.methods import builders, slots
from peftfn.methods.lora_config import described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

HALVES_OF = {"road_1": 1, "road_2": 2, "road_4": 4}
"""How many angles, and how many scales, a pair of outputs has in each variant."""


@dataclasses.dataclass(frozen=True)
class RoadConfig(TargetedConfig):
    """RoAd's config, with PEFT's fields and defaults: pairs of outputs, turned and scaled (https://arxiv.org/abs/2409.00119).

    PEFT's has no `exclude_modules`: where it is given, an adapter's `target_modules` are the paths that are left.

    Attributes:
        variant: how many angles θ and how many scales α a layer has: out / 2 of each (`"road_1"`, one for a pair of
            outputs), out (`"road_2"`), or 2·out (`"road_4"`).
        group_size: how many outputs a group has: output i of its first half is paired with i of its second. Even, and a
            divisor of a layer's outputs.
        init_weights: `True` (θ = 0, α = 1), or `False` (random ones: not the identity).

    Raises:
        ValueError: `variant` is unknown, or `group_size` no even number above 0.

    Example:
        >>> import peftfn as pf
        >>> config = pf.RoadConfig(variant="road_2", target_modules=["query", "value"])
        >>> config.group_size
        64
    """

    peft_type: ClassVar[str] = "ROAD"

    variant: str = dataclasses.field(
        default="road_1", metadata=described("road_1, road_2 or road_4: how many angles, and scales, two outputs have.")
    )
    group_size: int = dataclasses.field(
        default=64, metadata=described("Outputs in a group, whose halves are paired; divides a layer's outputs.")
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (no turn, no scaling), or False (random ones).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in HALVES_OF:
            raise ValueError(f"variant={self.variant!r}; expected one of {', '.join(HALVES_OF)}.")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"group_size={self.group_size!r}; expected an even number above 0.")


def _shape(config: RoadConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs // 2 * HALVES_OF[config.variant],)


SLOTS = {"road_theta": Slot(_shape, off=0.0), "road_alpha": Slot(_shape, off=1.0)}


def init(config: RoadConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Angles of 0 and scales of 1, or normal numbers around them."""
    weight = layouts.of_site(site)
    if weight.outputs % config.group_size:
        raise ValueError(
            f"{site.path}: group_size={config.group_size} does not divide its {weight.outputs} outputs. Choose "
            f"another, or exclude_modules=[{site.path!r}]."
        )
    angles, scales = slots.shapes(SLOTS, config, weight, 0).values()
    made = {"road_theta": torch.zeros(angles), "road_alpha": torch.ones(scales)}
    if not config.init_weights:
        made = {name: one + 0.5 * torch.randn(one.shape, generator=generator) for name, one in made.items()}
    return {name: like_weight(one, site.stored, dtype) for name, one in made.items()}


def _turned(config: RoadConfig, leaf: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """z (..., out), its last axis in pairs that are turned and scaled."""
    angles, scales = (leaf[name].view(-1, HALVES_OF[config.variant], config.group_size // 2) for name in SLOTS)
    if config.variant == "road_4":  # (groups, [cosine, sine] x halves, pairs)
        cosine, sine = scales[:, :2] * angles[:, :2].cos(), scales[:, 2:] * angles[:, 2:].sin()
    else:
        cosine, sine = scales * angles.cos(), scales * angles.sin()
    pairs = z.to(cosine.dtype).reshape(*z.shape[:-1], -1, 2, config.group_size // 2)
    first, second = pairs.unbind(-2)
    across = torch.stack([-second, first], -2)
    return (pairs * cosine + across * sine).reshape(z.shape)


def _weight(config: RoadConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    return _turned(config, leaf, weight.mT).mT


def _bias(config: RoadConfig, leaf: Mapping[str, Tensor], shape: WeightShape, bias: Tensor) -> Tensor:
    return _turned(config, leaf, bias)


def forward(config: RoadConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x), its last axis in pairs that are turned and scaled."""
    y = site(x, *args, **kwargs)
    return _turned(config, leaf, y).to(y.dtype)


METHOD = Method(
    config=RoadConfig,
    slots=SLOTS,
    init=init,
    action=builders.reweighted(_weight, bias=_bias, forward=forward, kinds=builders.MATRICES),
    targets=Targets(by_type(TARGETS, has_exclusions=False)),
    stacking=Stacking(varies=("init_weights",)),
)
