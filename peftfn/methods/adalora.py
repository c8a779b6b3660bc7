"""AdaLoRA: W + s·P·Λ·Q with W frozen, Λ diagonal (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

P, Λ and Q are PEFT's `lora_B`, `lora_E` (a column) and `lora_A`. The scaling s is lora_alpha / (ranknum + 1e-5), where
ranknum is the rank at the start and stays so: which ranks are left is a matter of zeros in Λ. Those are written by
`peftfn.adalora.allocate`, and noted in the buffer `mask`; files hold the rows that are left, and in the config's
`rank_pattern` which of the first ones they are. An adapter from such a file has these rows alone, and the pattern in
its config.

PEFT has linear layers, transformers' `Conv1D` and `nn.Conv2d` without groups, where Q reads flattened patches; the
same of `nn.Conv1d` and `nn.Conv3d` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Adapter, Leaf
from peftfn.methods import builders, lora, slots
from peftfn.methods.adalora_config import AdaLoraConfig
from peftfn.methods.adalora_targets import TARGETS
from peftfn.methods.low_rank import site_forward
from peftfn.methods.low_rank.linear_kernel import Delta
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets
from peftfn.models import layers, layouts, targets
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

NAMES = ("lora_A", "lora_B", "lora_E")
"""Q (r, in), P (out, r) and Λ (r, 1)."""

_EPS = 1e-5


def _q(config: AdaLoraConfig, weight: WeightShape, r: int) -> Shape:
    return r, weight.fan_in


def _p(config: AdaLoraConfig, weight: WeightShape, r: int) -> Shape:
    return weight.outputs, r


def _lambda(config: AdaLoraConfig, weight: WeightShape, r: int) -> Shape:
    return r, 1


SLOTS = {
    "lora_A": Slot(_q, rank=0, inputs=1),
    "lora_B": Slot(_p, rank=1, outputs=0, column_major=True),
    "lora_E": Slot(_lambda, rank=0),
    "scaling": Slot(trained=False, off=0.0),
    "ranknum": Slot(trained=False),
    "mask": Slot(trained=False, rank=0),
}


def resolve(model: nn.Module, config: AdaLoraConfig) -> AdaLoraConfig:
    """The config with the targets that the model decides, and its heads, filled in.

    Raises:
        ValueError: a field is set that PEFT has and ignores, or that only a file may have.
    """
    ignored = {"r": 8, "use_rslora": False}
    for field in [name for name, default in ignored.items() if getattr(config, name) != default]:
        raise ValueError(
            f"{field}={getattr(config, field)!r} changes nothing in AdaLoRA, whose rank is init_r and whose scaling is "
            "lora_alpha / init_r; leave it out."
        )
    for field in [name for name in ("alpha_pattern", "target_parameters", "rank_pattern") if getattr(config, name)]:
        hint = "it comes from training: set it to None" if field == "rank_pattern" else "AdaLoRA has no such choice"
        raise ValueError(f"{field}={getattr(config, field)!r} cannot be asked for in a fresh adapter; {hint}.")
    return targets.resolved(model, config, TARGETS)


def init(config: AdaLoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """P and Q with normal numbers of deviation 0.02 and Λ = 0, as PEFT 0.21 draws them.

    Without `init_lora_weights` all of them are standard normal: not the identity.
    """
    weight = layouts.of_site(site)
    if weight.groups > 1:
        raise ValueError(
            f"{site.path}: AdaLoRA has no convolutions with groups, in peft neither. Leave it out: "
            f"exclude_modules=[{site.path!r}]."
        )
    size = 0.02 if config.init_lora_weights else 1.0
    leaf: Leaf = {}
    for name, shape in slots.shapes(SLOTS, config, weight, config.init_r).items():
        is_zero = name == "lora_E" and config.init_lora_weights
        drawn = torch.zeros(shape) if is_zero else torch.randn(shape, generator=generator)
        leaf[name] = like_weight(drawn if name == "lora_E" else size * drawn, site.stored, dtype)
    return leaf


def constants(config: AdaLoraConfig, path: str, leaf: Leaf) -> Leaf:
    """The two numbers of the scaling, 0-d, and which ranks are left, (r,)."""
    e = leaf["lora_E"]
    return {
        "scaling": constant(config.lora_alpha if config.lora_alpha > 0 else config.init_r, leaf),
        "ranknum": constant(config.init_r, leaf),
        "mask": torch.ones(e.shape[0], dtype=torch.bool, device=e.device),
    }


def _factors(config: AdaLoraConfig, leaf: Mapping[str, Tensor], kind: str, shape: torch.Size) -> Delta:
    """Λ·Q, P and s, in the shapes that LoRA's have."""
    a, b = leaf["lora_A"] * leaf["lora_E"], leaf["lora_B"]
    if kind == layers.CONVOLUTION:
        a, b = a.view(-1, *shape[1:]), b.view(*b.shape, *(1 for _ in shape[2:]))
    return Delta(a, b, leaf["scaling"] / (leaf["ranknum"] + _EPS))


