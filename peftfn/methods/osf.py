"""OSF: the smaller singular parts of a weight are trained, orthogonal to the larger (https://arxiv.org/abs/2504.07097).

W is U·S·Vᵀ. The `effective_rank` largest parts stay, and those left are trained as they are: W' = W + U·S·V - U₀·S₀·V₀,
where U₀, S₀, V₀ are what they were. The gradients of U and V are projected off the directions that stay; PEFT does so
by hooks on the parameters, here it is a part of the function: U enters as its projection plus
a constant, so that the value is U and the gradient the projection's.

Files hold U, S and V alone, so they are read with the model. PEFT trains nothing on transformers' `Conv1D`, in silence,
and of two active adapters runs the first; here both are weights like others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import ANY, TargetedConfig
from peftfn.methods import builders
from peftfn.methods.lora_config import described
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets
from peftfn.models import layouts, targets
from peftfn.models.layers import Place, Site
from peftfn.models.layouts import WeightShape

_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
_LLAMAS = ("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi")

TARGETS: dict[str, Sequence[str] | str] = {
    **dict.fromkeys(_LLAMAS, _LLAMA),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj")),
    **dict.fromkeys(("bloom", "gpt_neox", "falcon"), ("query_key_value", "dense_4h_to_h")),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
}
"""PEFT's default modules, by `config.model_type` (as of PEFT 0.21); all linear layers elsewhere."""


