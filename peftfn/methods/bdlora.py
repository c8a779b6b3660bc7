"""BD-LoRA: LoRA one of whose factors is block-diagonal, for bases whose layers are cut over devices.

A block-diagonal A, blkdiag(A₁ ··· A_n) with A_b (r/n, in/n), is for layers that are cut along their inputs, a B of that
form for those that are cut along their outputs: each device then has its blocks of both factors, and one sum fewer is
sent (https://arxiv.org/abs/2510.23346). The blocks are in files one below the other, (r, in/n) or (out, r/n).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods import builders, lora
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.low_rank import expanded
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


def _blocks(config: LoraConfig) -> int:
    return cast("Mapping[str, Any]", config.use_bdlora)["nblocks"]


def _blocked_a(config: LoraConfig, weight: WeightShape, r: int) -> Shape:
    return (r, weight.inputs // _blocks(config))


def _blocked_b(config: LoraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs, r // _blocks(config))


SLOTS = {
    **lora.SLOTS,
    "lora_A": lora.SLOTS["lora_A"]._replace(also=_blocked_a),
    "lora_B": lora.SLOTS["lora_B"]._replace(also=_blocked_b),
}


def factor(config: LoraConfig, path: str) -> str:
    """The factor that is block-diagonal at a site, or nothing: a pattern is found in the name of the layer itself.

    Raises:
        ValueError: patterns for both factors are found there, or none and `match_strict` asks for one.
    """
    given, name = cast("Mapping[str, Any]", config.use_bdlora), path.rpartition(".")[2]
    found = [one for one in "ab" if any(part in name for part in given[f"target_modules_bd_{one}"] or ())]
    if len(found) == 2:
        raise ValueError(f"{path}: use_bdlora has patterns for A and for B that are found in {name!r}; expected one.")
    if not found and given["match_strict"]:
        raise ValueError(
            f"{path}: no pattern of use_bdlora is found in {name!r}. Name the layer there, exclude_modules=[{path!r}], "
            "or set match_strict=False for a plain LoRA on it."
        )
    return f"lora_{found[0].upper()}" if found else ""


def init(config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A and B as LoRA's; blocks of A within √(6 / (in/n)), blocks of B zero, as PEFT draws them."""
    leaf, shape, r = lora.init(config, path, site, generator, dtype), layouts.of_site(site), matching.rank(config, path)
    name, count = factor(config, site.path), _blocks(config)
    cut = shape.inputs if name == "lora_A" else shape.outputs
    if name and (r % count or cut % count):
        raise ValueError(
            f"{site.path}: nblocks={count} does not divide r={r} and the {cut} numbers along which {name} is cut. "
            "Choose another number of blocks or rank."
        )
    if name == "lora_A":
        bound = math.sqrt(6 * count / shape.inputs)
        drawn = bound * (2 * torch.rand(_blocked_a(config, shape, r), generator=generator) - 1)
        return {**leaf, name: like_weight(drawn, site.stored, dtype)}
    if name == "lora_B":
        return {**leaf, name: like_weight(torch.zeros(_blocked_b(config, shape, r)), site.stored, dtype)}
    return leaf


def expand(config: LoraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> dict[str, Tensor]:
    """LoRA's leaf, with both factors whole."""
    a, b, count = leaf["lora_A"], leaf["lora_B"], _blocks(config)
    if a.shape[-1] != weight.inputs:
        a = _diagonal(a, count)
    if b.shape[-1] != a.shape[-2]:
        b = _diagonal(b, count)
    return {**leaf, "lora_A": a, "lora_B": b}


def _diagonal(blocks: Tensor, count: int) -> Tensor:
    """(..., n·p, n·q) with the blocks (..., n·p, q) on its diagonal."""
    parts = cast("Tensor", blocks.unflatten(-2, (count, -1))).unsqueeze(-2)  # (..., n, p, 1, q)
    places = torch.eye(count, dtype=blocks.dtype, device=blocks.device).view(count, 1, count, 1)
    return (parts * places).flatten(-4, -3).flatten(-2, -1)


def _resized(leaf: Leaf, old: int, new: int) -> Leaf:
    if old != new:
        raise ValueError(f"stack: adapters with use_bdlora of ranks {old} and {new}; blocks have to be of one size.")
    return leaf


METHOD: Method = dataclasses.replace(
    lora.METHOD,
    slots=SLOTS,
    init=init,
    action=expanded.action(expand, builders.MATRICES),
    stacking=lora.METHOD.stacking._replace(resize=_resized),
    combining=None,
    variant="use_bdlora",
)
