"""BOFT: diag(s)·W·Rᵀ, R a rotation, a product of butterfly factors (https://arxiv.org/abs/2311.06243).

R = B_{m-1} ··· B_1·B_0, m = `boft_n_butterfly_factor`. Each factor rotates blocks of b inputs by (I - Q)(I + Q)⁻¹, Q
the skew part of what is trained; a block of factor i takes its inputs from all over a run of b·2ⁱ, every other half
block of it, so that m factors mix b·2ᵐ⁻¹ inputs with each other. s scales each output, without the bias.

A linear layer runs on the rotated input and its weight is not read, so any packed base will do. A convolution runs with
the weight that is merged; PEFT runs it with one stride, one padding and no dilation, whatever the layer has.

PEFT has more than one factor only where it can build its CUDA extension, and makes one elsewhere whatever is asked. The
factors of a file count, then: one of one factor is read as that, which is what it was when it was trained. PEFT has
linear layers and `nn.Conv2d` without groups; transformers' `Conv1D`, other convolutions and groups are ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, lora, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets
from peftfn.models import layers, layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class BOFTConfig(LayeredConfig):
    """BOFT's config, with PEFT's fields and defaults: diag(s)·W·Rᵀ, R of butterfly factors (https://arxiv.org/abs/2311.06243).

    Of `boft_block_size` and `boft_block_num` one is 0: it follows from the other, and from how many inputs a layer has.

    Attributes:
        boft_block_size: b, how many inputs a block rotates; has to divide a layer's inputs.
        boft_block_num: how many blocks a layer has, with `boft_block_size=0`.
        boft_n_butterfly_factor: m, how many rotations follow each other: together they mix b·2ᵐ⁻¹ inputs, which has to
            divide a layer's inputs. PEFT makes one, whatever it is, where its CUDA extension is missing.
        boft_dropout: the share of the blocks of one factor, drawn anew in each step of training, that do nothing.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        bias: which biases to train too: `"none"`, `"all"`, or `"boft_only"`, those of the adapted layers.
        init_weights: `True` (no rotation, s = 1), or `False` (random ones: not the identity).

    Raises:
        ValueError: not one of the two sizes is 0, the other or `boft_n_butterfly_factor` is no positive integer,
            `boft_dropout` is no share below 1, or `bias` is unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["query", "value"])
        >>> config.boft_block_num
        0
    """

    peft_type: ClassVar[str] = "BOFT"

    boft_block_size: int = dataclasses.field(
        default=4, metadata=described("Inputs that a block rotates; 0 with boft_block_num.")
    )
    boft_block_num: int = dataclasses.field(
        default=0, metadata=described("How many blocks a layer has, where boft_block_size is 0.")
    )
    boft_n_butterfly_factor: int = dataclasses.field(
        default=1, metadata=described("How many rotations follow each other; each doubles what is mixed.")
    )
    boft_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Share of a factor's blocks that do nothing in each step of training.")
    )
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or boft_only."))
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (no rotation, no scaling), or False (random ones).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        if (size == 0) == (number == 0):
            raise ValueError(
                f"boft_block_size={size} and boft_block_num={number}; expected one of them to be 0: it follows from "
                "the other, and from how many inputs a layer has."
            )
        check_positive("boft_block_num" if number else "boft_block_size", number or size)
        check_positive("boft_n_butterfly_factor", self.boft_n_butterfly_factor)
        if not 0 <= self.boft_dropout < 1:
            raise ValueError(f"boft_dropout={self.boft_dropout!r}; expected a share of at least 0 and below 1.")
        if self.bias not in ("none", "all", "boft_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'boft_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _blocks(config: BOFTConfig, weight: WeightShape) -> tuple[int, int]:
    """How many blocks there are, and how many inputs each of them has."""
    size = weight.fan_in
    block = config.boft_block_size or size // config.boft_block_num
    return size // max(block, 1), block


def _rotations(config: BOFTConfig, weight: WeightShape, r: int) -> Shape:
    blocks, block = _blocks(config, weight)
    return (config.boft_n_butterfly_factor, blocks, block, block)


def _one_factor(config: BOFTConfig, weight: WeightShape, r: int) -> Shape:
    return (1, *_rotations(config, weight, r)[1:])


def _scale(config: BOFTConfig, weight: WeightShape, r: int) -> Shape:
    return (1, weight.outputs) if weight.kernel else (weight.outputs, 1)


SLOTS = {
    "boft_R": Slot(_rotations, off=0.0, also=_one_factor),
    "boft_s": Slot(_scale, off=1.0),
}


def init(config: BOFTConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """No rotation and no scaling, or random ones."""
    weight = layouts.of_site(site)
    _refuse_uneven(config, weight, site.path)
    rotations, scale = slots.shapes(SLOTS, config, weight, 0).values()
    made = {"boft_R": torch.zeros(rotations), "boft_s": torch.ones(scale)}
    if not config.init_weights:
        made = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in made.items()}
    return {name: like_weight(one, site.stored, dtype) for name, one in made.items()}


def _refuse_uneven(config: BOFTConfig, weight: WeightShape, path: str) -> None:
    """A `ValueError` where the layer's inputs are not a whole number of blocks, or of runs that a factor mixes."""
    size, (blocks, block), factors = weight.fan_in, _blocks(config, weight), config.boft_n_butterfly_factor
    field = "boft_block_num" if config.boft_block_num else "boft_block_size"
    leave_out = f"Choose another, or exclude_modules=[{path!r}]."
    if blocks * block != size or (config.boft_block_num or blocks) != blocks:
        raise ValueError(
            f"{path}: {field}={getattr(config, field)} does not divide the {size} inputs of each output. {leave_out}"
        )
    run = block * 2 ** (factors - 1)
    if factors > 1 and (block % 2 or size % run):
        raise ValueError(
            f"{path}: boft_n_butterfly_factor={factors} mixes runs of {run} inputs, two half blocks of {block} at a "
            f"time; expected an even block, and runs that divide the {size} inputs of each output. {leave_out}"
        )


