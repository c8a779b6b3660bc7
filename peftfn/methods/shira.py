"""SHiRA: W + Δ, Δ zero but at r·(in + out) places, whose numbers are trained (https://arxiv.org/abs/2406.13175).

That is as many numbers as a LoRA of rank r has, in an update whose rank nothing limits. The places are drawn once, by
`random_seed` as PEFT draws them or, without one, by the generator of `init`; they are in the adapter's buffers and its
files. For places of your own see `with_masks`.

PEFT has `nn.Linear`; transformers' `Conv1D` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.adapter import Adapter, Leaf
from peftfn.core.config import TargetedConfig
from peftfn.methods import builders, places, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

RANDOM = "random"
DEFAULTS = {**TARGETS, "phi": ("q_proj", "v_proj")}


@dataclasses.dataclass(frozen=True)
class ShiraConfig(TargetedConfig):
    """SHiRA's config, with PEFT's fields and defaults: W + Δ, Δ sparse (https://arxiv.org/abs/2406.13175).

    Attributes:
        r: a layer trains r·(in + out) numbers of Δ, as many as a LoRA of rank r has; no rank is meant.
        mask_type: how their places are chosen: `"random"`. Files may name another way, whose places they hold.
        random_seed: the places are those that PEFT draws by this seed; `None` draws them by the generator of `init`.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        init_weights: `True` (zeros), or `False` (normal numbers: not the identity).

    Raises:
        ValueError: `r` is no positive integer.

    Example:
        >>> import peftfn as pf
        >>> config = pf.ShiraConfig(r=8, random_seed=0, target_modules=["query", "value"])
        >>> config.mask_type
        'random'
    """

    peft_type: ClassVar[str] = "SHIRA"

    r: int = dataclasses.field(default=32, metadata=described("A layer trains r * (in + out) numbers."))
    mask_type: str = dataclasses.field(default=RANDOM, metadata=described("How their places are chosen: random."))
    random_seed: int | None = dataclasses.field(
        default=None, metadata=described("Draws the places, as in PEFT; without it the generator does.")
    )
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    init_weights: bool = dataclasses.field(default=True, metadata=described("True (zeros), or False (normal numbers)."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)


def _count(config: ShiraConfig, weight: WeightShape, r: int) -> Shape:
    return (config.r * (weight.inputs + weight.outputs),)


def _pairs(config: ShiraConfig, weight: WeightShape, r: int) -> Shape:
    return (2, *_count(config, weight, r))


SLOTS = {
    "shira_weight": Slot(_count, off=0.0),
    "shira_indices": Slot(_pairs, trained=False, stored=slots.always),
}


def init(config: ShiraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The numbers, (n,), and their places, (2, n): the output and the input of each, in order."""
    weight = layouts.of_site(site)
    (count,), total = _count(config, weight, 0), weight.outputs * weight.inputs
    if count > total:
        raise ValueError(
            f"{site.path}: r={config.r} asks for {count} numbers, r * (in + out), and its weight has {total}; expected "
            f"r of at most {total // (weight.inputs + weight.outputs)}."
        )
    if config.mask_type != RANDOM:
        raise ValueError(
            f"mask_type={config.mask_type!r} is read from files only; init with mask_type={RANDOM!r}, then give "
            "peftfn.methods.shira.with_masks the adapter and masks of your own."
        )
    if config.random_seed is None:
        where = torch.randperm(total, generator=generator)[:count]
    else:
        where = places.drawn(config.random_seed, total, count, torch.device("cpu"))
    made = torch.zeros(count) if config.init_weights else torch.randn(count, generator=generator)
    values = like_weight(made, site.stored, dtype)
    where = where.to(values.device).sort().values
    pairs = torch.stack([where // weight.inputs, where % weight.inputs])
    return {"shira_weight": values, "shira_indices": pairs.to(torch.int32)}


def with_masks(adapter: Adapter, masks: Mapping[str, Tensor]) -> Adapter:
    """The adapter with its numbers at the places where masks are not zero, in their order.

    Args:
        adapter: a SHiRA adapter.
        masks: by path of a site, (out, in); sites without one stay as they are.

    Raises:
        KeyError: there is no such site.
        ValueError: a mask has another number of places than the adapter has numbers there.

    Example:
        >>> import torch, peftfn as pf
        >>> from peftfn.methods import shira
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapter = pf.init(model, pf.ShiraConfig(r=1, target_modules=["0"]))
        >>> largest = model[0].weight.abs() >= model[0].weight.abs().flatten().topk(8).values[-1]
        >>> shira.with_masks(adapter, {"0": largest}).buffers["0"]["shira_indices"].shape
        torch.Size([2, 8])
    """
    buffers = dict(adapter.buffers)
    for path, mask in masks.items():
        if "shira_indices" not in buffers.get(path, {}):
            raise KeyError(f"with_masks: the adapter has no site {path!r}; it has {', '.join(buffers)}.")
        old, found = buffers[path]["shira_indices"], mask.nonzero().T
        if found.shape != old.shape:
            raise ValueError(
                f"with_masks: the mask of {path!r} has {found.shape[-1]} places, and the adapter {old.shape[-1]} "
                "numbers, r * (in + out); expected one for each."
            )
        buffers[path] = {**buffers[path], "shira_indices": found.to(old)}
    return adapter.replace(buffers=buffers)


def delta(config: ShiraConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """Δ, (out, in)."""
    values, (rows, columns) = leaf["shira_weight"], leaf["shira_indices"].long()
    # Added up, not written: at a site that an adapter of a stack does not have, all places are 0, and all numbers.
    return values.new_zeros(weight.outputs, weight.inputs).index_put((rows, columns), values, accumulate=True)


def check_file(config: ShiraConfig, path: str, leaf: Leaf) -> None:
    """Refuse numbers without places, or with others than there are numbers."""
    if len(leaf) < 2:
        raise KeyError(f"{sorted(leaf)}, but not both of shira_weight and shira_indices")
    count, shape = leaf["shira_weight"].shape[0], tuple(leaf["shira_indices"].shape)
    if shape != (2, count) or count % config.r:
        raise ValueError(f"shira_weight ({count},) and shira_indices {shape}, and the config says r={config.r}")


def _read(config: ShiraConfig, leaf: Leaf) -> Leaf:
    """The leaf with whole numbers for places: PEFT on Windows writes them as floats."""
    return {**leaf, "shira_indices": leaf["shira_indices"].to(torch.int32)}


METHOD = Method(
    config=ShiraConfig,
    slots=SLOTS,
    init=init,
    action=builders.additive(delta, kinds=builders.MATRICES),
    targets=Targets(by_type(DEFAULTS, has_exclusions=False)),
    stacking=Stacking(varies=("random_seed", "mask_type", "init_weights")),
    files=Files(check_file, read=_read),
)
