"""HRA: W·H₁·H₂ ··· H_r, reflections H = I - 2·û·ûᵀ of the inputs (https://arxiv.org/abs/2405.17484).

The chain is computed as one product, I - V·T·Vᵀ with the unit vectors û as the columns of V and T⁻¹ = I/2 + the part of
VᵀV above its diagonal (the compact WY form), so r reflections cost two thin products. With `apply_GS` the vectors are
made orthogonal to each other first, and T = 2·I.

By default equal vectors follow each other in pairs, and two equal reflections are none: such a chain changes nothing,
here to the last bit. With `apply_GS` there is no such start: what is left of the second of two equal vectors is
rounding, which PEFT makes a unit vector of. So it needs `init_weights=False`.

A linear layer runs on the reflected input and its weight is not read, so any packed base will do. A convolution runs
with the weight that is merged; PEFT runs it with one stride, one padding and no dilation, whatever the layer has. PEFT
has linear layers and `nn.Conv2d` without groups; transformers' `Conv1D`, other convolutions and groups are ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, lora
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets
from peftfn.models import layers, layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class HRAConfig(LayeredConfig):
    """HRA's config, with PEFT's fields and defaults: W·H₁ ··· H_r, reflections (https://arxiv.org/abs/2405.17484).

    Attributes:
        r: how many reflections a layer has, each of one vector as long as its inputs. An even number starts as the
            identity; an odd one does not, for its vectors are all random, as in PEFT.
        apply_GS: whether the vectors are made orthogonal to each other first (Gram-Schmidt);
            needs `init_weights=False`.
        init_weights: `True` (equal reflections in pairs, which undo each other), or `False` (random: not the identity).
        bias: which biases to train too: `"none"`, `"all"`, or `"hra_only"`, those of the adapted layers.

    Raises:
        ValueError: `r` is no positive integer, or `bias` is unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.HRAConfig(r=4, target_modules=["query", "value"])
        >>> config.apply_GS
        False
    """

    peft_type: ClassVar[str] = "HRA"

    r: int = dataclasses.field(
        default=8, metadata=described("How many reflections a layer has; better an even number.")
    )
    apply_GS: bool = dataclasses.field(  # noqa: N815  # PEFT's name
        default=False, metadata=described("Whether their vectors are made orthogonal to each other.")
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (pairs of equal reflections, which change nothing), or False (random).")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or hra_only."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        if self.bias not in ("none", "all", "hra_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'hra_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _shape(config: HRAConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.fan_in, r)


SLOTS = {"hra_u": Slot(_shape, rank=1, off=0.0)}


def _rank(config: HRAConfig, path: str) -> int:
    return config.r


def init(config: HRAConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Vectors uniform as torch's layers, equal ones in pairs unless they are to be random, or their number is odd."""
    size, r = layouts.of_site(site).fan_in, config.r
    if config.init_weights and config.apply_GS:
        raise ValueError(
            f"{site.path}: apply_GS has no start that changes nothing: reflections along orthogonal vectors always "
            "do something. Give init_weights=False for a random one."
        )
    drawn = r if r % 2 or not config.init_weights else r // 2
    vectors = (2 * torch.rand(size, drawn, generator=generator) - 1) / drawn**0.5
    return {"hra_u": like_weight(vectors.repeat_interleave(r // drawn, 1), site.stored, dtype)}


# --- what it does -----------------------------------------------------------------------------------------------------


def _unit(vectors: Tensor) -> Tensor:
    """Columns of length 1; a column of zeros, which stands for no reflection, stays."""
    squares = vectors.square().sum(0, keepdim=True)
    return vectors * torch.where(squares > 0, squares, torch.ones_like(squares)).rsqrt()


def _orthogonal(vectors: Tensor) -> Tensor:
    """The columns, each without its parts along those before it, and of length 1 (Gram-Schmidt)."""
    made = _unit(vectors[:, :1])
    for number in range(1, vectors.shape[1]):
        column = vectors[:, number : number + 1]
        made = torch.cat([made, _unit(column - made @ (made.mT @ column))], 1)
    return made


def reflected(config: HRAConfig, vectors: Tensor, x: Tensor, *, transposed: bool) -> Tensor:
    """x·H₁ ··· H_r along the last axis, or x·H_r ··· H₁, in the vectors' dtype, float32 if that is half of it."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))  # there is no solve of halves
    x = x.to(vectors.dtype)
    if config.apply_GS:
        basis = _orthogonal(vectors)
        return x - 2 * (x @ basis) @ basis.mT
    v = _unit(vectors)
    eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    core = cast("Tensor", torch.linalg.solve(0.5 * eye + (v.mT @ v).triu(1), eye))  # torch does not say what it returns
    made = x - (x @ v) @ (core.mT if transposed else core) @ v.mT
    if v.shape[1] % 2:
        return made
    # Pairs of equal vectors reflect to and fro: x itself, with the derivatives of what was computed.
    is_fresh = (vectors[:, ::2] == vectors[:, 1::2]).all()
    return torch.where(is_fresh, x.detach() + (made - made.detach()), made)


def _weight(config: HRAConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    """W·H₁ ··· H_r, (out, in, *kernel)."""
    return reflected(config, leaf["hra_u"], weight.flatten(1), transposed=False).view(weight.shape)


def forward(config: HRAConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes of the reflected input."""
    if site.kind != layers.CONVOLUTION:
        return site(reflected(config, leaf["hra_u"], x, transposed=True).to(x.dtype), *args, **kwargs)
    tensors = site.tensors
    weight = cast("Tensor", tensors["weight"])
    made = _weight(config, leaf, layouts.of_site(site), weight).to(weight.dtype)
    return site.run_with({**tensors, "weight": made}, x, *args, **kwargs)


METHOD = Method(
    config=HRAConfig,
    slots=SLOTS,
    init=init,
    action=builders.reweighted(_weight, forward=forward, kinds=(*builders.MATRICES, layers.CONVOLUTION)),
    targets=Targets(lora.resolve),  # as in PEFT
    stacking=Stacking(_rank, varies=("r", "bias", "init_weights")),
)
