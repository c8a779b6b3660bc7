"""VeRA: W + diag(b)·B·diag(d)·A, with one A and one B for all layers (https://arxiv.org/abs/2310.11454).

A (r, the most inputs) and B (the most outputs, r) are drawn from a seed and not trained; a layer uses their first
columns and rows. Of each layer two vectors are trained, b (out,) and d (r,), so an adapter has about r + out numbers a
layer. Files hold A and B too, unless `save_projection` is off: then they are drawn again, which takes the base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import SHARED, Leaf, Tree
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Sharing, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class VeraConfig(LayeredConfig):
    """VeRA's config, with PEFT's fields and defaults.

    Attributes:
        r: the rank of A and B, which all layers have in common.
        projection_prng_key: the seed of A and B.
        save_projection: whether files hold A and B.
        vera_dropout: probability with which what goes into A is dropped, in training mode.
        d_initial: what all numbers of d begin as; b begins as zeros.
        fan_in_fan_out: whether weights are stored (in, out); found out by itself.
        bias: biases to train along: "none", "all", or "vera_only" (those of adapted layers).
        init_weights: whether b begins as zeros; `False` is ones, and a random d.

    Raises:
        ValueError: the rank is not positive, the dropout no probability, or a bias of another kind.

    Example:
        >>> config = VeraConfig(r=256, target_modules=["q_proj", "v_proj"])
        >>> config.projection_prng_key, config.save_projection
        (0, True)
    """

    peft_type: ClassVar[str] = "VERA"

    r: int = dataclasses.field(default=256, metadata=described("Rank of A and B."))
    projection_prng_key: int = dataclasses.field(default=0, metadata=described("Seed of A and B."))
    save_projection: bool = dataclasses.field(default=True, metadata=described("Whether files hold A and B."))
    vera_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input of A in training."))
    d_initial: float = dataclasses.field(default=0.1, metadata=described("What d begins as."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or vera_only."))
    init_weights: bool = dataclasses.field(default=True, metadata=described("Whether b begins as zeros."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        if not 0 <= self.vera_dropout < 1:
            raise ValueError(f"vera_dropout={self.vera_dropout!r}; expected a probability of at least 0, below 1.")
        if self.bias not in ("none", "all", "vera_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'vera_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _is_saved(config: VeraConfig) -> bool:
    return config.save_projection


def _b(config: VeraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs,)


def _d(config: VeraConfig, weight: WeightShape, r: int) -> Shape:
    return (r,)


def _from_inputs(config: VeraConfig, weight: WeightShape, r: int) -> Shape:
    return (r, weight.inputs)


def _to_outputs(config: VeraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs, r)


SLOTS = {
    "vera_lambda_b": Slot(_b, outputs=0, off=0.0),
    "vera_lambda_d": Slot(_d, rank=0),
    "vera_A": Slot(_from_inputs, trained=False, stored=_is_saved, rank=0, inputs=1, shared=True),
    "vera_B": Slot(_to_outputs, trained=False, stored=_is_saved, rank=1, outputs=0, shared=True),
}


def init(config: VeraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """b and d of one layer."""
    shapes = slots.shapes(SLOTS, config, layouts.of_site(site), config.r)
    b = torch.zeros(shapes["vera_lambda_b"]) if config.init_weights else torch.ones(shapes["vera_lambda_b"])
    d = torch.full(shapes["vera_lambda_d"], config.d_initial)
    if not config.init_weights:
        d = torch.randn(d.shape, generator=generator)
    return {
        "vera_lambda_b": like_weight(b, site.stored, dtype),
        "vera_lambda_d": like_weight(d, site.stored, dtype),
    }


def projections(
    config: VeraConfig, sites: Mapping[str, Site], generator: torch.Generator, dtype: torch.dtype | None
) -> Tree:
    """A and B of the seed, for the widest of the layers."""
    weights = [layouts.of_site(site) for site in sites.values()]
    own = torch.Generator().manual_seed(config.projection_prng_key)
    a = uniform((config.r, max(one.inputs for one in weights)), own)
    b = uniform((max(one.outputs for one in weights), config.r), own)
    like = next(iter(sites.values())).stored
    return {SHARED: {"vera_A": like_weight(a, like, dtype), "vera_B": like_weight(b, like, dtype)}}


def uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    """Numbers between plus and minus Kaiming's bound, as PEFT draws them for VeRA."""
    # Kaiming's bound for a gain of √2.
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def derived(config: VeraConfig, tree: Tree, sites: Mapping[str, Site]) -> Tree:
    """A and B where a file has them not."""
    if SLOTS.keys() & tree.get(SHARED, {}).keys():
        return {}
    if not sites:
        raise ValueError(
            "VeraConfig(save_projection=False): the file has no projections, and their sizes are those of the base's "
            "widest layers; pass the base: peftfn.load(folder, model)."
        )
    dtype = next(leaf["vera_lambda_d"].dtype for leaf in tree.values() if "vera_lambda_d" in leaf)
    return projections(config, sites, torch.Generator(), dtype)


# --- what it does -----------------------------------------------------------------------------------------------------


def delta(config: VeraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """diag(b)·B·diag(d)·A, (out, in)."""
    a, b = leaf["vera_A"][:, : weight.inputs], leaf["vera_B"][: weight.outputs]
    return (leaf["vera_lambda_b"].unsqueeze(1) * b) @ (leaf["vera_lambda_d"].unsqueeze(1) * a)


def forward(config: VeraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes, and b ∘ B·(d ∘ A·drop(x))."""
    y: Tensor = site(x, *args, **kwargs)
    wide = leaf["vera_lambda_d"].dtype  # of a half-precision base the others may have fewer bits in PEFT's file
    a, b = leaf["vera_A"][:, : x.shape[-1]].to(wide), leaf["vera_B"][: y.shape[-1]].to(wide)
    seen = F.dropout(x.to(a.dtype), config.vera_dropout, site.training)
    change = leaf["vera_lambda_b"] * F.linear(leaf["vera_lambda_d"] * F.linear(seen, a), b)
    return (y + change).to(y.dtype)


def _rank(config: VeraConfig, path: str) -> int:
    return config.r


DEFAULTS = {**TARGETS, "phi": ("q_proj", "v_proj")}

METHOD = Method(
    config=VeraConfig,
    slots=SLOTS,
    init=init,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    sharing=Sharing(projections, derived=derived),
    targets=Targets(by_type(DEFAULTS)),
    stacking=Stacking(_rank, varies=("r", "projection_prng_key", "save_projection", "d_initial", "init_weights")),
)
