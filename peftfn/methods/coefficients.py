"""What FourierFT and WaveFT have in common: some coefficients of a transform of ΔW, at places that a seed decides.

Adapters of a stack may have different numbers of coefficients. Each coefficient has a factor of its own (`scaling`, a
buffer), which is zero where a smaller adapter is padded, so that nothing is trained there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import places
from peftfn.methods import slots as slot_table
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import constant, like_weight
from peftfn.methods.slots import Shape, Slot, Slots
from peftfn.methods.traits import Stacking
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class CoefficientsConfig(LayeredConfig):
    """The fields that PEFT's configs of FourierFT and WaveFT share.

    Attributes:
        n_frequency: how many coefficients are trained in a layer, at most out·in.
        scaling: the update is multiplied by it, as it is: nothing divides it.
        random_loc_seed: which coefficients are trained: places in (out, in) follow from it, and files hold no others.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        bias: which biases to train too: `"none"`, `"all"`, or those of the adapted layers (`"fourier_only"`, say).
        n_frequency_pattern: other values of `n_frequency`, by module name or regex; the first one that matches counts.
        init_weights: `True` (zeros), or `False` (normal numbers: not the identity).

    Raises:
        ValueError: a number of coefficients is no positive integer, or `bias` is unknown.

    Example:
        >>> import peftfn as pf
        >>> pf.WaveFTConfig(n_frequency_pattern={"layer.0.query": 100}).random_loc_seed
        777
    """

    n_frequency: int = dataclasses.field(default=1000, metadata=described("Coefficients that are trained in a layer."))
    scaling: float = dataclasses.field(default=150.0, metadata=described("What the update is multiplied with."))
    random_loc_seed: int = dataclasses.field(
        default=777, metadata=described("Says which coefficients are trained; files do not say it otherwise.")
    )
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or those adapted."))
    n_frequency_pattern: Mapping[str, int] | None = dataclasses.field(
        default_factory=dict[str, int], metadata=described("Other n_frequency, by module name or regex.")
    )
    init_weights: bool = dataclasses.field(
        default=False, metadata=described("True (zeros), or False (normal numbers).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in (self.n_frequency, *(self.n_frequency_pattern or {}).values()):
            check_positive("n_frequency", count)
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            only = f"{self.peft_type.lower()}_only"
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or '{only}'.")


def count(config: CoefficientsConfig, path: str) -> int:
    """How many coefficients a site has."""
    return matching.pattern_value(config.n_frequency_pattern, path, config.n_frequency)


# What these functions give are partials of functions of this file, and no closures: a bound module can be pickled.


def slots(name: str) -> Slots:
    """The tensors of a leaf, each (n,): the coefficients, and the factor of each."""
    return {name: Slot(_shape, rank=0), "scaling": Slot(_all, trained=False, rank=0, off=0.0)}


def _shape(config: CoefficientsConfig, weight: WeightShape, r: int) -> Shape:
    return (min(r, weight.outputs * weight.inputs),)


def _all(config: CoefficientsConfig, weight: WeightShape, r: int) -> Shape:
    return (r,)


def init(name: str, spread: float) -> Callable[..., Leaf]:
    """An `init` of zeros, or of normal numbers with this standard deviation."""
    return functools.partial(_init, (name, spread))


def _init(
    what: tuple[str, float],
    config: CoefficientsConfig,
    path: str,
    site: Site,
    generator: torch.Generator,
    dtype: torch.dtype | None,
) -> Leaf:
    name, spread = what
    number, weight = count(config, path), layouts.of_site(site)
    most = weight.outputs * weight.inputs
    if number > most:
        raise ValueError(
            f"{site.path}: n_frequency={number}, and its weight has {most} numbers; expected at most as many. Choose "
            "another one for it in n_frequency_pattern."
        )
    made = torch.zeros(number) if config.init_weights else spread * torch.randn(number, generator=generator)
    return {name: like_weight(made, site.stored, dtype)}


def constants(config: CoefficientsConfig, path: str, leaf: Leaf) -> Leaf:
    """The factor of each coefficient, (n,)."""
    (values,) = leaf.values()
    return {"scaling": constant(config.scaling, leaf).repeat(values.shape[0])}


def dense(config: CoefficientsConfig, values: Tensor, scaling: Tensor, weight: WeightShape) -> Tensor:
    """The coefficients, scaled, each at its place among zeros, (out, in), in float32 at least."""
    total = weight.outputs * weight.inputs
    where = places.drawn(config.random_loc_seed, total, values.shape[0], values.device)
    scaled = values.to(torch.promote_types(values.dtype, torch.float32)) * scaling  # torch has no transform of halves
    return scaled.new_zeros(total).index_copy(0, where, scaled).view(weight.outputs, weight.inputs)


def resized(leaf: Leaf, old: int, new: int) -> Leaf:
    """The leaf with `new` coefficients in place of `old`; those that are added have a factor of zero."""
    found = next(iter(leaf.values())).shape[0]
    if found != old:
        raise ValueError(
            f"an adapter has {found} coefficients where its config says {old} (proportional_parameters); write the "
            "numbers of its layers into n_frequency_pattern to stack it."
        )
    return {name: slot_table.sized(one, 0, new) for name, one in leaf.items()}


def check_file(config: CoefficientsConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file with another number of coefficients than its config says."""
    (values,) = leaf.values()
    if values.shape[0] != count(config, path) and not getattr(config, "proportional_parameters", False):
        raise ValueError(f"{values.shape[0]} coefficients, and the config says {count(config, path)}")


STACKING = Stacking(count, resized, varies=("n_frequency", "n_frequency_pattern", "scaling", "bias", "init_weights"))
