"""MiSS: one block of the update, shared by all of a layer's inputs (https://arxiv.org/abs/2409.15371).

The inputs are cut into runs of r, the last one perhaps shorter, and each of them gets the same update Mᵀ, M being
(r, out): W[:, k·r:(k+1)·r] + Mᵀ. So the layer computes y + (the runs of x, added up)·M, and its weight is not read.
`init_weights` says which of three forms it is, and with it what shape M has:

- "mini": M is (r, mini_r), repeated along the outputs;
- "bat": M is (out/r, r, r), and a block W_ak of r × r becomes W_ak + W_ak·M_a + M_a. It reads the weight in every
  forward, and `miss_dropout` does nothing, as in PEFT.

PEFT has linear layers; transformers' `Conv1D` is ours alone. Older versions of PEFT had it as Bone (`peft_type` BONE);
today's does not read such files, and neither does this library.
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
from peftfn.methods import builders, lora, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class MissConfig(LayeredConfig):
    """MiSS's config, with PEFT's fields and defaults: W[:, k·r:(k+1)·r] + Mᵀ, any k (https://arxiv.org/abs/2409.15371).

    Attributes:
        r: how many inputs a run has, at most all of a layer's; M is (r, out).
        miss_dropout: the probability in training that a number of x is dropped; of no effect with `"bat"`, as in PEFT.
        mini_r: with `init_weights="mini"`: M is (r, mini_r), repeated along the outputs, which it has to divide.
        init_weights: `True` (zeros) or `False` (random: not the identity) of the form above, or another form, also of
            zeros: `"mini"`, or `"bat"`, M of (out/r, r, r), which is multiplied by the weight too.
        bias: which biases to train too: `"none"`, `"all"`, or `"MiSS_only"`, those of the adapted layers.

    Raises:
        ValueError: `r` or `mini_r` is no positive integer, `miss_dropout` no probability below 1, or `init_weights` or
            `bias` unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.MissConfig(r=16, target_modules=["query", "value"], init_weights="mini", mini_r=8)
        >>> config.r, config.mini_r
        (16, 8)
    """

    peft_type: ClassVar[str] = "MISS"

    r: int = dataclasses.field(default=64, metadata=described("How many inputs share an update; at most all of them."))
    miss_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Dropout on what the update is given in training.")
    )
    mini_r: int = dataclasses.field(
        default=1, metadata=described("With init_weights='mini': how many outputs have an update of their own.")
    )
    init_weights: bool | str = dataclasses.field(
        default=True, metadata=described("True (zeros), False (not the identity), or one of the forms bat and mini.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or MiSS_only."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("mini_r", self.mini_r)
        if not 0 <= self.miss_dropout < 1:
            raise ValueError(f"miss_dropout={self.miss_dropout!r}; expected a probability of at least 0 and below 1.")
        if isinstance(self.init_weights, str) and self.init_weights not in ("bat", "mini"):
            raise ValueError(f"init_weights={self.init_weights!r}; expected True, False, 'bat' or 'mini'.")
        if self.bias not in ("none", "all", "MiSS_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'MiSS_only'.")


def _shape(config: MissConfig, weight: WeightShape, r: int) -> Shape:
    if config.init_weights == "bat":
        return (weight.outputs // config.r, config.r, config.r)
    return (config.r, config.mini_r if config.init_weights == "mini" else weight.outputs)


SLOTS = {"miss_block": Slot(_shape, off=0.0)}


def init(config: MissConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Zeros, or with init_weights=False numbers uniform as torch's layers."""
    weight = layouts.of_site(site)
    _refuse_uneven(config, weight, site.path)
    ((name, shape),) = slots.shapes(SLOTS, config, weight, 0).items()
    made = torch.zeros(shape)
    if config.init_weights is False:
        made = (2 * torch.rand(shape, generator=generator) - 1) / weight.outputs**0.5
    return {name: like_weight(made, site.stored, dtype)}


def _refuse_uneven(config: MissConfig, weight: WeightShape, path: str) -> None:
    r, of, leave_out = config.r, f"{weight.inputs} inputs and {weight.outputs} outputs", f"exclude_modules=[{path!r}]"
    if r > weight.inputs:
        raise ValueError(f"{path}: r={r}, and the layer has {of}; expected at most so many inputs. Or {leave_out}.")
    if config.init_weights == "bat" and (weight.inputs % r or weight.outputs % r):
        raise ValueError(f"{path}: init_weights='bat' needs blocks of r={r} that divide its {of}. Or {leave_out}.")
    if config.init_weights == "mini" and weight.outputs % config.mini_r:
        raise ValueError(f"{path}: mini_r={config.mini_r} does not divide its {of}. Or {leave_out}.")


# --- what it does -----------------------------------------------------------------------------------------------------


def _added(block: Tensor, weight: Tensor) -> Tensor:
    """What is added to the weight, (out, in)."""
    outputs, inputs = weight.shape
    if block.dim() == 2:
        return _along_outputs(block, outputs).mT.repeat(1, -(-inputs // block.shape[0]))[:, :inputs]
    r = block.shape[-1]
    cut = weight.reshape(outputs // r, r, -1, r).to(block.dtype)  # (a, rows, k, columns)
    return (torch.einsum("aikj,ajl->aikl", cut, block) + block.unsqueeze(2)).reshape(weight.shape)


def _weight(config: MissConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    return weight + _added(leaf["miss_block"], weight)


def _along_outputs(block: Tensor, outputs: int) -> Tensor:
    """M, (r, out), of a block that may be repeated along the outputs."""
    return block.repeat(1, outputs // block.shape[1])


def forward(config: MissConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y + (the runs of x, added up)·M; with "bat", y + x times the change of the weight."""
    block, shape, y = leaf["miss_block"], layouts.of_site(site), site(x, *args, **kwargs)
    if block.dim() == 3:
        change = _added(block, layouts.seen(site.kind, site.weight))
        return builders.added(site, y, change, x, *args, **kwargs)
    x = F.pad(x.to(block.dtype), (0, -x.shape[-1] % block.shape[0]))
    if config.miss_dropout:
        x = F.dropout(x, config.miss_dropout, training=site.training)
    runs = x.reshape(*x.shape[:-1], -1, block.shape[0]).sum(-2)
    return (y + runs @ _along_outputs(block, shape.outputs)).to(y.dtype)


METHOD = Method(
    config=MissConfig,
    slots=SLOTS,
    init=init,
    action=builders.reweighted(_weight, forward=forward, kinds=builders.MATRICES),
    targets=Targets(lora.resolve),  # as in PEFT
    stacking=Stacking(varies=("bias", "init_weights", "mini_r")),  # shapes say which form it is
)
