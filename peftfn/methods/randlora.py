"""RandLoRA: W + s·Σ_j B_j·diag(λ_j)·A·diag(g_j), random bases for all layers (https://arxiv.org/abs/2502.00987).

A (r, the most of the shorter sides) and the B_j (the most of the longer sides, r) are drawn from a seed, not trained;
a layer with the shorter side m uses their first rows and columns, and n = ⌈m / r⌉ of the B_j, so that the sum can have
full rank. Of each layer λ (r, n) and g (n, m) are trained: the smaller r is, the more there is to train. Where a layer
has fewer outputs than inputs, the sum is transposed.

PEFT lays the columns of the B_j out in the order (j, rank), the rows of A in the order (rank, j), so that unless n or
r is 1 it multiplies parts that do not belong together. Files are trained with that, so it is the same here. Its files
hold A and B once for the model and once more for each layer; so do this library's.
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
from peftfn.methods.lora_config import check_bias, check_positive, check_probability, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Sharing, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class RandLoraConfig(LayeredConfig):
    """RandLoRA's config, with PEFT's fields and defaults.

    Attributes:
        r: rank of one random basis; the smaller it is, the more is trained.
        projection_prng_key: the seed of A and B.
        save_projection: whether files hold A and B.
        sparse: whether A and B have two zeros in three, and else 1 or -1, before they are scaled.
        very_sparse: whether they have more zeros, all but 1 of √m on either side; it goes before `sparse`.
        randlora_dropout: probability with which the input of the sum is dropped, in training mode.
        randlora_alpha: the sum is scaled by randlora_alpha / r.
        fan_in_fan_out: whether weights are stored (in, out); found out by itself.
        bias: biases to train along: "none", "all", or "randlora_only" (those of adapted layers).
        init_weights: whether λ begins as zeros; `False` is a random λ.

    Raises:
        ValueError: the rank is not positive, the dropout no probability, or a bias of another kind.

    Example:
        >>> config = RandLoraConfig(r=32, target_modules=["q_proj", "v_proj"])
        >>> config.randlora_alpha, config.save_projection
        (640, True)
    """

    peft_type: ClassVar[str] = "RANDLORA"

    r: int = dataclasses.field(default=32, metadata=described("Rank of a random basis: a smaller one trains more."))
    projection_prng_key: int = dataclasses.field(default=0, metadata=described("Seed of A and B."))
    save_projection: bool = dataclasses.field(default=True, metadata=described("Whether files hold A and B."))
    sparse: bool = dataclasses.field(default=False, metadata=described("Whether A and B have two zeros in three."))
    very_sparse: bool = dataclasses.field(default=False, metadata=described("Whether they have still more zeros."))
    randlora_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input in training."))
    randlora_alpha: float = dataclasses.field(default=640, metadata=described("The sum is scaled by this / r."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or randlora_only."))
    init_weights: bool = dataclasses.field(default=True, metadata=described("Whether lambda begins as zeros."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_probability("randlora_dropout", self.randlora_dropout)
        check_bias(self.bias, "randlora_only")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _is_saved(config: RandLoraConfig) -> bool:
    return config.save_projection


def _sides(weight: WeightShape) -> tuple[int, int]:
    return min(weight.outputs, weight.inputs), max(weight.outputs, weight.inputs)


def _lambda(config: RandLoraConfig, weight: WeightShape, r: int) -> Shape:
    return (config.r, math.ceil(_sides(weight)[0] / config.r))


def _gamma(config: RandLoraConfig, weight: WeightShape, r: int) -> Shape:
    shorter = _sides(weight)[0]
    return (math.ceil(shorter / config.r), shorter)


def _a(config: RandLoraConfig, weight: WeightShape, r: int) -> Shape:
    return (config.r, 1, _sides(weight)[0])


def _b(config: RandLoraConfig, weight: WeightShape, r: int) -> Shape:
    shorter, longer = _sides(weight)
    return (longer, math.ceil(shorter / config.r), config.r)


SLOTS = {
    "randlora_lambda": Slot(_lambda),
    "randlora_gamma": Slot(_gamma),
    "randlora_A": Slot(_a, trained=False, stored=_is_saved, shared=True, longer=(2,), at_sites=True),
    "randlora_B": Slot(_b, trained=False, stored=_is_saved, shared=True, longer=(0, 1), at_sites=True),
    "scaling": Slot(trained=False, off=0.0),
}


def init(config: RandLoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """λ and g of one layer."""
    weight = layouts.of_site(site)
    shapes = slots.shapes(SLOTS, config, weight, config.r)
    at = shapes["randlora_lambda"]
    drawn = torch.zeros(at) if config.init_weights else torch.randn(at, generator=generator)
    longest = max(shapes["randlora_gamma"]) if config.init_weights else _sides(weight)[1]
    gamma = torch.full(shapes["randlora_gamma"], 1 / longest)
    return {
        "randlora_lambda": like_weight(drawn, site.stored, dtype),
        "randlora_gamma": like_weight(gamma, site.stored, dtype),
    }


def constants(config: RandLoraConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling randlora_alpha / r, a 0-d tensor."""
    return {"scaling": constant(config.randlora_alpha / config.r, leaf)}


