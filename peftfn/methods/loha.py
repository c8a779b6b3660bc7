"""LoHa: W + s·(W₁ₐ W₁ᵦ) ∘ (W₂ₐ W₂ᵦ), two low-rank products, multiplied number by number (FedPara, section 2.2).

With factors of rank r the update has a rank of up to r² for the parameters of a LoRA of rank 2r
(https://arxiv.org/abs/2108.06098; in LyCORIS, https://arxiv.org/abs/2309.14859). Scaling s is alpha / r. A kernel is
(out, in·k), or with `use_effective_conv2d` each factor is in Tucker form, t ×₁ a ×₂ b (the paper's proposition 3).

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
from peftfn.methods.lora_config import described
from peftfn.methods.lycoris import LycorisConfig
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class LoHaConfig(LycorisConfig):
    """LoHa's config, with PEFT's fields and defaults: W + s·(W₁ₐ W₁ᵦ) ∘ (W₂ₐ W₂ᵦ) (https://arxiv.org/abs/2108.06098).

    Attributes:
        r: the rank of each of the two products; the update's is up to r².
        alpha: the scaling s is alpha / r.
        rank_dropout: the probability in training that a row of the update (an output of the layer) is dropped.
        module_dropout: the probability in training that a layer goes without its update.
        rank_pattern: other ranks, by module name or regex; the first one that matches a path counts.
        alpha_pattern: other alphas, in the same way.
        use_effective_conv2d: whether the factors of a kernel of more than one element are in Tucker form (cores of
            (r, r, *kernel) numbers); otherwise W₁ᵦ and W₂ᵦ are (r, in·kernel).
        init_weights: `True` (W₂ᵦ = 0), or `False` (all random: not the identity).

    Raises:
        ValueError: a rank is no positive integer, or a dropout no probability below 1.

    Example:
        >>> import peftfn as pf
        >>> config = pf.LoHaConfig(r=4, alpha=8, target_modules=["query"], rank_dropout=0.1)
        >>> config.alpha / config.r
        2.0
    """

    peft_type: ClassVar[str] = "LOHA"

    use_effective_conv2d: bool = dataclasses.field(
        default=False, metadata=described("Whether the factors of a kernel are in Tucker form.")
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (the last factor is zero), or False (not the identity).")
    )


def _shapes(config: LoHaConfig, weight: WeightShape, r: int) -> dict[str, Shape]:
    size = math.prod(weight.kernel)
    if config.use_effective_conv2d and size > 1:
        core = (r, r, *lycoris.tucker_kernel(weight))
        one: dict[str, Shape] = {"a": (r, weight.outputs), "b": (r, weight.inputs)}
        return {f"hada_w{n}_{side}": one[side] for n in "12" for side in "ab"} | {"hada_t1": core, "hada_t2": core}
    one = {"a": (weight.outputs, r), "b": (r, weight.inputs * size)}
    return {f"hada_w{n}_{side}": one[side] for n in "12" for side in "ab"}


def _slot(name: str, rank: int | None = None) -> Slot:
    return Slot(slots.among_shapes(_shapes, name), rank=rank)


SLOTS = {
    **{name: _slot(name) for name in ("hada_w1_a", "hada_w2_a")},
    **{name: _slot(name, rank=0) for name in ("hada_w1_b", "hada_w2_b", "hada_t1", "hada_t2")},
    "scaling": Slot(trained=False, off=0.0),
}


def _resized(leaf: Leaf, old: int, new: int) -> Leaf:
    """The leaf with rank `new`, which lies on other axes in Tucker form."""
    is_tucker = "hada_t1" in leaf
    made = dict(leaf)
    for n in "12":
        made[f"hada_w{n}_a"] = slots.sized(made[f"hada_w{n}_a"], 0 if is_tucker else 1, new)
        made[f"hada_w{n}_b"] = slots.sized(made[f"hada_w{n}_b"], 0, new)
        if is_tucker:
            made[f"hada_t{n}"] = slots.sized(slots.sized(made[f"hada_t{n}"], 0, new), 1, new)
    return made


def init(config: LoHaConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The factors of one site: all uniform as torch's layers, but for the last one, which is zero."""
    shapes = slots.shapes(SLOTS, config, layouts.of_site(site), matching.rank(config, path))
    made = {name: lycoris.drawn(shape, generator) for name, shape in shapes.items()}
    if config.init_weights:
        made["hada_w2_b"] = torch.zeros(shapes["hada_w2_b"])
    return {name: like_weight(one, site.stored, dtype) for name, one in made.items()}


def delta(config: LoHaConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """s·(W₁ₐ W₁ᵦ) ∘ (W₂ₐ W₂ᵦ), (out, in, *kernel)."""
    whole = leaf["scaling"] * (_factor(leaf, "1") * _factor(leaf, "2"))
    return whole.reshape(weight.outputs, weight.inputs, *weight.kernel)


def _factor(leaf: Mapping[str, Tensor], number: str) -> Tensor:
    a, b = leaf[f"hada_w{number}_a"], leaf[f"hada_w{number}_b"]
    core = leaf.get(f"hada_t{number}")
    return a @ b if core is None else torch.einsum("rs...,ro,si->oi...", core, a, b)


def check_file(config: LoHaConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file that lacks a factor, and one of a rank that is not the config's: the scaling would be wrong."""
    lacks = [name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b") if name not in leaf]
    lacks += [name for name in ("hada_t1", "hada_t2") if ("hada_t1" in leaf or "hada_t2" in leaf) and name not in leaf]
    if lacks:
        raise KeyError(f"{sorted(leaf)}, but no {' and no '.join(lacks)}")
    rank, found = matching.rank(config, path), leaf["hada_w1_b"].shape[0]
    if found != rank:
        raise ValueError(f"rank {found}, and the config says {rank}")


METHOD = Method(
    config=LoHaConfig,
    slots=SLOTS,
    init=init,
    constants=lycoris.constants,
    action=lycoris.additive(delta),
    targets=lora.METHOD.targets,  # as in PEFT
    stacking=Stacking(matching.rank, _resized, varies=lycoris.VARIES),
    files=Files(check_file),
)
