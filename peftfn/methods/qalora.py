"""QA-LoRA: LoRA on what groups of inputs have in common (https://arxiv.org/abs/2309.14717).

A, (r, in/g), is given the mean of each group of g inputs, times in/g as PEFT has it. What is added is then alike for
the weights of a group, as the zero points of a quantized weight are. In PEFT it is for layers of GPTQ; on any other a
config that asks for it makes a plain LoRA, without a word, and its files are read as one here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods import lora
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.low_rank import expanded
from peftfn.methods.method import Method
from peftfn.methods.slots import Shape
from peftfn.models import layers, layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape
from peftfn.weights.codecs import gptq


def _pooled_a(config: LoraConfig, weight: WeightShape, r: int) -> Shape:
    return (r, weight.inputs // config.qalora_group_size)


SLOTS = {**lora.SLOTS, "lora_A": lora.SLOTS["lora_A"]._replace(also=_pooled_a, inputs=None)}


def init(config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A, (r, in/g), and B, as LoRA's of a layer with in/g inputs."""
    inputs, size = layouts.of_site(site).inputs, config.qalora_group_size
    if not gptq.matches(site.layer):
        raise ValueError(
            f"{site.path}: use_qalora=True is for layers of GPTQ, and this is a {type(site.layer).__name__}, where "
            f"PEFT makes a plain LoRA of it. Set use_qalora=False, or exclude_modules=[{site.path!r}]."
        )
    if inputs % size:
        raise ValueError(
            f"{site.path}: qalora_group_size={size} does not divide its {inputs} inputs; choose another one, or "
            f"exclude_modules=[{site.path!r}]."
        )
    leaf = lora.init(config, path, site, generator, dtype)
    # Numbers within 1/√in for LoRA: with g times fewer inputs they are within √g as much.
    scale = 1.0 if config.init_lora_weights == "gaussian" else size**0.5
    return {**leaf, "lora_A": leaf["lora_A"][:, : inputs // size].mul(scale).contiguous()}


def expand(config: LoraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> dict[str, Tensor]:
    """LoRA's leaf, whose A has the same numbers for each input of a group."""
    a, size = leaf["lora_A"], config.qalora_group_size
    if a.shape[-1] == weight.inputs:  # a file of PEFT's that was trained as a plain LoRA
        return dict(leaf)
    groups = a.shape[-1]
    spread = a.unsqueeze(-1).expand(*a.shape, size).flatten(-2)  # (..., r, in)
    return {**leaf, "lora_A": spread * (groups / size)}


METHOD: Method = dataclasses.replace(
    lora.METHOD,
    slots=SLOTS,
    init=init,
    action=expanded.action(expand, (layers.LINEAR,)),
    stacking=lora.METHOD.stacking,
    combining=None,
    variant="use_qalora",
)