def rows_of(config: AdaLoraConfig, path: str) -> int:
    """How many rows a site's tensors have: those that a pattern in the config left, or `init_r`."""
    return sum(pattern_of(config, path))


def pattern_of(config: AdaLoraConfig, path: str) -> Sequence[bool]:
    """Which of the first `init_r` rows of a site are there."""
    name = f"{path}.lora_E"  # PEFT adds the adapter's name until it saves the adapter
    found = (rows for key, rows in (config.rank_pattern or {}).items() if key == name or key.startswith(f"{name}."))
    return next(found, (True,) * config.init_r)


def check_file(config: AdaLoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse one factor without the others, and a rank that is not the config's: the scaling would be wrong."""
    missing = [name for name in NAMES if name not in leaf]
    if missing:
        raise KeyError(f"{sorted(leaf)}, but no {' or '.join(missing)}")
    rank, rows = rows_of(config, path), leaf["lora_E"].shape[0]
    if rows != rank or len(pattern_of(config, path)) != config.init_r:
        raise ValueError(f"rank {rows}, and the config says {rank} of {config.init_r}")


def _left(leaf: Mapping[str, Tensor]) -> Tensor:
    """The rows to write, (r,): those that allocation left, and any that a later step of training filled again."""
    return leaf["mask"] | (leaf["lora_E"][:, 0] != 0)


def to_file(config: Any, leaf: Leaf) -> Leaf:
    """The factors of the ranks that are left."""
    if "mask" not in leaf:
        return leaf
    left = _left(leaf)
    return {"lora_A": leaf["lora_A"][left], "lora_B": leaf["lora_B"][:, left], "lora_E": leaf["lora_E"][left]}


def file_config(adapter: Adapter) -> AdaLoraConfig:
    """The config with the ranks that are left, if any is gone."""
    config = adapter.config
    assert isinstance(config, AdaLoraConfig)
    patterns: dict[str, Sequence[bool]] = {}
    for path, leaf in adapter.params.items():
        if "lora_E" in leaf:
            left = iter(cast("list[bool]", _left({**leaf, **adapter.buffers[path]}).tolist()))
            patterns[f"{path}.lora_E"] = [there and next(left) for there in pattern_of(config, path)]
    is_whole = all(all(pattern) for pattern in patterns.values())
    return dataclasses.replace(config, rank_pattern=None if is_whole else patterns)


SCHEDULE = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")

METHOD = Method(
    config=AdaLoraConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=site_forward.low_rank(_factors, kinds=(*builders.MATRICES, layers.CONVOLUTION)),
    targets=Targets(resolve),
    stacking=Stacking(rows_of, varies=(*lora.VARIES, *SCHEDULE)),
    files=Files(check_file, file_config, to_file),
)
