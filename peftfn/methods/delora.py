"""DeLoRA: W + (λ/r)·B·diag(1 / (‖a_k‖·‖b_k‖))·A·diag(‖W_j‖), its length trained apart (https://arxiv.org/abs/2503.18225).

Each of the r rank-one parts has length 1 before it is multiplied by the trained λ/r, so that λ alone says how far the
weight goes; the norms of rows of A and of columns of B are at least 1e-4. ‖W_j‖ are the lengths of the base's columns
when the adapter was made: they are kept with it, so the weight is not read in a forward and any packed base will do.

PEFT has linear layers; transformers' `Conv1D` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, lora
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot, always
from peftfn.methods.traits import Files, Stacking
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class DeloraConfig(LayeredConfig):
    """DeLoRA's config, with PEFT's fields and defaults: LoRA, its length apart (https://arxiv.org/abs/2503.18225).

    W + (λ/r)·B·diag(1 / (‖a_k‖·‖b_k‖))·A·diag(‖W_j‖), a_k and b_k the rows of A and the columns of B, ‖W_j‖ the lengths
    of the columns of W.

    Attributes:
        r: the rank of the update.
        delora_lambda: λ at the start, one number a layer, which is trained: how far the weight goes, in lengths of
            its own columns.
        module_dropout: the probability in training that a number of the update's input is dropped, as in PEFT.
        bias: which biases to train too: `"none"`, `"all"`, or `"delora_only"`, those of the adapted layers.
        init_weights: `True` (B = 0), or `False` (random: not the identity).
        rank_pattern: other ranks, by module name or regex; the first one that matches a path counts.
        lambda_pattern: other values of λ, in the same way.

    Raises:
        ValueError: a rank is no positive integer, `module_dropout` no probability below 1, or `bias` unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.DeloraConfig(r=4, delora_lambda=10, target_modules=["query"], lambda_pattern={"layer.0": 5})
        >>> config.module_dropout
        0.0
    """

    peft_type: ClassVar[str] = "DELORA"

    r: int = dataclasses.field(default=8, metadata=described("Rank of the update."))
    delora_lambda: float = dataclasses.field(default=15, metadata=described("How far the weights go, at the start."))
    module_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Dropout on what the update is given in training.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or delora_only."))
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (B = 0), or False (not the identity).")
    )
    rank_pattern: Mapping[str, int] | None = dataclasses.field(
        default_factory=dict[str, int], metadata=described("Other ranks, by module name or regex.")
    )
    lambda_pattern: Mapping[str, float] | None = dataclasses.field(
        default_factory=dict[str, float], metadata=described("Other lambdas, by module name or regex.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            check_positive("r", rank)
        if not 0 <= self.module_dropout < 1:
            raise ValueError(f"module_dropout={self.module_dropout!r}; expected a probability of at least 0, below 1.")
        if self.bias not in ("none", "all", "delora_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'delora_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _a(config: DeloraConfig, weight: WeightShape, r: int) -> Shape:
    return (r, weight.inputs)


def _b(config: DeloraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs, r)


def _lambda(config: DeloraConfig, weight: WeightShape, r: int) -> Shape:
    return (1,)


def _lengths(config: DeloraConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.inputs,)


SLOTS = {
    "delora_A": Slot(_a, rank=0, off=0.0),
    "delora_B": Slot(_b, rank=1, off=0.0),
    "delora_lambda": Slot(_lambda, off=0.0),
    "delora_w_norm": Slot(_lengths, trained=False, stored=always, off=0.0),
    "share": Slot(trained=False, off=0.0),
}


def init(config: DeloraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A uniform as torch's layers, B zero or uniform too, λ of the config, and the lengths of the weight's columns."""
    if site.stored.is_meta:
        raise ValueError(
            f"{site.path}: DeLoRA starts from the lengths of the weight's columns, and the model is on the meta "
            "device; load it with its weights first."
        )
    weight, r = layouts.of_site(site), matching.rank(config, path)

    def uniform(shape: Shape) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5

    a = uniform(_a(config, weight, r))
    b = torch.zeros(_b(config, weight, r)) if config.init_weights else uniform(_b(config, weight, r))
    length = matching.pattern_value(config.lambda_pattern, path, config.delora_lambda)
    seen = layouts.seen(site.kind, site.weight.detach())
    wide = seen.to(torch.promote_types(seen.dtype, torch.float32))
    made = {"delora_A": a, "delora_B": b, "delora_lambda": torch.full((1,), float(length))}
    made["delora_w_norm"] = wide.square().sum(0).sqrt()
    return {name: like_weight(one, site.stored, dtype) for name, one in made.items()}


def constants(config: DeloraConfig, path: str, leaf: Leaf) -> Leaf:
    """1/r of one site, a 0-d tensor."""
    return {"share": constant(1 / matching.rank(config, path), leaf)}


# --- what it does -----------------------------------------------------------------------------------------------------


def _scales(leaf: Mapping[str, Tensor]) -> Tensor:
    """(λ/r) / (‖a_k‖·‖b_k‖), (r,)."""
    return leaf["share"] * leaf["delora_lambda"] / (_norms(leaf["delora_A"], 1) * _norms(leaf["delora_B"], 0))


def _norms(factor: Tensor, axis: int) -> Tensor:
    """The norms along an axis, 1e-4 where they are less, which is a constant for gradients."""
    squares = factor.square().sum(axis)
    is_short = squares < 1e-8
    return torch.where(is_short, torch.full_like(squares, 1e-4), torch.where(is_short, 1.0, squares).sqrt())


def delta(config: DeloraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """(λ/r)·B·diag(1 / (‖a_k‖·‖b_k‖))·A·diag(‖W_j‖), (out, in)."""
    return (leaf["delora_B"] * _scales(leaf)) @ (leaf["delora_A"] * leaf["delora_w_norm"])


def forward(
    config: DeloraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """site(x) + the update·x; in training the update acts on x with dropout."""
    y, x = site(x, *args, **kwargs), x.to(leaf["delora_A"].dtype)
    if config.module_dropout:
        x = F.dropout(x, config.module_dropout, training=site.training)
    narrow = F.linear(x * leaf["delora_w_norm"], leaf["delora_A"]) * _scales(leaf)
    return (y + F.linear(narrow, leaf["delora_B"])).to(y.dtype)


# --- its files --------------------------------------------------------------------------------------------------------


def check_file(config: DeloraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without one of its tensors, or of another rank, whose λ would be another length."""
    expected = sorted(name for name in SLOTS if name != "share")
    if sorted(leaf) != expected:
        raise KeyError(f"{sorted(leaf)}, and DeLoRA has {expected}")
    rank = leaf["delora_A"].shape[0]
    if rank != matching.rank(config, path):
        raise ValueError(f"rank {rank}, and the config says {matching.rank(config, path)},")


METHOD = Method(
    config=DeloraConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    targets=lora.METHOD.targets,  # as in PEFT
    files=Files(check_file),
    stacking=Stacking(
        matching.rank, varies=("r", "rank_pattern", "delora_lambda", "lambda_pattern", "bias", "init_weights")
    ),
)
