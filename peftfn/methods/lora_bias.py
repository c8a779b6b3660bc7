"""LoRA whose second factor has a bias, `lora_bias`: W x + b + s·(B·A·x + c), with c trained.

It has no paper of its own: it is for what is taken out of a trained layer, whose bias changed too. The bias can be
merged into a layer that has one. PEFT has it on linear layers and convolutions; experts and embeddings are refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.core import row_runs
from peftfn.core.adapter import Leaf
from peftfn.methods import builders, lora
from peftfn.methods.action import OnWeights
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.method import like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files
from peftfn.models import layers, layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

BIAS = "lora_bias"


def _outputs(config: LoraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs,)


SLOTS = {**lora.SLOTS, BIAS: Slot(_outputs, "lora_B.bias", outputs=0)}
_LORA = lora.ACTION


def init(config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A and B as LoRA's, and a bias of zeros, or uniform as torch's where the start is not the identity."""
    leaf, outputs = lora.init(config, path, site, generator, dtype), layouts.of_site(site).outputs
    bias = torch.zeros(outputs)
    if not config.init_lora_weights:
        bias = (2 * torch.rand(outputs, generator=generator) - 1) / math.sqrt(matching.rank(config, path))
    return {**leaf, BIAS: like_weight(bias, site.stored, dtype)}


def forward(config: LoraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes with LoRA, plus s·c."""
    y: Tensor = _LORA.forward(config, _without(leaf), site, x, *args, **kwargs)
    bias = leaf["scaling"].unsqueeze(-1) * leaf[BIAS]  # (out,), or of each row (rows, out)
    if site.kind == layers.CONVOLUTION:
        return (y + bias.view(-1, *(1 for _ in site.shape[2:]))).to(y.dtype)
    if site.rows is not None:
        numbers = row_runs.numbers(site.rows, y.device)
        return y.index_copy(-1, numbers, (y.index_select(-1, numbers) + bias).to(y.dtype))
    if bias.dim() == 1:
        return (y + bias).to(y.dtype)
    grouped = y.reshape(bias.shape[0], -1, y.shape[-1])
    return (grouped + bias.unsqueeze(1)).to(y.dtype).view(y.shape)


def _without(leaf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf[name] for name in leaf if name != BIAS}


def merge(
    config: LoraConfig, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """W + s·B·A and b + s·c, of a layer that has a bias."""
    if "bias" not in tensors:
        raise ValueError("lora_bias adds to the bias, and the layer has none (or params was given without it)")
    old, added = tensors["bias"], leaf["scaling"] * leaf[BIAS]
    if shape.rows is not None:
        added = added.new_zeros(old.shape).index_copy(0, row_runs.numbers(shape.rows, old.device), added)
    weight = _LORA.merge(config, _without(leaf), shape, {"weight": tensors["weight"]})
    return {**weight, "bias": (old + added).to(old.dtype)}


def check_file(config: LoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without a bias, and what LoRA refuses."""
    if BIAS not in leaf:
        raise KeyError(f"{sorted(leaf)}, but no lora_B.bias (lora_bias)")
    lora.check_file(config, path, _without(leaf))


METHOD = dataclasses.replace(
    lora.METHOD,
    slots=SLOTS,
    init=init,
    action=OnWeights(
        (*builders.MATRICES, layers.CONVOLUTION), forward, merge, takes_rows=_LORA.takes_rows, takes_parts=True
    ),
    files=Files(check_file, write=lora.METHOD.files.write, read=lora.METHOD.files.read),
    combining=None,
    variant="lora_bias",
)