@dataclasses.dataclass(frozen=True)
class OSFConfig(TargetedConfig):
    """OSF's config, with PEFT's fields and defaults: W + U·S·V - U₀·S₀·V₀ (https://arxiv.org/abs/2504.07097).

    Attributes:
        effective_rank: how many singular parts of W stay as they are, the largest: a number, or as a float up to 1.0 a
            share of all. By default half; the others are trained, so fewer parts here are more parameters.
        rank_pattern: other effective ranks, by a regex that is searched for in a module's path; the first one counts.
        init_weights: `True` (U, S, V are the base's own), or `False` (random: not the identity).

    Raises:
        ValueError: an effective rank is not above 0, or above 1 and no whole number.

    Example:
        >>> import peftfn as pf
        >>> config = pf.OSFConfig(effective_rank=0.75, target_modules=["query", "value"])
        >>> config.effective_rank
        0.75
    """

    peft_type: ClassVar[str] = "OSF"
    inactive: ClassVar[Mapping[str, Any]] = {"target_svd_config": ANY}  # PEFT ignores it

    effective_rank: float | None = dataclasses.field(
        default=None, metadata=described("Singular parts that stay: a number, or a share of all; half by default.")
    )
    rank_pattern: Mapping[str, float] | None = dataclasses.field(
        default=None, metadata=described("Other effective ranks, by a regex that is found in a module's path.")
    )
    init_weights: bool | None = dataclasses.field(
        default=True, metadata=described("True (the base's own parts), or False (random ones).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and (rank <= 0 or (rank > 1 and rank != int(rank))):
                raise ValueError(
                    f"effective_rank={rank!r}; expected a number of singular parts from 1, or a share of them as a "
                    "float above 0 and up to 1.0."
                )


def _stays(config: OSFConfig, path: str, weight: WeightShape) -> int:
    """How many singular parts of a weight stay."""
    most = min(weight.outputs, weight.inputs)
    hits = [rank for pattern, rank in (config.rank_pattern or {}).items() if re.search(pattern, path)]
    wanted = hits[0] if hits else config.effective_rank
    if wanted is None:
        return most // 2
    is_share = isinstance(wanted, float) and wanted <= 1
    return min(most, int(most * wanted) if is_share else int(wanted))


def resolve(model: nn.Module, config: OSFConfig) -> OSFConfig:
    """The config with PEFT's targets for the model, or all linear layers, and its heads, filled in."""
    if config.target_modules is None and targets.model_type(model) not in TARGETS:
        config = dataclasses.replace(config, target_modules=targets.ALL_LINEAR)
    return targets.resolved(model, config, TARGETS)


def sites(model: nn.Module, config: OSFConfig) -> dict[str, Place]:
    """The config's sites in the model; a pattern that is found in none of their paths is an error."""
    found = targets.sites(model, config)
    for pattern in config.rank_pattern or {}:
        if not any(re.search(pattern, path) for path in found):
            raise ValueError(f"rank_pattern has {pattern!r}, which is found in none of the {len(found)} sites' paths.")
    return found


# --- its tensors ------------------------------------------------------------------------------------------------------


def _u(config: OSFConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.outputs, r)


def _s(config: OSFConfig, weight: WeightShape, r: int) -> Shape:
    return (r,)


def _v(config: OSFConfig, weight: WeightShape, r: int) -> Shape:
    return (r, weight.inputs)


_KEPT = ("osf_U_start", "osf_S_start", "osf_V_start", "osf_U_high", "osf_V_high")

SLOTS = {
    "osf_U_low": Slot(_u, "osf_svd_params.U_low", rank=1, outputs=0),
    "osf_S_low": Slot(_s, "osf_svd_params.S_low", rank=0),
    "osf_V_low": Slot(_v, "osf_svd_params.V_low", rank=0, inputs=1),
    **{name: Slot(trained=False) for name in _KEPT},
    "active": Slot(trained=False, off=0.0),
}


def init(config: OSFConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The smaller singular parts of the base's weight, or random ones, and what is kept of the weight."""
    kept = derived(config, path, {}, site)

    def start(name: str) -> Tensor:
        own = kept[f"osf_{name}_start"]
        made = own if config.init_weights else torch.randn(own.shape, generator=generator).to(own.device)
        return like_weight(made.clone(), site.stored, dtype)

    return {**{f"osf_{name}_low": start(name) for name in "USV"}, **kept}


def constants(config: OSFConfig, path: str, leaf: Leaf) -> Leaf:
    """`active`, a 0-d tensor: 1, and 0 at a site that an adapter of a stack does not have."""
    return {"active": constant(1.0, leaf)}


def derived(config: OSFConfig, path: str, leaf: Leaf, site: Site | None) -> Leaf:
    """U₀ (out, k), S₀ (k,) and V₀ (k, in), and of a weight that is not square the larger parts of its longer side.

    On the shorter side U₀ or V₀ span all that is orthogonal to the larger parts; on the longer one they do not.
    """
    if site is None:
        raise builders.needs_base("OSFConfig")
    shape = layouts.of_site(site)
    stays, most = _stays(config, path, shape), min(shape.outputs, shape.inputs)
    if not 0 < stays < most:
        raise ValueError(
            f"{site.path}: {stays} of the {most} singular parts would stay; expected at least one to stay and one to "
            f"be trained. Choose another effective_rank or rank_pattern, or exclude_modules=[{site.path!r}]."
        )
    weight = builders.in_float32(site, "OSF trains parts of the weight")
    parts = cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(weight, full_matrices=False))
    held = site.weight.dtype  # PEFT rounds the parts to the dtype of the weight
    u, s, vh = (like_weight(one.to(held), site.stored, None) for one in parts)
    found = {"osf_U_start": u[:, stays:], "osf_S_start": s[stays:], "osf_V_start": vh[stays:]}
    if shape.outputs > shape.inputs:
        found["osf_U_high"] = u[:, :stays]
    if shape.inputs > shape.outputs:
        found["osf_V_high"] = vh[:stays]
    return {name: one.contiguous() for name, one in found.items()}


# --- what it does -----------------------------------------------------------------------------------------------------


def _projected(leaf: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """U·S and V, whose gradients have nothing along the directions that stay."""
    u, v = leaf["osf_U_low"], leaf["osf_V_low"]
    start_u, start_v = leaf["osf_U_start"], leaf["osf_V_start"]
    if "osf_U_high" in leaf:
        high = leaf["osf_U_high"]
        free_u = u - high @ (high.mT @ u)
    else:
        free_u = start_u @ (start_u.mT @ u)
    if "osf_V_high" in leaf:
        high = leaf["osf_V_high"]
        free_v = v - (v @ high.mT) @ high
    else:
        free_v = (v @ start_v.mT) @ start_v
    # The value is the tensor's own, to the bit; the gradient is that of the projection.
    u, v = u.detach() + (free_u - free_u.detach()), v.detach() + (free_v - free_v.detach())
    return u * leaf["osf_S_low"], v


def delta(config: OSFConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """U·S·V - U₀·S₀·V₀, (out, in)."""
    left, right = _projected(leaf)
    before = (leaf["osf_U_start"] * leaf["osf_S_start"]) @ leaf["osf_V_start"]
    return leaf["active"] * (left @ right - before)


def forward(config: OSFConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x) + U·S·V·x - U₀·S₀·V₀·x."""
    y: Tensor = site(x, *args, **kwargs)
    left, right = _projected(leaf)
    x = x.to(right.dtype)
    before = F.linear(F.linear(x, leaf["osf_V_start"]), leaf["osf_U_start"] * leaf["osf_S_start"])
    return (y + leaf["active"] * (F.linear(F.linear(x, right), left) - before)).to(y.dtype)


def _same_rank(leaf: Leaf, old: int, new: int) -> Leaf:
    """The leaf as it is: adapters of one effective rank, which a stack has, have one rank at each site."""
    return leaf


METHOD = Method(
    config=OSFConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    files=Files(derived=derived),
    targets=Targets(resolve, sites),
    stacking=Stacking(resize=_same_rank, varies=("init_weights",)),
)
