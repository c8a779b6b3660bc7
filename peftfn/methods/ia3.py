"""(IA)³: a learned vector that scales what a layer puts out, or what it takes in (Liu et al. 2022).

y = l ∘ (W x + b), or y = W (l ∘ x) + b in the layers that `feedforward_modules` names
(https://arxiv.org/abs/2205.05638, section 3.3). The adapter's `sites` hold which of the two each site
is, so that no pattern is matched while a call runs. Adapters that differ in it are not stacked.

PEFT has linear layers, transformers' `Conv1D`, `nn.Conv2d` and `nn.Conv3d`; `nn.Conv1d` is ours alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import TargetedConfig
from peftfn.methods import builders
from peftfn.methods.ia3_targets import FEEDFORWARD, TARGETS
from peftfn.methods.low_rank.weighted_sum import Recipe
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Combining, Files, Stacking, Targets
from peftfn.models import layers, layouts, targets
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class IA3Config(TargetedConfig):
    """The config of (IA)³, with PEFT's fields and defaults: vectors that scale outputs, or inputs of some layers.

    Attributes:
        feedforward_modules: names (a path's ending) or a regex of those targets whose input is scaled; `None` takes the
            model type's.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        init_ia3_weights: `True` (ones), or `False` (normal numbers: not the identity).

    Example:
        >>> import peftfn as pf
        >>> config = pf.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
        >>> config.feedforward_modules
        ('wo',)
    """

    peft_type: ClassVar[str] = "IA3"

    feedforward_modules: Sequence[str] | str | None = dataclasses.field(
        default=None, metadata={"help": "Names (a path's ending) or a regex of targets whose input is scaled."}
    )
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata={"help": "Whether weights are stored (in, out); found out by itself."}
    )
    init_ia3_weights: bool = dataclasses.field(
        default=True, metadata={"help": "True (ones), or False (normal numbers, not the identity)."}
    )


def resolve(model: nn.Module, config: IA3Config) -> IA3Config:
    """The config with the targets and feedforward modules that the model decides, and its heads, filled in.

    PEFT reads a config only if its feedforward modules are among its targets, name by name, so they are put there.
    """
    resolved = targets.resolved(model, config, TARGETS)
    given, named = config.feedforward_modules, resolved.target_modules
    names = FEEDFORWARD.get(targets.model_type(model) or "") if given is None else given
    if names is None:
        raise ValueError(
            f"feedforward_modules is not given and there is no default for a {type(model).__name__}; pass those of "
            "target_modules whose input is to be scaled, or [] for none."
        )
    names = targets.in_present_names(model, names) or ()
    if not isinstance(names, str):
        found = targets.sites(model, resolved)
        lost = [name for name in names if not any(path.endswith(name) for path in found)]
        if lost and given is not None:
            raise ValueError(
                f"feedforward_modules={list(names)}: {lost} are none of the {len(found)} sites that target_modules "
                "names; name them there too."
            )
        names = tuple(name for name in names if name not in lost)
        if not isinstance(named, str):
            named, names = _nested(named or (), names)
    return dataclasses.replace(resolved, target_modules=named, feedforward_modules=names)


def _nested(named: Sequence[str], feedforward: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Names for the same two sets of sites, of which the second are among the first."""
    wanted: list[str] = []
    for name in feedforward:
        if name in named or any(name.endswith(f".{one}") for one in named):
            wanted.append(name)
        else:  # the targets name more of the path than it does
            wanted += [one for one in named if one.endswith(name)]
    return tuple(dict.fromkeys((*named, *wanted))), tuple(dict.fromkeys(wanted))


def is_feedforward(config: IA3Config, path: str) -> bool:
    """Whether the input of the layer at `path` is scaled, and not its output: by PEFT's rule, any ending counts."""
    names = config.feedforward_modules or ()
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path.endswith(name) for name in names)


