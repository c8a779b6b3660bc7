"""DEFT: (I - Q·Eᵀ)·W + s·Q·R, a subspace of the outputs emptied and filled anew (https://arxiv.org/abs/2509.22793).

P (out, r) is trained, and R (r, in). By "relu" Q is P and E = relu(P); by "qr" both are the orthonormal columns of
P = QR, so that Q·Eᵀ is a projection. Scaling s is alpha / r, or 1. R starts as Eᵀ·W / s, which changes nothing: a
layer's output is site(x) + Q·(s·R - Eᵀ·W)·x, whose second term is exactly 0 in a fresh adapter where s is 1 or another
power of two. With `para` there is no R, and no start that changes nothing.

The weight is read in every forward, and a packed one is unpacked for it. r is at most the number of outputs. Two
adapters that are active together follow each other: the second takes its subspace out of what the first one made. PEFT
adds up what each of them makes of the base's weight. It computes in float32, whatever the dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, lora
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class DeftConfig(LayeredConfig):
    """DEFT's config, with PEFT's fields and defaults: (I - Q·Eᵀ)·W + s·Q·R (https://arxiv.org/abs/2509.22793).

    Attributes:
        r: how many directions of the outputs are taken out, and filled: P is (out, r) and R (r, in).
        decomposition_method: how Q and E follow from P: `"relu"` (Q = P, E = relu(P)), or `"qr"` (both are orthonormal
            columns, so that what is taken out is a projection).
        init_scale: with `init_weights=False` R begins with a deviation of 0.02 times this.
        alpha: s is alpha / r; `None` is s = 1.
        para: whether a subspace is taken out and none put in (PaRa): there is no R, and no start that changes nothing.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        deft_dropout: the probability in training that a number of R's input is dropped.
        init_weights: `True` (s·R = Eᵀ·W: what P takes out R puts back), or `False` (R random: not the identity).
        bias: which biases to train too: `"none"`, `"all"`, or `"deft_only"`, those of the adapted layers.

    Raises:
        ValueError: `r` is no positive integer, `deft_dropout` no probability below 1, or `decomposition_method` or
            `bias` unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.DeftConfig(r=4, decomposition_method="qr", target_modules=["query", "value"])
        >>> config.para
        False
    """

    peft_type: ClassVar[str] = "DEFT"

    r: int = dataclasses.field(default=8, metadata=described("Rank of what is taken out, and of what is put in."))
    decomposition_method: str = dataclasses.field(
        default="relu", metadata=described("How the subspace follows from P: relu, or qr (orthogonal).")
    )
    init_scale: float = dataclasses.field(
        default=1.0, metadata=described("With init_weights=False: R begins with a deviation of 0.02 times this.")
    )
    alpha: float | None = dataclasses.field(
        default=None, metadata=described("What is put in is scaled by alpha / r; without it, not at all.")
    )
    para: bool = dataclasses.field(default=False, metadata=described("Whether a subspace is only taken out (PaRa)."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    deft_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input of R in training."))
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (R puts in what P takes out), or False (R random).")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or deft_only."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        if self.decomposition_method not in ("relu", "qr"):
            raise ValueError(f"decomposition_method={self.decomposition_method!r}; expected 'relu' or 'qr'.")
        if not 0 <= self.deft_dropout < 1:
            raise ValueError(f"deft_dropout={self.deft_dropout!r}; expected a probability of at least 0 and below 1.")
        if self.bias not in ("none", "all", "deft_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'deft_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _p(config: DeftConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs, min(config.r, weight.outputs))


def _r(config: DeftConfig, weight: WeightShape, r: int) -> Shape | None:
    return None if config.para else (min(config.r, weight.outputs), weight.inputs)


SLOTS = {
    "deft_P": Slot(_p, off=0.0),
    "deft_R": Slot(_r, off=0.0),
    "scaling": Slot(trained=False, off=0.0),
    "active": Slot(trained=False, off=0.0),
}


def init(config: DeftConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """P normal, and R what P takes out of the weight, or normal too."""
    weight = layouts.of_site(site)
    shape, put_in = _p(config, weight, 0), _r(config, weight, 0)
    leaf = {"deft_P": like_weight(0.02 * torch.randn(shape, generator=generator), site.stored, dtype)}
    if put_in is None:
        return leaf
    if not config.init_weights:
        drawn = 0.02 * config.init_scale * torch.randn(put_in, generator=generator)
        return {**leaf, "deft_R": like_weight(drawn, site.stored, dtype)}
    if site.stored.is_meta:
        raise ValueError(
            f"{site.path}: DEFT starts from what P takes out of the weight, and the model is on the meta device; load "
            "it with its weights first."
        )
    whole = {**leaf, **constants(config, path, leaf)}
    taken = _taken(config, whole, layouts.seen(site.kind, site.weight.detach()))[1]
    return {**leaf, "deft_R": like_weight(taken / whole["scaling"], site.stored, dtype)}


def constants(config: DeftConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling and `active`, 0-d tensors.

    `active` is 1, and 0 at a site that an adapter of a stack does not have: P is zeros there, and "qr" makes a subspace
    of zeros too.
    """
    scaling = config.alpha / leaf["deft_P"].shape[1] if config.alpha else 1.0
    return {"scaling": constant(scaling, leaf), "active": constant(1.0, leaf)}


# --- what it does -----------------------------------------------------------------------------------------------------


def _taken(config: DeftConfig, leaf: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Q (out, r), and Eᵀ·W (r, in) of a weight (out, in)."""
    p = leaf["deft_P"]
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    if config.decomposition_method == "relu":
        return p, p.relu().mT @ weight.to(p.dtype)
    # Where the method is off, of any matrix that has such columns: zeros have no derivative.
    p = torch.where(leaf["active"] > 0, p, torch.eye(*p.shape, dtype=p.dtype, device=p.device))
    q = cast("Tensor", torch.linalg.qr(p).Q)  # torch does not say what it returns
    return q, q.mT @ weight.to(p.dtype)


def _change(leaf: Mapping[str, Tensor], taken: Tensor) -> Tensor:
    """s·R - Eᵀ·W, (r, in)."""
    return leaf["active"] * (leaf["scaling"] * leaf["deft_R"] - taken if "deft_R" in leaf else -taken)


def _weight(config: DeftConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    q, taken = _taken(config, leaf, weight)
    return weight + q @ _change(leaf, taken)


def forward(config: DeftConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x) + Q·(s·R - Eᵀ·W)·x; in training R acts on x with dropout."""
    y = site(x, *args, **kwargs)
    q, taken = _taken(config, leaf, layouts.seen(site.kind, site.weight))
    x = x.to(q.dtype)
    narrow = F.linear(x, _change(leaf, taken))
    if config.deft_dropout and site.training and "deft_R" in leaf:
        put_in = leaf["active"] * leaf["scaling"] * leaf["deft_R"]
        narrow = narrow + F.linear(F.dropout(x, config.deft_dropout, training=True) - x, put_in.to(q.dtype))
    return (y + F.linear(narrow, q)).to(y.dtype)


METHOD = Method(
    config=DeftConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.reweighted(_weight, forward=forward, kinds=builders.MATRICES),
    targets=Targets(lora.resolve),  # as in PEFT
    stacking=Stacking(varies=("alpha", "init_scale", "init_weights", "bias")),
)
