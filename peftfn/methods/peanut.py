"""PEANuT: the weight's change is what a small network makes of the weight itself (https://arxiv.org/abs/2410.01870).

ΔWᵀ = s·f(Wᵀ·Aᵀ)·Bᵀ, where f is an activation, and with `depth` d also d layers (r, r) with activations, and d more on
the way back, each of which has the output of its counterpart added. The weight is read in every forward, and a packed
one is unpacked for it. Of two active adapters the second sees the first one's weight, as if that had been merged; PEFT
gives both the base's.

PEFT has linear layers; transformers' `Conv1D` is ours alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets
from peftfn.models import layouts, targets
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

MOST = 32
"""Layers on each side that a network may have; the paper has up to 6."""


@dataclasses.dataclass(frozen=True)
class PeanutConfig(LayeredConfig):
    """PEANuT's config, with PEFT's fields and defaults: Wᵀ + s·f(Wᵀ·Aᵀ)·Bᵀ (https://arxiv.org/abs/2410.01870).

    Attributes:
        r: the width of the network: A is (r, out) and B (out, r).
        depth: how many layers (r, r) it has on the way in, and as many on the way back; at most 32.
        act_fn: the activation f, by transformers' name for it.
        scaling: s.
        init_weights: `True` (B = 0), or `False` (random: not the identity).

    Raises:
        ValueError: `r` is no positive integer, or `depth` not from 0 to 32. (`act_fn` is looked up by `peftfn.init`.)

    Example:
        >>> import peftfn as pf
        >>> config = pf.PeanutConfig(r=8, depth=2, act_fn="silu", target_modules=["query", "value"])
        >>> config.depth
        2
    """

    peft_type: ClassVar[str] = "PEANUT"

    r: int = dataclasses.field(default=32, metadata=described("Width of the network."))
    depth: int = dataclasses.field(default=0, metadata=described("Layers on each side, between the two factors."))
    act_fn: str = dataclasses.field(default="relu", metadata=described("Activation, by transformers' name for it."))
    scaling: float = dataclasses.field(default=1.0, metadata=described("Factor of the change."))
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (B = 0), or False (not the identity).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        if not 0 <= self.depth <= MOST:
            raise ValueError(f"depth={self.depth!r}; expected a number from 0 to {MOST}.")


_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("silu", "swish"), F.silu),
    "relu": F.relu,
    "gelu": F.gelu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Activations by transformers' names, asked first: Dynamo cannot trace transformers' own table."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that transformers has under this name.

    Raises:
        ValueError: it has none.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    from transformers.activations import ACT2FN  # slow to import

    known = cast("Mapping[str, Any]", ACT2FN)
    if name not in known:
        raise ValueError(f"act_fn={name!r}; expected one of {', '.join(sorted(known))}.")
    return cast("Callable[[Tensor], Tensor]", known[name])


def resolve(model: nn.Module, config: PeanutConfig) -> PeanutConfig:
    """The config with LoRA's default targets, as in PEFT."""
    activation(config.act_fn)
    return targets.resolved(model, config, TARGETS)


# --- its tensors ------------------------------------------------------------------------------------------------------


def _a(config: PeanutConfig, weight: WeightShape, r: int) -> Shape:
    return (config.r, weight.outputs)


def _b(config: PeanutConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs, config.r)


def _inner(side: str, number: int) -> tuple[str, Slot]:
    def shape(config: PeanutConfig, weight: WeightShape, r: int) -> Shape | None:
        return (config.r, config.r) if number < config.depth else None

    return f"peanut_{side}_{number}", Slot(shape, f"peanut_{side}s.{number}.weight")


SLOTS = {
    "peanut_A": Slot(_a, "peanut_A.weight"),
    "peanut_B": Slot(_b, "peanut_B.weight"),
    **dict(_inner(side, number) for side in ("encoder", "decoder") for number in range(MOST)),
    "scaling": Slot(trained=False, off=0.0),
}


def init(config: PeanutConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Uniform numbers, as torch's layers have them, and B zero."""
    shapes = slots.shapes(SLOTS, config, layouts.of_site(site), 0)

    def drawn(name: str, shape: Shape) -> Tensor:
        if name == "peanut_B" and config.init_weights:
            return torch.zeros(shape)
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])

    return {name: like_weight(drawn(name, shape), site.stored, dtype) for name, shape in shapes.items()}


def constants(config: PeanutConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling, a 0-d tensor."""
    return {"scaling": constant(config.scaling, leaf)}


# --- what it does -----------------------------------------------------------------------------------------------------


def delta(config: PeanutConfig, leaf: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """ΔW, (out, in), of the weight W."""
    act, a = activation(config.act_fn), leaf["peanut_A"]
    hidden = act(weight.mT.to(a.dtype) @ a.mT)  # (in, r)
    before: list[Tensor] = []
    for number in range(config.depth):
        before.append(hidden)
        hidden = act(hidden @ leaf[f"peanut_encoder_{number}"].mT)
    for number in range(config.depth):
        hidden = act(hidden @ leaf[f"peanut_decoder_{number}"].mT) + before.pop()
    return leaf["scaling"] * (leaf["peanut_B"] @ hidden.mT)


def _weight(config: PeanutConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    return weight + delta(config, leaf, weight)


def forward(
    config: PeanutConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """site(x), plus what the layer gives with ΔW for its weight and no bias."""
    y = site(x, *args, **kwargs)
    return builders.added(site, y, delta(config, leaf, layouts.seen(site.kind, site.weight)), x, *args, **kwargs)


METHOD = Method(
    config=PeanutConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.reweighted(_weight, forward=forward, kinds=builders.MATRICES),
    targets=Targets(resolve),
    stacking=Stacking(varies=("scaling", "init_weights")),
)
