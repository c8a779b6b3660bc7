"""LoKr: W + s·(W₁ ⊗ W₂), each factor whole or of low rank (LyCORIS, https://arxiv.org/abs/2309.14859, section 3.2).

W₁ is (o₁, i₁) and W₂ (o₂, i₂, *kernel) with out = o₁·o₂ and in = i₁·i₂, as near to each other as the dimensions let
them be. Scaling s is alpha / r. Where r is less than half of W₂'s larger side, W₂ is a product: w2_a·w2_b, or of a
kernel with `use_effective_conv2d`, its Tucker form t₂ ×₁ w2_a ×₂ w2_b; W₁ is one only with `decompose_both`.

PEFT has linear layers, `nn.Conv1d` and `nn.Conv2d`; transformers' `Conv1D`, embeddings and `nn.Conv3d` are ours alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods import lora, lycoris, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lycoris import LycorisConfig
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class LoKrConfig(LycorisConfig):
    """LoKr's config, with PEFT's fields and defaults: W + s·(W₁ ⊗ W₂) (https://arxiv.org/abs/2309.14859).

    Attributes:
        r: the rank of a factor that is a product; a small W₂ is whole, whatever r is.
        alpha: the scaling is alpha / r.
        rank_dropout: the probability in training that a row of the update is dropped.
        module_dropout: the probability in training that a layer goes without its update.
        rank_dropout_scale: whether the rows that are left are scaled up to make up for those that are dropped.
        use_effective_conv2d: whether W₂ of a kernel of more than one element is in Tucker form.
        decompose_both: whether W₁ may be a product too.
        decompose_factor: the smaller factor of each dimension, if it divides; -1 takes the largest possible.
        init_weights: `True` (W₁ = 0), `"lycoris"` (W₂ = 0), or `False` (neither: not the identity).
        rank_pattern: other ranks, by module name or regex; the first one that matches a path counts.
        alpha_pattern: other alphas, in the same way.

    Raises:
        ValueError: a rank or `decompose_factor` is no positive integer, a dropout no probability below 1, or
            `init_weights` unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.LoKrConfig(r=4, alpha=8, target_modules=["query"], decompose_factor=8)
        >>> config.alpha / config.r
        2.0
    """

    peft_type: ClassVar[str] = "LOKR"

    rank_dropout_scale: bool = dataclasses.field(
        default=False, metadata=described("Whether the rows that are left make up for those that are dropped.")
    )
    use_effective_conv2d: bool = dataclasses.field(
        default=False, metadata=described("Whether the second factor of a kernel is in Tucker form.")
    )
    decompose_both: bool = dataclasses.field(
        default=False, metadata=described("Whether the first factor may be a product too.")
    )
    decompose_factor: int = dataclasses.field(
        default=-1, metadata=described("The smaller factor of each dimension, if it divides; -1 takes the largest.")
    )
    init_weights: bool | str = dataclasses.field(
        default=True, metadata=described("True (W1 = 0), lycoris (W2 = 0), or False (not the identity).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1:
            check_positive("decompose_factor", self.decompose_factor)
        if isinstance(self.init_weights, str) and self.init_weights != "lycoris":
            raise ValueError(f"init_weights={self.init_weights!r}; expected True, False or 'lycoris'.")


# --- the shapes of its tensors ----------------------------------------------------------------------------------------


def _divided(size: int, factor: int) -> tuple[int, int]:
    """Two numbers with this product, the smaller one first unless `factor` itself is asked for and divides.

    PEFT's rule: they get nearer to each other while their sum shrinks and the smaller one is no more than `factor`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor < 0 else factor
    small = max(one for one in range(1, math.isqrt(size) + 1) if size % one == 0 and one <= max(most, 1))
    return small, size // small


def _shapes(config: LoKrConfig, weight: WeightShape, r: int) -> dict[str, Shape]:
    (o1, o2), (i1, i2) = (_divided(size, config.decompose_factor) for size in (weight.outputs, weight.inputs))
    is_product = config.decompose_both and r < max(o1, i1) / 2
    first: dict[str, Shape] = {"lokr_w1_a": (o1, r), "lokr_w1_b": (r, i1)} if is_product else {"lokr_w1": (o1, i1)}
    if r >= max(o2, i2) / 2:
        return first | {"lokr_w2": (o2, i2, *weight.kernel)}
    if config.use_effective_conv2d and math.prod(weight.kernel) > 1:
        core = (r, r, *lycoris.tucker_kernel(weight))
        return first | {"lokr_w2_a": (r, o2), "lokr_w2_b": (r, i2), "lokr_t2": core}
    return first | {"lokr_w2_a": (o2, r), "lokr_w2_b": (r, i2 * math.prod(weight.kernel))}


def _slot(name: str, rank: int | None = None) -> Slot:
    return Slot(slots.among_shapes(_shapes, name), rank=rank)


SLOTS = {
    **{name: _slot(name) for name in ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a", "lokr_t2")},
    **{name: _slot(name, rank=0) for name in ("lokr_w1_b", "lokr_w2_b")},
    "scaling": Slot(trained=False, off=0.0),
}


def _resized(leaf: Leaf, old: int, new: int) -> Leaf:
    """The leaf with another rank; the axes that have it depend on whether W₂ is in Tucker form."""
    axes = {"lokr_w1_a": 1, "lokr_w1_b": 0, "lokr_w2_a": 0 if "lokr_t2" in leaf else 1, "lokr_w2_b": 0}
    made = {name: slots.sized(tensor, axes.get(name), new) for name, tensor in leaf.items()}
    if "lokr_t2" in made:
        made["lokr_t2"] = slots.sized(slots.sized(made["lokr_t2"], 0, new), 1, new)
    return made


# --- what it does -----------------------------------------------------------------------------------------------------


def init(config: LoKrConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The factors of one site: the first of W₁ zero (or the last of W₂), the others uniform as torch's layers."""
    shapes = slots.shapes(SLOTS, config, layouts.of_site(site), matching.rank(config, path))
    zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b")}.get(config.init_weights, ())

    made = {name: torch.zeros(s) if name in zero else lycoris.drawn(s, generator) for name, s in shapes.items()}
    return {name: like_weight(one, site.stored, dtype) for name, one in made.items()}


def delta(config: LoKrConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """s·(W₁ ⊗ W₂), (out, in, *kernel)."""
    first = leaf["lokr_w1"] if "lokr_w1" in leaf else leaf["lokr_w1_a"] @ leaf["lokr_w1_b"]
    second = _second(leaf).reshape(weight.outputs // first.shape[0], weight.inputs // first.shape[1], *weight.kernel)
    # A whole W₂ of an nn.Conv1d has three axes, and torch.kron of two and three, which PEFT takes, has this order.
    order = "cadb..." if len(weight.kernel) == 1 and "lokr_w2" in leaf else "acbd..."
    whole = torch.einsum(f"ab,cd...->{order}", first, second)
    return leaf["scaling"] * whole.reshape(weight.outputs, weight.inputs, *weight.kernel)


def _second(leaf: Mapping[str, Tensor]) -> Tensor:
    if "lokr_w2" in leaf:
        return leaf["lokr_w2"]
    if "lokr_t2" in leaf:
        return torch.einsum("rs...,ro,si->oi...", leaf["lokr_t2"], leaf["lokr_w2_a"], leaf["lokr_w2_b"])
    return leaf["lokr_w2_a"] @ leaf["lokr_w2_b"]


METHOD = Method(
    config=LoKrConfig,
    slots=SLOTS,
    init=init,
    constants=lycoris.constants,
    action=lycoris.additive(delta),
    targets=lora.METHOD.targets,  # as in PEFT
    stacking=Stacking(matching.rank, _resized, varies=lycoris.VARIES),
)
