"""DoRA: m ∘ (W + s·B·A) / ‖W + s·B·A‖, a learned length m for each output beside LoRA (https://arxiv.org/abs/2402.09353).

The norm is taken over everything that an output is a sum of, and is a constant for gradients (section 4.3). With
g = m / ‖W + s·B·A‖ a layer computes

    y + (g - 1) ∘ (y - b) + g ∘ s·B·A·x,    where y = W x + b,

so that a fresh adapter, whose m is ‖W‖, leaves y as it is, bit for bit. The bias is not scaled. In training with
dropout all of x that g scales is dropped, that of W too, as in PEFT: y + (g - 1) ∘ W drop(x) + g ∘ s·B·A·drop(x).

The weight is read in every forward, and a packed one is unpacked for it.
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
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.low_rank import layer_deltas, site_forward
from peftfn.methods.low_rank.linear_kernel import Delta
from peftfn.methods.method import constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

MAGNITUDE = "lora_magnitude_vector"


def _magnitude(config: LoraConfig, weight: WeightShape, r: int) -> Shape:
    return (1, weight.outputs, *(1 for _ in weight.kernel)) if weight.kernel else (weight.outputs,)


SLOTS = {**lora.SLOTS, MAGNITUDE: Slot(_magnitude), "active": Slot(trained=False, off=0.0)}


def init(config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A and B as LoRA's, and the norms of W + s·B·A."""
    leaf = lora.init(config, path, site, generator, dtype)
    if site.stored.is_meta:
        raise ValueError(
            f"{site.path}: use_dora starts from the norms of the weight, and the model is on the meta device; load it "
            "with its weights first."
        )
    delta = lora.factors(config, {**leaf, **lora.constants(config, path, leaf)}, site.kind, site.shape)
    norms = _norms(delta, site.kind, site.weight)
    return {
        **leaf,
        MAGNITUDE: like_weight(norms.view(_magnitude(config, layouts.of_site(site), 0)), site.stored, dtype),
    }


def constants(config: LoraConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling, and `active`, 1: where it is 0 the method does nothing, which no value of the magnitude says."""
    return {**lora.constants(config, path, leaf), "active": constant(1.0, leaf)}


def _norms(delta: Delta, kind: str, weight: Tensor) -> Tensor:
    """‖W + s·B·A‖ of each output, (out,), of a weight as it is stored; a constant."""
    a, b, scaling = (one.detach() for one in delta)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    whole = layouts.seen(kind, layer_deltas.merged(kind, a, b, scaling, wide))
    return cast("Tensor", torch.linalg.vector_norm(whole.flatten(1), dim=1))  # torch does not say what it returns


def _gain(delta: Delta, leaf: Mapping[str, Tensor], kind: str, weight: Tensor) -> Tensor:
    """m / ‖W + s·B·A‖, (out,); 1 where the method is off."""
    gain = leaf[MAGNITUDE].flatten() / _norms(delta, kind, weight)
    return torch.where(leaf["active"] > 0, gain, torch.ones_like(gain))


def _weight(config: LoraConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    """m ∘ (W + s·B·A) / ‖W + s·B·A‖."""
    stored = layouts.stored(shape.kind, weight)
    delta = lora.factors(config, leaf, shape.kind, stored.shape)
    whole = layouts.seen(shape.kind, layer_deltas.merged(shape.kind, *delta, stored))
    gain = _gain(delta, leaf, shape.kind, stored)
    return gain.view(-1, *(1 for _ in whole.shape[1:])) * whole


def forward(config: LoraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y + (g - 1) ∘ (y - b) + g ∘ s·B·A·x, as the head of this file derives it."""
    y, tensors = site(x, *args, **kwargs), site.tensors
    weight, bias = tensors["weight"], tensors["bias"]
    assert weight is not None, "every layer that DoRA acts on has a weight"
    delta = lora.factors(config, leaf, site.kind, site.shape)
    spread = (-1, *(1 for _ in range(weight.dim() - 2)))  # (out, 1...): over what is beside a convolution's channels
    gain = _gain(delta, leaf, site.kind, weight)
    own = y if bias is None else y - bias.view(spread)
    if config.lora_dropout and site.training and x.is_floating_point():
        x = F.dropout(x, config.lora_dropout, training=True)
        own = site.run_with({"weight": weight, "bias": None}, x, *args, **kwargs)
    scaled = delta._replace(b=delta.b * gain.view(-1, *(1 for _ in delta.b.shape[1:])))
    return site_forward.add(site, scaled, 0.0, x, (y + (gain.view(spread) - 1) * own).to(y.dtype))


def check_file(config: LoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without a magnitude, and what LoRA refuses."""
    if MAGNITUDE not in leaf:
        raise KeyError(f"{sorted(leaf)}, but no {MAGNITUDE} (use_dora)")
    lora.check_file(config, path, {name: one for name, one in leaf.items() if name != MAGNITUDE})


METHOD = dataclasses.replace(
    lora.METHOD,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.reweighted(_weight, forward=forward, kinds=builders.LAYERS),
    files=Files(check_file, write=lora.METHOD.files.write, read=lora.METHOD.files.read),
    combining=None,
    variant="use_dora",
)