def _shape(config: IA3Config, weight: WeightShape, r: int) -> Shape:
    """PEFT's shape of the vector: (out, 1) or (1, in) for a linear layer, (1, channels, 1, ...) for a convolution."""
    size = weight.inputs * weight.groups if weight.input_side else weight.outputs
    return (1, size, *(1 for _ in weight.kernel)) if weight.kernel or weight.input_side else (size, 1)


SLOTS = {"ia3_l": Slot(_shape, off=1.0)}


def init(config: IA3Config, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The vector of one site, ones by default."""
    shape = _shape(config, layouts.of_site(site), 0)
    vector = torch.ones(shape) if config.init_ia3_weights else torch.randn(shape, generator=generator)
    return {"ia3_l": like_weight(vector, site.stored, dtype)}


def forward(config: IA3Config, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """l ∘ (W x + b), or W (l ∘ x) + b, in the dtype that the layer has without the method."""
    vector = leaf["ia3_l"]
    if site.kind != layers.CONVOLUTION:
        vector = vector.flatten()
    if site.input_side:
        return site((x.to(vector.dtype) * vector).to(x.dtype), *args, **kwargs)
    y = site(x, *args, **kwargs)
    return (y * vector).to(y.dtype)


def _weight(config: IA3Config, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    """W with its outputs or its inputs scaled."""
    vector = leaf["ia3_l"]
    if not shape.input_side:
        return weight * vector.view(-1, *(1 for _ in weight.shape[1:]))
    groups = vector.shape[1] // weight.shape[1]
    split = weight.reshape(groups, -1, *weight.shape[1:])  # (g, out/g, in/g, *k)
    return (split * vector.view(groups, 1, -1, *vector.shape[2:])).reshape(weight.shape)


def _bias(config: IA3Config, leaf: Mapping[str, Tensor], shape: WeightShape, bias: Tensor) -> Tensor:
    return bias if shape.input_side else bias * leaf["ia3_l"].flatten()


def check_file(config: IA3Config, path: str, leaf: Leaf) -> None:
    """Refuse a vector on the other side of a linear layer than the config has it."""
    if config.feedforward_modules is None:
        raise ValueError("no feedforward_modules in its config, which say what a vector scales,")
    shape = tuple(leaf["ia3_l"].shape)
    side = 0 if is_feedforward(config, path) else 1
    if len(shape) == 2 and shape[side] != 1:
        is_said = "is" if side == 0 else "is not"
        raise ValueError(f"a vector of shape {shape}, and the config says that it {is_said} a feedforward module,")


def combine(
    recipe: Recipe, configs: Sequence[IA3Config], path: str, leaves: Sequence[Leaf | None]
) -> tuple[Leaf, Leaf]:
    """The weighted sum of the vectors, as PEFT's; a site that only some of the adapters have is refused.

    PEFT leaves an adapter without the site out of the sum, which scales the layer by the others' weights alone.
    """
    if recipe.method != "linear":
        raise ValueError(f"combine: method={recipe.method!r}, and (IA)³ has vectors, which have no rank; use 'linear'.")
    there = [leaf for leaf in leaves if leaf is not None]
    if len(there) < len(leaves):
        raise ValueError(
            f"combine: only some of the adapters have the site {path!r}; expected (IA)³ adapters of the same sites."
        )
    vectors = torch.stack([leaf["ia3_l"] for leaf in there])
    weights = torch.stack(list(recipe.weights)).to(vectors.dtype).view(-1, *(1 for _ in vectors.shape[1:]))
    return {"ia3_l": (weights * vectors).sum(0)}, {}


METHOD = Method(
    config=IA3Config,
    slots=SLOTS,
    init=init,
    action=builders.reweighted(_weight, bias=_bias, forward=forward, kinds=(*builders.MATRICES, layers.CONVOLUTION)),
    targets=Targets(resolve, input_side=is_feedforward),
    stacking=Stacking(varies=("feedforward_modules", "init_ia3_weights")),
    files=Files(check_file),
    combining=Combining(combine),
)