def projections(
    config: RandLoraConfig, sites: Mapping[str, Site], generator: torch.Generator, dtype: torch.dtype | None
) -> Tree:
    """A and B of the seed, for the longest sides of all layers."""
    weights = [layouts.of_site(site) for site in sites.values()]
    most = [max(one.outputs for one in weights), max(one.inputs for one in weights)]
    shorter, longer = min(most), max(most)
    count = math.ceil(shorter / config.r)
    own = torch.Generator().manual_seed(config.projection_prng_key)
    if config.sparse or config.very_sparse:
        chance = 1 / (2 * (math.sqrt(shorter) if config.very_sparse else 3))
        a, b = _ternary((config.r, 1, shorter), chance, own), _ternary((longer, count, config.r), chance, own)
    else:
        a = _uniform((config.r, 1, shorter), own)
        b = torch.cat([_uniform((longer, 1, config.r), own) for _ in range(count)], 1)
    like = next(iter(sites.values())).stored
    made = {"randlora_A": a / a.std(), "randlora_B": b / b.std()}
    return {SHARED: {name: like_weight(one, like, dtype) for name, one in made.items()}}


def _uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    # Kaiming's bound for a slope of √5, in the bfloat16 in which PEFT draws: other dtypes are other numbers.
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5.0) ** 2)) / math.sqrt(shape[2]))
    return torch.empty(shape, dtype=torch.bfloat16, device="cpu").uniform_(-bound, bound, generator=generator)


def _ternary(shape: Shape, chance: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(shape, generator=generator, device="cpu")
    return (drawn > 1 - chance).float() - (drawn < chance).float()


def derived(config: RandLoraConfig, tree: Tree, sites: Mapping[str, Site]) -> Tree:
    """A and B where a file has them not."""
    if SLOTS.keys() & tree.get(SHARED, {}).keys():
        return {}
    if not sites:
        raise ValueError(
            "RandLoraConfig(save_projection=False): the file has no projections, and their sizes are those of the "
            "base's longest layers; pass the base: peftfn.load(folder, model)."
        )
    dtype = next(leaf["randlora_lambda"].dtype for leaf in tree.values() if "randlora_lambda" in leaf)
    return projections(config, sites, torch.Generator(), dtype)


# --- what it does -----------------------------------------------------------------------------------------------------


def factors(leaf: Mapping[str, Tensor], inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Two factors of the sum, (n·r, in) and (out, n·r)."""
    lam, gamma = leaf["randlora_lambda"], leaf["randlora_gamma"]
    scaled = lam.unsqueeze(2) * leaf["randlora_A"][:, :, : gamma.shape[1]] * gamma
    shorter = scaled.flatten(0, 1)  # (r·n, m), by rank first
    longer = leaf["randlora_B"][: max(inputs, outputs), : gamma.shape[0]].flatten(1)  # (.., n·r), by j first
    longer = longer.to(shorter.dtype)  # of a half-precision base PEFT's file has λ in float32 alone
    return (shorter, longer) if inputs <= outputs else (longer.mT, shorter.mT)


def delta(config: RandLoraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """The scaled sum, (out, in)."""
    first, second = factors(leaf, weight.inputs, weight.outputs)
    return leaf["scaling"] * (second @ first)


def forward(
    config: RandLoraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What the layer computes, and the scaled sum of drop(x)."""
    y: Tensor = site(x, *args, **kwargs)
    first, second = factors(leaf, x.shape[-1], y.shape[-1])
    seen = F.dropout(x.to(first.dtype), config.randlora_dropout, site.training)
    return (y + leaf["scaling"] * F.linear(F.linear(seen, first), second)).to(y.dtype)


METHOD = Method(
    config=RandLoraConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    sharing=Sharing(projections, derived=derived),
    targets=Targets(by_type(TARGETS)),
    stacking=Stacking(
        varies=("projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_alpha", "init_weights")
    ),
)
