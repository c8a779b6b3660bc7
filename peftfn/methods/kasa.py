"""KaSA: the smallest singular parts of a weight make room for trained ones (https://arxiv.org/abs/2412.06071).

W' = W - U₀·V₀ + s·B·diag(d)·A, where U₀·V₀ are W's r smallest singular parts. PEFT takes them out of the base for good;
here the base stays, and what they make of x is taken off. So a fresh adapter is not the identity: it is W without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods import builders, lora
from peftfn.methods.action import OnWeights
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

DIAGONAL, U, V = "lora_diag", "kasa_U", "kasa_V"


def _numbers(config: LoraConfig, weight: WeightShape, r: int) -> Shape:
    return (r,)


SLOTS = {
    **{name: lora.SLOTS[name] for name in ("lora_A", "lora_B", "scaling")},
    DIAGONAL: Slot(_numbers, rank=0),
    U: Slot(trained=False, rank=1, off=0.0),
    V: Slot(trained=False, rank=0),
}


def init(config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A and B as LoRA's, d at random, and the parts that are taken off."""
    leaf = lora.init(config, path, site, generator, dtype)
    drawn = torch.randn(matching.rank(config, path), generator=generator)
    return {**leaf, DIAGONAL: like_weight(drawn, site.stored, dtype), **derived(config, path, leaf, site)}


def derived(config: LoraConfig, path: str, leaf: Leaf, site: Site | None) -> Leaf:
    """The smallest singular parts of the base's weight: (out, r) with their sizes, and (r, in)."""
    if site is None:
        raise builders.needs_base("LoraConfig(kasa_config)")
    shape, r = layouts.of_site(site), matching.rank(config, path)
    most = min(shape.outputs, shape.inputs)
    if r >= most:
        raise ValueError(
            f"{site.path}: KaSA takes r={r} of the weight's {most} singular parts off, and has to leave one. Choose "
            f"another r for it in rank_pattern, or exclude_modules=[{site.path!r}]."
        )
    weight = builders.in_float32(site, "KaSA takes parts of the weight off")
    u, s, vh = cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(weight, full_matrices=False))
    parts = {U: u[:, most - r :] * s[most - r :], V: vh[most - r :]}
    return {name: like_weight(one.contiguous(), site.stored, None) for name, one in parts.items()}


def _lora(leaf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA's leaf, with d in B."""
    own = {name: leaf[name] for name in ("lora_A", "lora_B", "scaling")}
    return {**own, "lora_B": leaf["lora_B"] * leaf[DIAGONAL]}


def forward(config: LoraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes with LoRA, less what its smallest parts make of x."""
    y: Tensor = lora.ACTION.forward(config, _lora(leaf), site, x, *args, **kwargs)
    off = F.linear(F.linear(x.to(leaf[V].dtype), leaf[V]), leaf[U])
    return (y - off).to(y.dtype)


def merge(
    config: LoraConfig, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """W - U₀·V₀ + s·B·diag(d)·A."""
    merged = lora.ACTION.merge(config, _lora(leaf), shape, {"weight": tensors["weight"]})["weight"]
    return {"weight": (merged - layouts.stored(shape.kind, leaf[U] @ leaf[V])).to(merged.dtype)}


def check_file(config: LoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without d, and what LoRA refuses."""
    if DIAGONAL not in leaf:
        raise KeyError(f"{sorted(leaf)}, but no {DIAGONAL} (kasa_config)")
    lora.check_file(config, path, {name: one for name, one in leaf.items() if name != DIAGONAL})


METHOD: Method = dataclasses.replace(
    lora.METHOD,
    slots=SLOTS,
    init=init,
    action=OnWeights(builders.MATRICES, forward, merge, ("weight",)),
    stacking=Stacking(matching.rank, varies=(*lora.VARIES, "kasa_config")),
    files=Files(check_file, derived=derived),
    combining=None,
    variant="kasa_config",
)
