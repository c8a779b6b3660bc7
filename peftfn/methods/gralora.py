"""GraLoRA: W + s·Δ, Δ of k × k blocks with a low-rank product each (https://arxiv.org/abs/2505.20355, section 3).

Block (m, n) of Δ, the m-th part of the outputs and the n-th of the inputs, is B[m, n]ᵀ A[n, m]ᵀ of rank r / k: a LoRA's
number of parameters, and k times its rank. With `hybrid_r` a plain low-rank product over all of the weight is added.
Scaling s is alpha / (r + hybrid_r). In training with dropout the two products drop numbers of x apart, as in PEFT.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class GraloraConfig(LayeredConfig):
    """GraLoRA's config, with PEFT's fields and defaults: W + s·Δ, Δ of low-rank blocks (https://arxiv.org/abs/2505.20355).

    Attributes:
        r: the ranks of a row of blocks added up, so that each block has r / gralora_k; a multiple of `gralora_k`.
        hybrid_r: the rank of a plain low-rank product over the whole weight, which is added; 0 is none.
        alpha: the scaling s is alpha / (r + hybrid_r).
        gralora_dropout: the probability in training that a number of a product's input is dropped.
        gralora_k: k, how many parts the outputs are cut into, and the inputs; has to divide both.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        bias: which biases to train too: `"none"`, `"all"`, or `"gralora_only"`, those of the adapted layers.
        init_weights: `True` (B = 0), or `False` (all random: not the identity).

    Raises:
        ValueError: `r` or `gralora_k` is no positive integer or does not divide, `hybrid_r` is negative,
            `gralora_dropout` no probability below 1, or `bias` unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.GraloraConfig(r=8, gralora_k=4, alpha=16, target_modules=["query", "value"])
        >>> config.alpha / (config.r + config.hybrid_r)
        2.0
    """

    peft_type: ClassVar[str] = "GRALORA"

    r: int = dataclasses.field(default=32, metadata=described("Rank of a row of blocks; gralora_k divides it."))
    hybrid_r: int = dataclasses.field(default=0, metadata=described("Rank of a product over the whole weight, or 0."))
    alpha: float = dataclasses.field(default=64, metadata=described("Scaling is alpha / (r + hybrid_r)."))
    gralora_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input in training."))
    gralora_k: int = dataclasses.field(default=2, metadata=described("Blocks along each side of the weight."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or gralora_only."))
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (B = 0), or False (not the identity).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("gralora_k", self.gralora_k)
        if self.r % self.gralora_k:
            raise ValueError(f"r={self.r} is not divisible by gralora_k={self.gralora_k}; expected a multiple of it.")
        if self.hybrid_r < 0:
            raise ValueError(f"hybrid_r={self.hybrid_r}; expected 0 or a positive integer.")
        if not 0 <= self.gralora_dropout < 1:
            raise ValueError(f"gralora_dropout={self.gralora_dropout!r}; expected at least 0, below 1.")
        if self.bias not in ("none", "all", "gralora_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'gralora_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _is_divided(config: GraloraConfig, weight: WeightShape) -> bool:
    return weight.outputs % config.gralora_k == 0 and weight.inputs % config.gralora_k == 0


def _a(config: GraloraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (config.gralora_k, weight.inputs // config.gralora_k, r) if _is_divided(config, weight) else None


def _b(config: GraloraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (config.gralora_k, r, weight.outputs // config.gralora_k) if _is_divided(config, weight) else None


def _whole_a(config: GraloraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (config.hybrid_r, weight.inputs) if config.hybrid_r else None


def _whole_b(config: GraloraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (weight.outputs, config.hybrid_r) if config.hybrid_r else None


SLOTS = {
    "gralora_A": Slot(_a, rank=2),
    "gralora_B": Slot(_b, rank=1),
    "gralora_A_general": Slot(_whole_a, "gralora_A_general.weight"),
    "gralora_B_general": Slot(_whole_b, "gralora_B_general.weight"),
    "scaling": Slot(trained=False, off=0.0),
}


def _rank(config: GraloraConfig, path: str) -> int:
    return config.r


def _by_block(leaf: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A as (inputs' part, in/k, outputs' part, r/k), and B as (outputs' part, inputs' part, r/k, out/k)."""
    a, b = leaf["gralora_A"], leaf["gralora_B"]
    k = a.shape[0]
    return a.reshape(k, a.shape[1], k, -1), b.reshape(k, k, -1, b.shape[2])


def _resized(leaf: Leaf, old: int, new: int) -> Leaf:
    """The leaf with another rank, which each block has its share of."""
    a, b = _by_block(leaf)
    share = new // a.shape[0]
    made = {"gralora_A": slots.sized(a, 3, share).flatten(2), "gralora_B": slots.sized(b, 2, share).flatten(1, 2)}
    return {**leaf, **made}


def init(config: GraloraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The factors of one site: A uniform as torch's layers, B zero or uniform too."""
    weight, k = layouts.of_site(site), config.gralora_k
    if not _is_divided(config, weight):
        raise ValueError(
            f"{site.path}: gralora_k={k} does not divide its {weight.inputs} inputs and {weight.outputs} outputs; "
            f"expected a divisor of {math.gcd(weight.inputs, weight.outputs)}."
        )
    # How many inputs each factor has.
    fan_in = {"gralora_A": weight.inputs // k, "gralora_B": config.r}
    fan_in |= {"gralora_A_general": weight.inputs, "gralora_B_general": config.hybrid_r}

    def drawn(name: str, shape: Shape) -> Tensor:
        if config.init_weights and name.startswith("gralora_B"):
            return torch.zeros(shape)
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in[name])

    shapes = slots.shapes(SLOTS, config, weight, config.r)
    return {name: like_weight(drawn(name, shape), site.stored, dtype) for name, shape in shapes.items()}


def constants(config: GraloraConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling of one site, a 0-d tensor."""
    return {"scaling": constant(config.alpha / (config.r + config.hybrid_r), leaf)}


def check_file(config: GraloraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without one of its tensors, and one of another rank: the scaling would be wrong."""
    expected = [name for name in SLOTS if name != "scaling" and (config.hybrid_r or not name.endswith("_general"))]
    if sorted(leaf) != sorted(expected):
        raise KeyError(f"{sorted(leaf)}, and with hybrid_r={config.hybrid_r} there are {expected}")
    if leaf["gralora_A"].shape[-1] != config.r:
        raise ValueError(f"rank {leaf['gralora_A'].shape[-1]}, and the config says {config.r}")


# --- what it does -----------------------------------------------------------------------------------------------------


def delta(config: GraloraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """s·Δ, (out, in)."""
    whole = torch.einsum("nimq,mnqo->moni", *_by_block(leaf)).reshape(weight.outputs, weight.inputs)
    if "gralora_A_general" in leaf:
        whole = whole + leaf["gralora_B_general"] @ leaf["gralora_A_general"]
    return leaf["scaling"] * whole


def forward(
    config: GraloraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """site(x) + s·Δ x, by products that never make Δ."""
    y, (a, b) = site(x, *args, **kwargs), _by_block(leaf)
    x, p = x.to(a.dtype), config.gralora_dropout if site.training else 0.0
    split = F.dropout(x, p).reshape(*x.shape[:-1], *a.shape[:2])  # (..., inputs' part, in/k)
    change = torch.einsum("...mnq,mnqo->...mo", torch.einsum("...ni,nimq->...mnq", split, a), b).flatten(-2)
    if "gralora_A_general" in leaf:
        change = change + F.linear(F.linear(F.dropout(x, p), leaf["gralora_A_general"]), leaf["gralora_B_general"])
    return (y + leaf["scaling"] * change).to(y.dtype)


METHOD = Method(
    config=GraloraConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    targets=Targets(by_type(TARGETS, has_exclusions=False)),
    stacking=Stacking(_rank, _resized, varies=("r", "alpha", "bias", "init_weights")),
    files=Files(check_file),
)
