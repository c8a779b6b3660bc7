"""PVeRA: VeRA whose inner vector is drawn in training, of what it has learned (https://arxiv.org/abs/2512.07703).

diag(d)·A·x is twice as long as VeRA's inner vector: its first half is the mean μ of a normal distribution, its second
half the logarithm of the variance. In training mode B is given a draw, μ + σ·ε, at each place anew; else μ, so that a
layer in evaluation mode is VeRA's with the first half of A and d. That is also what merging gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import SHARED, Leaf, Tree
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, slots, vera
from peftfn.methods.lora_config import check_bias, check_positive, check_probability, described
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Sharing, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class PveraConfig(LayeredConfig):
    """PVeRA's config, with PEFT's fields and defaults.

    Attributes:
        r: the rank of B; A has twice as many rows.
        projection_prng_key: the seed of A and B.
        save_projection: whether files hold A and B.
        pvera_dropout: probability with which what goes into A is dropped, in training mode.
        d_initial: what all numbers of d begin as; b begins as zeros.
        fan_in_fan_out: whether weights are stored (in, out); found out by itself.
        bias: biases to train along: "none", "all", or "pvera_only" (those of adapted layers).
        init_weights: whether b begins as zeros; `False` is ones, and a random d.
        sample_at_inference: whether it draws in evaluation mode too.
        generator_seed: of PEFT's own generator, which goes on from call to call. A call here has nothing to go on from,
            so where something is drawn this is refused; torch's seed (`torch.manual_seed`) governs the draws.

    Raises:
        ValueError: the rank is not positive, the dropout no probability, or a bias of another kind.

    Example:
        >>> config = PveraConfig(r=128, target_modules=["query", "value"])
        >>> config.sample_at_inference, config.save_projection
        (False, True)
    """

    peft_type: ClassVar[str] = "PVERA"

    r: int = dataclasses.field(default=256, metadata=described("Rank of B; A has twice as many rows."))
    projection_prng_key: int = dataclasses.field(default=0, metadata=described("Seed of A and B."))
    save_projection: bool = dataclasses.field(default=True, metadata=described("Whether files hold A and B."))
    pvera_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input of A in training."))
    d_initial: float = dataclasses.field(default=0.1, metadata=described("What d begins as."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or pvera_only."))
    init_weights: bool = dataclasses.field(default=True, metadata=described("Whether b begins as zeros."))
    sample_at_inference: bool = dataclasses.field(
        default=False, metadata=described("Whether it draws in evaluation mode too.")
    )
    generator_seed: int | None = dataclasses.field(
        default=None, metadata=described("Kept for PEFT's files; refused where something is drawn.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_probability("pvera_dropout", self.pvera_dropout)
        check_bias(self.bias, "pvera_only")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _is_saved(config: PveraConfig) -> bool:
    return config.save_projection


def _b(config: PveraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs,)


def _d(config: PveraConfig, weight: WeightShape, r: int) -> Shape:
    return (2 * config.r,)


def _from_inputs(config: PveraConfig, weight: WeightShape, r: int) -> Shape:
    return (2 * config.r, weight.inputs)


def _to_outputs(config: PveraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs, config.r)


SLOTS = {
    "pvera_lambda_b": Slot(_b, outputs=0, off=0.0),
    "pvera_lambda_d": Slot(_d),
    "pvera_A": Slot(_from_inputs, trained=False, stored=_is_saved, inputs=1, shared=True),
    "pvera_B": Slot(_to_outputs, trained=False, stored=_is_saved, outputs=0, shared=True),
}


def init(config: PveraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """b and d of one layer."""
    shapes = slots.shapes(SLOTS, config, layouts.of_site(site), config.r)
    b = torch.full(shapes["pvera_lambda_b"], 0.0 if config.init_weights else 1.0)
    d = torch.full(shapes["pvera_lambda_d"], config.d_initial)
    if not config.init_weights:
        d = torch.randn(d.shape, generator=generator)
    made = {"pvera_lambda_b": b, "pvera_lambda_d": d}
    return {name: like_weight(one, site.stored, dtype) for name, one in made.items()}


def projections(
    config: PveraConfig, sites: Mapping[str, Site], generator: torch.Generator, dtype: torch.dtype | None
) -> Tree:
    """A and B of the seed, for the widest of the layers."""
    weights = [layouts.of_site(site) for site in sites.values()]
    own = torch.Generator().manual_seed(config.projection_prng_key)
    a = vera.uniform((2 * config.r, max(one.inputs for one in weights)), own)
    b = vera.uniform((max(one.outputs for one in weights), config.r), own)
    like = next(iter(sites.values())).stored
    return {SHARED: {"pvera_A": like_weight(a, like, dtype), "pvera_B": like_weight(b, like, dtype)}}


def derived(config: PveraConfig, tree: Tree, sites: Mapping[str, Site]) -> Tree:
    """A and B where a file has them not."""
    if SLOTS.keys() & tree.get(SHARED, {}).keys():
        return {}
    if not sites:
        raise ValueError(
            "PveraConfig(save_projection=False): the file has no projections, and their sizes are those of the base's "
            "widest layers; pass the base: peftfn.load(folder, model)."
        )
    dtype = next(leaf["pvera_lambda_d"].dtype for leaf in tree.values() if "pvera_lambda_d" in leaf)
    return projections(config, sites, torch.Generator(), dtype)


# --- what it does -----------------------------------------------------------------------------------------------------


def delta(config: PveraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """diag(b)·B·diag(d)·A with the half of d and A that makes means, (out, in)."""
    d = leaf["pvera_lambda_d"][: config.r]
    a, b = leaf["pvera_A"][: config.r, : weight.inputs], leaf["pvera_B"][: weight.outputs]
    return (leaf["pvera_lambda_b"].unsqueeze(1) * b) @ (d.unsqueeze(1) * a)


def forward(
    config: PveraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What the layer computes, and b ∘ B·z; z is the mean, or a draw."""
    y: Tensor = site(x, *args, **kwargs)
    wide = leaf["pvera_lambda_d"].dtype  # of a half-precision base the others may have fewer bits in PEFT's file
    a, b = leaf["pvera_A"][:, : x.shape[-1]].to(wide), leaf["pvera_B"][: y.shape[-1]].to(wide)
    seen = F.dropout(x.to(a.dtype), config.pvera_dropout, site.training)
    mean, log_variance = (leaf["pvera_lambda_d"] * F.linear(seen, a)).chunk(2, dim=-1)
    if site.training or config.sample_at_inference:
        _refuse_seed(config)
        mean = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    return (y + leaf["pvera_lambda_b"] * F.linear(mean, b)).to(y.dtype)


def _refuse_seed(config: PveraConfig) -> None:
    if config.generator_seed is not None:
        raise ValueError(
            f"generator_seed={config.generator_seed}: PEFT's generator goes on from call to call, and a call here has "
            "nothing to go on from. Take dataclasses.replace(config, generator_seed=None), and torch.manual_seed."
        )


DEFAULTS = {**vera.DEFAULTS, "dinov2": ("query", "value")}

METHOD = Method(
    config=PveraConfig,
    slots=SLOTS,
    init=init,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    sharing=Sharing(projections, derived=derived),
    targets=Targets(by_type(DEFAULTS)),
    stacking=Stacking(varies=("projection_prng_key", "save_projection", "d_initial", "init_weights")),
)