# --- what it does -----------------------------------------------------------------------------------------------------


def rotation(trained: Tensor) -> Tensor:
    """The orthogonal blocks (m, blocks, b, b) of the skew parts of what is trained: (I - Q)(I + Q)⁻¹."""
    trained = trained.to(torch.promote_types(trained.dtype, torch.float32))  # there is no solve of halves
    skew = 0.5 * (trained - trained.mT)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    return cast("Tensor", torch.linalg.solve(eye + skew, eye - skew, left=False))  # torch does not say what it returns


def _with_dropout(config: BOFTConfig, rotations: Tensor) -> Tensor:
    """The rotations, of which a share of the blocks of one factor, drawn anew at each call, are identities."""
    factors, blocks = rotations.shape[:2]
    gone = torch.randperm(blocks, device=rotations.device) < int(config.boft_dropout * blocks)
    which = torch.arange(factors, device=rotations.device) == torch.randint(factors, (), device=rotations.device)
    eye = torch.eye(rotations.shape[-1], dtype=rotations.dtype, device=rotations.device)
    return torch.where((which[:, None] & gone)[..., None, None], eye, rotations)


def _side_by_side(x: Tensor, factor: int, block: int, there: bool) -> Tensor:
    """The last axis in the order of a factor's blocks, or from it back: in each run, every other half block first."""
    if factor == 0:
        return x
    pairs = 2**factor
    shape = (pairs, 2) if there else (2, pairs)
    runs = x.reshape(*x.shape[:-1], -1, *shape, block // 2)
    return runs.transpose(-3, -2).reshape(x.shape)


def _turned(rotations: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """x R, or x Rᵀ, along the last axis."""
    block = rotations.shape[-1]
    numbers = range(rotations.shape[0])
    x = x.to(rotations.dtype)
    for number in numbers if transposed else reversed(numbers):
        blocks = rotations[number].mT if transposed else rotations[number]
        # P has a one at (i, order[i]), so that x P puts x back from that order, and Pᵀ puts it in order.
        placed = _side_by_side(x, number, block, there=False)
        split = placed.reshape(*x.shape[:-1], -1, block)  # (..., blocks, b)
        x = _side_by_side(torch.einsum("...nk,nkj->...nj", split, blocks).flatten(-2), number, block, there=True)
    return x


def _weight(config: BOFTConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    """diag(s)·W·Rᵀ, (out, in, *kernel)."""
    return _scaled(rotation(leaf["boft_R"]), leaf, weight)


def _scaled(rotations: Tensor, leaf: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    turned = _turned(rotations, weight.flatten(1), True)
    return (leaf["boft_s"].view(-1, 1) * turned).view(weight.shape)


def forward(config: BOFTConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes of the rotated input, with all but its bias scaled."""
    rotations = rotation(leaf["boft_R"])
    if config.boft_dropout and site.training:
        rotations = _with_dropout(config, rotations)
    if site.kind == layers.CONVOLUTION:
        tensors = site.tensors
        weight = cast("Tensor", tensors["weight"])
        return site.run_with(
            {**tensors, "weight": _scaled(rotations, leaf, weight).to(weight.dtype)}, x, *args, **kwargs
        )
    y, bias = site(_turned(rotations, x, False).to(x.dtype), *args, **kwargs), site.bias
    own = y if bias is None else y - bias
    return (y + (leaf["boft_s"].flatten() - 1) * own).to(y.dtype)


METHOD = Method(
    config=BOFTConfig,
    slots=SLOTS,
    init=init,
    action=builders.reweighted(_weight, forward=forward, kinds=(*builders.MATRICES, layers.CONVOLUTION)),
    targets=Targets(lora.resolve),  # as in PEFT
    stacking=Stacking(varies=("bias", "init_weights")),
)
