"""BEFT: a trained vector is added to what a layer puts out, W x + b + β (https://arxiv.org/abs/2509.15974).

By default it is added to the value projections alone. It can be merged into a layer that has a bias; where there is
none there is nothing to merge into. PEFT has it on linear layers; the other kinds are ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import TargetedConfig
from peftfn.methods import builders
from peftfn.methods.action import OnWeights
from peftfn.methods.lora_config import described
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets, by_type
from peftfn.models import layers, layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

_WITH_V_PROJ = ("opt", "gptj", "gpt_neo", "bart", "llama", "llama4", "mistral", "mixtral", "phi", "gemma", "gemma2")

TARGETS: dict[str, Sequence[str] | str] = {
    **dict.fromkeys((*_WITH_V_PROJ, "gemma3_text", "qwen2", "qwen3"), ("v_proj",)),
    **dict.fromkeys(("bert", "roberta"), ("value",)),
    **dict.fromkeys(("t5", "mt5"), ("v",)),
    "deberta-v2": ("value_proj",),
}
"""PEFT's default modules, by `config.model_type` (as of PEFT 0.21)."""


@dataclasses.dataclass(frozen=True)
class BeftConfig(TargetedConfig):
    """BEFT's config, with PEFT's fields and defaults: W x + b + β (https://arxiv.org/abs/2509.15974).

    Attributes:
        init_weights: β, (1, out): `True` (zeros), or `False` (normal numbers: not the identity).

    Example:
        >>> import peftfn as pf
        >>> config = pf.BeftConfig(target_modules=["value"])
        >>> config.init_weights
        True
    """

    peft_type: ClassVar[str] = "BEFT"

    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (zeros), or False (normal numbers, not the identity).")
    )


def _shape(config: BeftConfig, weight: WeightShape, r: int) -> Shape:
    return (1, weight.outputs)


SLOTS = {"beft_bias": Slot(_shape, off=0.0, outputs=1)}


def init(config: BeftConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Zeros, or normal numbers."""
    shape = _shape(config, layouts.of_site(site), 0)
    made = torch.zeros(shape) if config.init_weights else torch.randn(shape, generator=generator)
    return {"beft_bias": like_weight(made, site.stored, dtype)}


def forward(config: BeftConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x) + β."""
    y: Tensor = site(x, *args, **kwargs)
    kernel = site.shape[2:] if site.kind == layers.CONVOLUTION else ()
    return (y + leaf["beft_bias"].view(-1, *(1 for _ in kernel))).to(y.dtype)


def merge(
    config: BeftConfig, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """b + β, of a layer that has a bias."""
    if "bias" not in tensors:
        raise ValueError("BEFT adds to the bias, and the layer has none (or params was given without it)")
    return {"bias": (tensors["bias"] + leaf["beft_bias"].flatten()).to(tensors["bias"].dtype)}


METHOD = Method(
    config=BeftConfig,
    slots=SLOTS,
    init=init,
    action=OnWeights((*builders.MATRICES, layers.CONVOLUTION), forward, merge),
    targets=Targets(by_type(TARGETS)),
    stacking=Stacking(varies=("init_weights",)),
)
