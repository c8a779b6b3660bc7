"""OFT: W·Rᵀ, R a rotation in blocks along the inputs (https://arxiv.org/abs/2306.07280, https://arxiv.org/abs/2506.19847).

Each block of R is made of a skew matrix Q, whose upper triangle is trained: as (I - Q)(I + Q)⁻¹, or as PEFT's sum of
powers I + 2Q + 2Q² + ... + Qⁿ⁻¹ of `num_cayley_neumann_terms` n (`use_cayley_neumann`, its default), a rotation only
near Q = 0. To first order they are I - 2Q and I + 2Q: with the other setting, trained tensors rotate the other way.

A linear layer runs on the rotated input and its weight is not read, so any packed base will do. An embedding's outputs
are rotated. A convolution runs with W·Rᵀ, R acting on inputs and kernel together; with a kernel of more than one
element PEFT rotates patches of the input and adds them up where they overlap, which is another function, not the
identity at the start, and not what it merges. The merged weight is the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets
from peftfn.models import layers, layouts, targets
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class OFTConfig(LayeredConfig):
    """OFT's config, with PEFT's fields and defaults: W·Rᵀ, R a rotation in blocks (https://arxiv.org/abs/2306.07280).

    Where the size that is given does not divide a layer's inputs, the nearest one that does is taken, as in PEFT; the
    shape of the layer's tensor, (blocks, b(b-1)/2), says which.

    Attributes:
        r: how many blocks a layer has, with `oft_block_size=0`.
        oft_block_size: how many inputs a block rotates, with `r=0`.
        module_dropout: the share of a layer's blocks that do nothing in a step of training, drawn anew in each.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        bias: which biases to train too: `"none"`, `"all"`, or `"oft_only"`, those of the adapted layers.
        init_weights: `True` (no rotation), or `False` (a random one).
        coft: whether rotations are kept near the identity, within `eps`.
        eps: how far from it: the norm of Q of all blocks together.
        block_share: whether all blocks of a layer have the same tensor.
        use_cayley_neumann: whether R is a sum of powers of Q, near a rotation, and not exact.
        num_cayley_neumann_terms: how many terms that sum has.

    Raises:
        ValueError: not one of `r` and `oft_block_size` is 0, the other or `num_cayley_neumann_terms` is no positive
            integer, `module_dropout` is no probability below 1, `eps` is not positive, or `bias` is unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.OFTConfig(oft_block_size=16, target_modules=["query", "value"])
        >>> config.r, config.use_cayley_neumann
        (0, True)
    """

    peft_type: ClassVar[str] = "OFT"

    r: int = dataclasses.field(default=0, metadata=described("How many blocks a layer has, where oft_block_size is 0."))
    oft_block_size: int = dataclasses.field(default=32, metadata=described("Inputs that a block rotates; 0 with r."))
    module_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Share of the blocks that do nothing in each step of training.")
    )
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or oft_only."))
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (no rotation), or False (a random one).")
    )
    coft: bool = dataclasses.field(default=False, metadata=described("Whether rotations are kept within eps."))
    eps: float = dataclasses.field(default=6e-5, metadata=described("How far they may go, with coft."))
    block_share: bool = dataclasses.field(default=False, metadata=described("Whether all blocks of a layer are one."))
    use_cayley_neumann: bool = dataclasses.field(
        default=True, metadata=described("Whether rotations are sums of powers, and not exact.")
    )
    num_cayley_neumann_terms: int = dataclasses.field(default=5, metadata=described("How many powers those have."))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"r={self.r} and oft_block_size={self.oft_block_size}; expected one of them to be 0: it follows from "
                "the other, and from how many inputs a layer has."
            )
        check_positive("r" if self.r else "oft_block_size", self.r or self.oft_block_size)
        check_positive("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        if not 0 <= self.module_dropout < 1:
            raise ValueError(f"module_dropout={self.module_dropout!r}; expected a probability of at least 0, below 1.")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps!r}; expected a number above 0.")
        if self.bias not in ("none", "all", "oft_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'oft_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _rotated(weight: WeightShape) -> int:
    """How many numbers are rotated: those that go in, or of an embedding, that come out."""
    return weight.outputs if weight.kind == layers.EMBEDDING else weight.fan_in


def _divisor(wanted: int, size: int) -> int:
    """The nearest number that divides the size, the smaller one of two."""
    if wanted >= size:
        return size
    above = next(number for number in range(wanted, size + 1) if size % number == 0)
    below = next(number for number in range(wanted, 0, -1) if size % number == 0)
    return below if wanted - below <= above - wanted else above


def _block(config: OFTConfig, weight: WeightShape) -> int:
    size = _rotated(weight)
    return size // _divisor(config.r, size) if config.r else _divisor(config.oft_block_size, size)


def _shape(config: OFTConfig, weight: WeightShape, r: int) -> Shape:
    block = _block(config, weight)
    return (1 if config.block_share else _rotated(weight) // block, block * (block - 1) // 2)


def _on_layer(config: OFTConfig, weight: WeightShape, r: int) -> Shape | None:
    return None if weight.kind == layers.EMBEDDING else _shape(config, weight, r)


def _on_embedding(config: OFTConfig, weight: WeightShape, r: int) -> Shape | None:
    return _shape(config, weight, r) if weight.kind == layers.EMBEDDING else None


SLOTS = {
    "oft_R": Slot(_on_layer, "oft_R.weight", off=0.0),
    "oft_embedding_R": Slot(_on_embedding, "oft_embedding_R.weight", off=0.0),
}


def resolve(model: nn.Module, config: OFTConfig) -> OFTConfig:
    """The config with LoRA's default targets, as in PEFT, and the version of PEFT whose sum of powers is meant."""
    version = config.peft_version or ("0.18.0" if config.use_cayley_neumann else None)
    return dataclasses.replace(targets.resolved(model, config, TARGETS), peft_version=version)


def init(config: OFTConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Zeros, which rotate nothing, or random numbers."""
    weight = layouts.of_site(site)
    ((name, shape),) = slots.shapes(SLOTS, config, weight, 0).items()
    made = torch.zeros(shape) if config.init_weights else 0.1 * torch.randn(shape, generator=generator)
    return {name: like_weight(made, site.stored, dtype)}


# --- what it does -----------------------------------------------------------------------------------------------------


def rotation(config: OFTConfig, triangles: Tensor) -> Tensor:
    """The blocks of R, (blocks, b, b), of the upper triangles of skew matrices, (blocks, b(b-1)/2), by row."""
    block = (1 + round((1 + 8 * triangles.shape[-1]) ** 0.5)) // 2
    rows, columns = torch.triu_indices(block, block, 1, device=triangles.device)
    flat = triangles.new_zeros(triangles.shape[0], block * block).index_copy(1, rows * block + columns, triangles)
    upper = flat.view(-1, block, block)
    skew = upper - upper.mT
    if config.coft:
        skew = skew + (_constrained(skew.detach(), config.eps) - skew.detach())  # gradients ignore it, as in PEFT
    eye = torch.eye(block, dtype=skew.dtype, device=skew.device).expand_as(skew)
    if config.use_cayley_neumann:
        return series(skew, eye, config.num_cayley_neumann_terms)
    return cast("Tensor", torch.linalg.solve(eye + skew, eye - skew, left=False))  # torch does not say what it returns


def series(skew: Tensor, eye: Tensor, terms: int) -> Tensor:
    """PEFT's sum: I + 2Q + 2Q² + ... with 1 for the last power, which is at least the third; I + 2Q of two terms."""
    if terms < 3:
        return eye + (terms - 1) * 2 * skew
    power = skew @ skew
    total = eye + 2 * skew + 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        total = total + 2 * power
    return total + power @ skew


def _constrained(skew: Tensor, eps: float) -> Tensor:
    """Each block, scaled down to a norm of eps / √blocks where it has a larger one."""
    most = eps / skew.shape[0] ** 0.5
    norms = skew.square().sum((1, 2), keepdim=True).sqrt()
    return torch.where(norms <= most, skew, most * skew / norms.clamp(min=1e-30))


def _turned(config: OFTConfig, leaf: Mapping[str, Tensor], x: Tensor, transposed: bool, dropout: float = 0.0) -> Tensor:
    """x R, or x Rᵀ, along the last axis."""
    (triangles,) = leaf.values()
    blocks = rotation(config, triangles)
    if dropout and blocks.shape[0] > 1:
        gone = torch.randperm(blocks.shape[0], device=x.device) < int(dropout * blocks.shape[0])
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        blocks = torch.where(gone.view(-1, 1, 1), eye, blocks)
    split = x.to(blocks.dtype).view(*x.shape[:-1], -1, blocks.shape[-1])  # (..., blocks, b)
    blocks = (blocks.mT if transposed else blocks).expand(split.shape[-2], -1, -1)
    return torch.einsum("...nk,nkj->...nj", split, blocks).flatten(-2)


def _weight(config: OFTConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    """W·Rᵀ, (out, in, *kernel); of an embedding Rᵀ·W, (dim, tokens)."""
    if shape.kind == layers.EMBEDDING:
        return _turned(config, leaf, weight.mT, False).mT
    return _turned(config, leaf, weight.flatten(1), True).view(weight.shape)


def forward(config: OFTConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes of the rotated input; of an embedding, what it looks up, rotated."""
    dropout = config.module_dropout if site.training else 0.0
    if site.kind == layers.EMBEDDING:
        y = site(x, *args, **kwargs)
        return _turned(config, leaf, y, False, dropout).to(y.dtype)
    if site.kind != layers.CONVOLUTION:
        return site(_turned(config, leaf, x, False, dropout).to(x.dtype), *args, **kwargs)
    tensors = site.tensors
    weight = cast("Tensor", tensors["weight"])
    turned = _turned(config, leaf, weight.flatten(1), True, dropout).view(weight.shape).to(weight.dtype)
    return site.run_with({**tensors, "weight": turned}, x, *args, **kwargs)


# --- its files --------------------------------------------------------------------------------------------------------

_SINCE = (0, 18)  # the version of PEFT that has this sum of powers; before, the last one counted twice


def check_file(config: OFTConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file of a version of PEFT with which the same tensors are another rotation."""
    version = tuple(int(part) for part in re.findall(r"\d+", config.peft_version or "0.17")[:2])
    if config.use_cayley_neumann and version < _SINCE:
        raise ValueError(
            f"peft_version={config.peft_version!r} and use_cayley_neumann, which was another sum before 0.18: these "
            "tensors mean something else (write peft_version='0.18.0' there to read them as PEFT does now)"
        )


METHOD = Method(
    config=OFTConfig,
    slots=SLOTS,
    init=init,
    action=builders.reweighted(_weight, forward=forward),
    targets=Targets(resolve),
    files=Files(check_file),
    stacking=Stacking(varies=("bias", "init_weights")),
)
