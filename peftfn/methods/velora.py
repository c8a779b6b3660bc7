"""VeLoRA: LoRA that keeps a few numbers of each input for the gradient of A (https://arxiv.org/abs/2405.17991).

What a layer computes is LoRA's, and so is every gradient but that of A: there, x is cut into groups of numbers, and of
each group g only v·x_g is kept, along one vector v; the gradient is made with (v·x_g)·v in the place of x_g. In
evaluation mode the gradient is LoRA's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.transforms import is_forward_mode
from peftfn.methods import builders, lora
from peftfn.methods import slots as slot_table
from peftfn.methods.action import OnWeights
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

VECTOR = "lora_velora_embed"


def _said(config: LoraConfig) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", config.velora_config)


def _size(config: LoraConfig, weight: WeightShape, r: int) -> Shape:
    return (-(-weight.inputs // _said(config)["num_groups"]),)


SLOTS = {
    **{name: lora.SLOTS[name] for name in ("lora_A", "lora_B", "scaling")},
    VECTOR: Slot(_size, trained=False, stored=slot_table.always),
}


def init(config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A and B as LoRA's, and v: at random, or zero where each batch says it."""
    leaf, size = lora.init(config, path, site, generator, dtype), _size(config, layouts.of_site(site), 0)
    is_random = _said(config)["init_type"] == "random"
    vector = _normalised(torch.randn(size, generator=generator)) if is_random else torch.zeros(size)
    return {**leaf, VECTOR: like_weight(vector, site.stored, dtype)}


def _normalised(vector: Tensor) -> Tensor:
    norm = cast("Tensor", torch.linalg.vector_norm(vector))  # torch does not say what it returns
    return torch.where(norm > 0, vector / torch.where(norm > 0, norm, 1.0), vector.shape[0] ** -0.5)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(tokens, groups, size), filled up with zeros."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).reshape(-1, groups, size)


class _Compressed(torch.autograd.Function):
    """x Aᵀ, of which the backward pass keeps v·x_g for each group g of x in the place of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, *_: Any) -> Tensor:
        return F.linear(x, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004  # torch's
        x, a, v, groups, scale = inputs
        ctx.save_for_backward(_grouped(x, groups) @ v, a, v)
        ctx.scale, ctx.inputs = scale, x.shape[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (kept, a, v), (dy,) = ctx.saved_tensors, grads
        seen = (kept.unsqueeze(-1) * v).flatten(1)[:, : ctx.inputs] * ctx.scale
        return dy @ a, dy.reshape(-1, dy.shape[-1]).mT @ seen, None, None, None


def _compressed(x: Tensor, a: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
    """x Aᵀ with VeLoRA's gradient of A."""
    if not is_forward_mode() and not torch.compiler.is_compiling():
        return cast("Tensor", _Compressed.apply(x, a, v, groups, scale))
    seen = ((_grouped(x.detach(), groups) @ v).unsqueeze(-1) * v).flatten(1)[:, : x.shape[-1]] * scale
    along = F.linear(seen.view(x.shape), a)  # whose value is taken off again
    return F.linear(x, a.detach()) + (along - along.detach())


def _lora(leaf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf[name] for name in leaf if name != VECTOR}


def forward(config: LoraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes with LoRA; in training the gradient of A is made of what v keeps of x."""
    if not (site.training and torch.is_grad_enabled()):
        return lora.ACTION.forward(config, _lora(leaf), site, x, *args, **kwargs)
    said, a, b = _said(config), leaf["lora_A"], leaf["lora_B"]
    if said["init_type"] == "batch_average_once":
        raise ValueError(
            f"{site.path}: init_type='batch_average_once' keeps the average of the first batch, and an adapter does "
            "not change by being run. Train with 'batch_average' or 'random'; it runs in evaluation mode as it is."
        )
    y: Tensor = site(x, *args, **kwargs)
    seen = F.dropout(x.to(a.dtype), config.lora_dropout, training=True)
    groups = said["num_groups"]
    vector = leaf[VECTOR].to(a.dtype)
    if said["init_type"] == "batch_average":
        vector = _normalised(_grouped(seen.detach(), groups).flatten(0, 1).mean(0))
    hidden = _compressed(seen, a, vector, groups, said["scale"])
    return (y + F.linear(hidden, b) * leaf["scaling"]).to(y.dtype)


def merge(
    config: LoraConfig, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """W + s·B·A."""
    return lora.ACTION.merge(config, _lora(leaf), shape, tensors)


def check_file(config: LoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without v, and what LoRA refuses."""
    if VECTOR not in leaf:
        raise KeyError(f"{sorted(leaf)}, but no {VECTOR} (velora_config)")
    lora.check_file(config, path, _lora(leaf))


METHOD: Method = dataclasses.replace(
    lora.METHOD,
    slots=SLOTS,
    init=init,
    action=OnWeights(builders.MATRICES, forward, merge, ("weight",)),
    files=Files(check_file),
    combining=None,
    variant="velora_config",
)
