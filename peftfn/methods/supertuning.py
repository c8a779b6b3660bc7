"""Super-Tuning: W + Δ, Δ zero but where W is largest, or smallest; "Supra" adds s·B·A (https://arxiv.org/abs/2607.09287).

Of a weight int(out·in·(1 - sparsity)) numbers are trained, those of largest absolute value when the adapter is made, or
of smallest with `select_top=False`. Their places, in the flat weight, are in the adapter's buffers and its files; with
`save_precomputed_indices=False` files are without them, and `load` takes them from the weights of the model that it is
given, which have to be those from then. With `r` a LoRA of scaling s = lora_alpha / r is added, 2 unless it is given.

PEFT has `nn.Linear`; transformers' `Conv1D` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import TargetedConfig
from peftfn.methods import builders, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class SupertuningConfig(TargetedConfig):
    """Super-Tuning's config, with PEFT's fields and defaults: W + Δ, Δ sparse (https://arxiv.org/abs/2607.09287).

    Attributes:
        sparsity: the share of a weight that is not trained: int(out·in·(1 - sparsity)) numbers are.
        select_top: whether those are trained where |W| is largest; otherwise where it is smallest.
        r: the rank of a LoRA that is added ("Supra"); `None` is none.
        lora_alpha: the scaling of that LoRA is lora_alpha / r; by default 2·r, so that it is 2.
        lora_dropout: the probability in training that a number of the LoRA's input is dropped.
        init_weights: `True` (zeros, and B = 0), or `False` (normal numbers: not the identity).
        save_precomputed_indices: whether files hold the places; files without them are read with the model that they
            were made for, `peftfn.load(folder, model)`.

    Raises:
        ValueError: `sparsity` is no share below 1, `r` no positive integer, `lora_dropout` no probability below 1, or
            `lora_alpha` is given without `r`.

    Example:
        >>> import peftfn as pf
        >>> config = pf.SupertuningConfig(sparsity=0.95, r=4, target_modules=["query", "value"])
        >>> config.lora_alpha
        8
    """

    peft_type: ClassVar[str] = "SUPERTUNING"

    sparsity: float = dataclasses.field(default=0.99, metadata=described("Share of a weight that is not trained."))
    select_top: bool = dataclasses.field(
        default=True, metadata=described("Whether to train the largest numbers, or else the smallest.")
    )
    r: int | None = dataclasses.field(default=None, metadata=described("Rank of a LoRA that is added, if any."))
    lora_alpha: float | None = dataclasses.field(
        default=None, metadata=described("Scaling of the LoRA is lora_alpha / r; 2 * r by default.")
    )
    lora_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Dropout on the input of the LoRA in training.")
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (zeros), or False (not the identity).")
    )
    save_precomputed_indices: bool = dataclasses.field(
        default=True, metadata=described("Whether files say which numbers are trained.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity!r}; expected a share of at least 0 and below 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r}; expected a probability of at least 0 and below 1.")
        if self.r is not None:
            check_positive("r", self.r)
            if self.lora_alpha is None:
                object.__setattr__(self, "lora_alpha", 2 * self.r)
        elif self.lora_alpha is not None:
            raise ValueError(f"lora_alpha={self.lora_alpha!r} needs r beside it, the rank of the LoRA that it scales.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _count(config: SupertuningConfig, weight: WeightShape, r: int) -> Shape:
    return (int(weight.outputs * weight.inputs * (1 - config.sparsity)),)


def _a(config: SupertuningConfig, weight: WeightShape, r: int) -> Shape | None:
    return (r, weight.inputs) if r else None


def _b(config: SupertuningConfig, weight: WeightShape, r: int) -> Shape | None:
    return (weight.outputs, r) if r else None


def _are_stored(config: SupertuningConfig) -> bool:
    return config.save_precomputed_indices


SLOTS = {
    "supertuning_values": Slot(_count, off=0.0),
    "supertuning_indices": Slot(_count, trained=False, stored=_are_stored),
    "supertuning_lora_A": Slot(_a, "supertuning_lora_A.weight", rank=0),
    "supertuning_lora_B": Slot(_b, "supertuning_lora_B.weight", rank=1),
    "scaling": Slot(trained=False, off=0.0),
}


def _rank(config: SupertuningConfig, path: str) -> int:
    return config.r or 0


def chosen(config: SupertuningConfig, site: Site) -> Tensor:
    """The places of the numbers that are trained, in the flat (out, in) weight of a site, (n,)."""
    if site.stored.is_meta:
        raise ValueError(
            f"{site.path}: Super-Tuning trains the largest numbers of a weight, and the model is on the meta device; "
            "load it with its weights first."
        )
    sizes = layouts.seen(site.kind, site.weight.detach()).abs().flatten()
    (count,) = _count(config, layouts.of_site(site), 0)
    if count < 1:
        raise ValueError(
            f"{site.path}: sparsity={config.sparsity} leaves none of its {sizes.numel()} numbers to train; expected at "
            f"most {1 - 1 / sizes.numel():.6g}."
        )
    return sizes.topk(count, largest=config.select_top).indices.to(torch.int32)


def init(
    config: SupertuningConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> Leaf:
    """The numbers and their places; A uniform as torch's layers, B zero or uniform too."""
    where, weight = chosen(config, site), layouts.of_site(site)
    fan_in = {"supertuning_lora_A": weight.inputs, "supertuning_lora_B": _rank(config, path)}

    def drawn(name: str, shape: Shape) -> Tensor:
        if config.init_weights and name != "supertuning_lora_A":
            return torch.zeros(shape)
        if name == "supertuning_values":
            return torch.randn(shape, generator=generator)
        return (2 * torch.rand(shape, generator=generator) - 1) / fan_in[name] ** 0.5

    shapes = slots.shapes(SLOTS, config, weight, _rank(config, path))
    made = {name: like_weight(drawn(name, shape), site.stored, dtype) for name, shape in shapes.items()}
    return {**made, "supertuning_indices": where}


def constants(config: SupertuningConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling of the LoRA, a 0-d tensor, where there is one."""
    return {"scaling": constant((config.lora_alpha or 0) / config.r, leaf)} if config.r else {}


# --- what it does -----------------------------------------------------------------------------------------------------


def _sparse(leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    values, where = leaf["supertuning_values"], leaf["supertuning_indices"].long()
    flat = values.new_zeros(weight.outputs * weight.inputs).scatter_add(0, where, values)
    return flat.view(weight.outputs, weight.inputs)


def delta(config: SupertuningConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """Δ + s·B·A, (out, in)."""
    whole = _sparse(leaf, weight)
    if "scaling" in leaf:
        whole = whole + leaf["scaling"] * (leaf["supertuning_lora_B"] @ leaf["supertuning_lora_A"])
    return whole


def forward(
    config: SupertuningConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """site(x) + Δ x + s·B·A·drop(x)."""
    y = builders.added(site, site(x, *args, **kwargs), _sparse(leaf, layouts.of_site(site)), x, *args, **kwargs)
    if "scaling" not in leaf:
        return y
    x = F.dropout(x.to(leaf["supertuning_lora_A"].dtype), config.lora_dropout, site.training)
    change = F.linear(F.linear(x, leaf["supertuning_lora_A"]), leaf["supertuning_lora_B"])
    return (y + leaf["scaling"] * change).to(y.dtype)


# --- its files --------------------------------------------------------------------------------------------------------


def check_file(config: SupertuningConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without one of its tensors, and one of another rank: the scaling would be wrong."""
    expected = ["supertuning_values"] + ["supertuning_indices"] * config.save_precomputed_indices
    expected += ["supertuning_lora_A", "supertuning_lora_B"] * bool(config.r)
    if sorted(leaf) != sorted(expected):
        raise KeyError(f"{sorted(leaf)}, and by its config there are {expected}")
    if config.r and leaf["supertuning_lora_A"].shape[0] != config.r:
        raise ValueError(f"rank {leaf['supertuning_lora_A'].shape[0]}, and the config says {config.r}")


def derived(config: SupertuningConfig, path: str, leaf: Leaf, site: Site | None) -> Leaf:
    """The places of the trained numbers, from the base's weight, where files do not hold them."""
    if config.save_precomputed_indices:
        return {}
    if site is None:
        raise ValueError(
            "save_precomputed_indices=False: the file does not say which numbers it trains, the largest of the base's "
            "weights do. Pass the model: peftfn.load(folder, model)."
        )
    return {"supertuning_indices": chosen(config, site).to(leaf["supertuning_values"].device)}


METHOD = Method(
    config=SupertuningConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    targets=Targets(by_type(TARGETS, has_exclusions=False)),
    stacking=Stacking(_rank, varies=("r", "lora_alpha", "init_weights", "select_top", "save_precomputed_indices")),
    files=Files(check_file, derived=derived),
)
