"""LN tuning: trained copies of the norms take the place of the base's (https://arxiv.org/abs/2312.11420).

What is trained are a norm's own weight and bias, which begin as the base's are. PEFT does it to any module that is
named, and so does this: a layer, or a module with all that is in it. The module runs as ever, on
the copies. Two adapters that replace one tensor are refused: nothing says what they would be together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import TargetedConfig
from peftfn.methods.action import OnWeights
from peftfn.methods.method import Method
from peftfn.methods.traits import Files, Targets, by_type
from peftfn.models import layers, targets
from peftfn.models.layers import Place, Site
from peftfn.models.layouts import WeightShape

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_BEFORE_AND_AFTER = (*_NORMS[:2], "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm")

TARGETS: dict[str, Sequence[str] | str] = {
    **dict.fromkeys(("llama", "mistral", "gemma"), _NORMS),
    **dict.fromkeys(("gemma2", "gemma3_text"), _BEFORE_AND_AFTER),
    **dict.fromkeys(("bloom", "falcon"), (*_NORMS[:2], "ln_f")),
    **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
    **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
    "llava": ("multi_modal_projector", *_NORMS, "embed_tokens", "lm_head"),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
    "phi": ("input_layernorm", "final_layernorm"),
}
"""PEFT's default modules, by `config.model_type` (as of PEFT 0.21)."""


@dataclasses.dataclass(frozen=True)
class LNTuningConfig(TargetedConfig):
    """LN tuning's config, with PEFT's fields and defaults: trained copies of norms (https://arxiv.org/abs/2312.11420).

    It has no fields of its own: `target_modules` names the norms, by default PEFT's for the model's type.

    Example:
        >>> import peftfn as pf
        >>> config = pf.LNTuningConfig(target_modules=["ln_1", "ln_2"])
        >>> config.target_modules
        ('ln_1', 'ln_2')
    """

    peft_type: ClassVar[str] = "LN_TUNING"


def sites(model: nn.Module, config: LNTuningConfig) -> dict[str, Place]:
    """The modules that the config names, and those inside them, that have tensors."""
    return targets.sites(model, config, layers.modules_with_tensors, "a module with tensors of its own or inside it")


def init(config: Any, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Nothing: what is trained are copies of the site's own tensors."""
    return {}


def forward(config: Any, leaf: Mapping[str, Tensor], site: Site, *args: Any, **kwargs: Any) -> Any:
    """What the module computes, of the tensors that are in their places already."""
    return site(*args, **kwargs)


def merge(
    config: Any, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Nothing more: the copies take the places of the base's tensors by themselves."""
    return {}


METHOD = Method(
    config=LNTuningConfig,
    slots={},
    init=init,
    action=OnWeights((layers.MODULE,), forward, merge, ()),
    targets=Targets(by_type(TARGETS), sites),
    files=Files(copies="ln_tuning_layers"),
)
