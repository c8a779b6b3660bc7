"""What a method is: its tensors, how they begin, and what they do to a layer, an attention or a call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfn.core.adapter import PRESENT, UNKNOWN, Leaf, SiteInfo
from peftfn.core.config import PeftConfig
from peftfn.methods import slots
from peftfn.methods.action import OnAttention, OnCall, OnWeights
from peftfn.methods.slots import Slots
from peftfn.methods.traits import Combining, Companions, Files, Sharing, Stacking, Targets
from peftfn.models import layers, layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


def like_weight(tensor: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor where the weight is; without `dtype`, as float64 where that is so, else as float32."""
    dtype = dtype or (weight.dtype if weight.dtype == torch.float64 else torch.float32)
    return tensor.to("cpu" if weight.is_meta else weight.device, dtype)


def constant(value: float, leaf: Leaf) -> Tensor:
    """A number of the config as a 0-d tensor where the leaf is, in float64 where that is so, else in float32."""
    one = next(iter(leaf.values()))
    return torch.tensor(value, dtype=torch.float64 if one.dtype == torch.float64 else torch.float32, device=one.device)


def _no_constants(config: Any, path: str, leaf: Leaf) -> Leaf:
    return {}


_TARGETS, _STACKING, _FILES = Targets(), Stacking(), Files()


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """One way to adapt a model.

    Attributes:
        config: the config's class.
        slots: the tensors of its leaves, by name.
        init: `(config, path, site, generator, dtype) -> leaf`: the trained tensors, and those buffers that are drawn or
            computed from the base; patterns match `path`.
        action: what it acts on, and what it does there.
        constants: `(config, path, params leaf) -> buffers leaf`: what the config says as tensors (LoRA: `scaling`).
        targets: where it acts.
        stacking: how unlike adapters become one stack.
        files: how its files differ from its leaves.
        combining: how several become one; `None` where there is no weighted combination.
        sharing: how tensors are made that several of its sites share, if it has some.
        companions: adapters of other methods that its config may ask for.
        invocation: the config's field, if it has one, with the tokens from whose last occurrence on the method acts.
        variant: the field of the config that makes it this method's where it is set; another method has the rest.
        on_weights, on_call: the action, of a method that acts on weights, or on the model's call; else `None`.
        of_tables: whether it is about tables of rows, as its action says.
        whole: the kind of its sites where they are whole modules, `layers.ATTENTION` or `layers.MODEL`; else `None`.
    """

    config: type[PeftConfig]
    slots: Slots
    init: Callable[[Any, str, Site, torch.Generator, torch.dtype | None], Leaf]
    action: OnWeights | OnAttention | OnCall
    constants: Callable[[Any, str, Leaf], Leaf] = _no_constants
    targets: Targets = _TARGETS
    stacking: Stacking = _STACKING
    files: Files = _FILES
    combining: Combining | None = None
    sharing: Sharing | None = None
    companions: Companions | None = None
    invocation: str = ""
    variant: str = ""
    on_weights: OnWeights | None = dataclasses.field(init=False)
    on_call: OnCall | None = dataclasses.field(init=False)
    of_tables: bool = dataclasses.field(init=False)
    whole: str | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Find out what kind of action it is, once: a call asks at each site."""
        is_call, is_weights = isinstance(self.action, OnCall), isinstance(self.action, OnWeights)
        object.__setattr__(self, "on_weights", self.action if is_weights else None)
        object.__setattr__(self, "on_call", self.action if is_call else None)
        object.__setattr__(self, "of_tables", self.on_weights is not None and self.on_weights.of_tables)
        kind = layers.MODEL if is_call else layers.ATTENTION
        object.__setattr__(self, "whole", None if is_weights else kind)

    @property
    def called(self) -> str:
        """What its config is called in messages."""
        return self.config.__name__ + (f" with {self.variant}" if self.variant else "")

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """Name of each trained tensor -> the ending of its key in PEFT's files."""
        return {name: slot.key or name for name, slot in self.slots.items() if slot.trained}

    def in_files(self, config: Any) -> dict[str, str]:
        """Name of each tensor of the method that is in a file -> the ending of its key: trained ones, and constants."""
        stored = {name: slot.key or name for name, slot in self.slots.items() if slot.stored(config)}
        return {**self.names, **stored}

    def replaces(self, name: str) -> bool:
        """Whether a leaf's name is not the method's own: then it is a tensor that replaces one of the base."""
        return name not in self.slots and name != PRESENT

    def is_held(self, name: str) -> bool:
        """Whether a leaf's name is that of a buffer of the method."""
        return name in self.slots and not self.slots[name].trained

    def fresh(
        self, config: Any, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
    ) -> tuple[Leaf, Leaf]:
        """The params and buffers of a fresh adapter at one site.

        Raises:
            ValueError: it does not act on this kind of layer, or on a part of one.
        """
        if self.on_weights is not None:
            refuse_other_kinds(self, site)
        return self.parted(config, path, self.init(config, path, site, generator, dtype))

    def parted(self, config: Any, path: str, leaf: Leaf) -> tuple[Leaf, Leaf]:
        """The params of a leaf, and its buffers with what the config says as tensors."""
        params = {name: tensor for name, tensor in leaf.items() if not self.is_held(name)}
        held = {name: tensor for name, tensor in leaf.items() if self.is_held(name)}
        return params, {**held, **self.constants(config, path, params)}

    def check(self, config: Any, leaf: Mapping[str, Tensor], site: Site) -> str | None:
        """What is wrong with a leaf for this site, or `None`."""
        if not isinstance(self.action, OnWeights):
            return self.action.check(leaf, site)
        if site.kind not in self.action.kinds:
            return f"cannot act on this {site.kind}, expected one of {', '.join(self.action.kinds)}"
        ends = [end for _, end in site.rows or ()]
        if ends and max(ends) > site.shape[layouts.output_axis(site.kind)]:
            outputs = site.shape[layouts.output_axis(site.kind)]
            return f"acts on {max(ends)} outputs, expected at most {outputs}"
        return slots.wrong(self.slots, config, layouts.of_site(site), self.stacking.rank(config, site.path), leaf)

    def kinds(
        self, config: Any, path: str, leaf: Mapping[str, Tensor], shape: torch.Size, info: SiteInfo = UNKNOWN
    ) -> list[str]:
        """The kinds of layer that the leaf fits, by the shape of the weight alone."""
        found = self.on_weights.kinds if self.on_weights is not None else ()
        rank = self.stacking.rank(config, path)

        def fits(weight: WeightShape) -> bool:
            if info.rows is not None and info.outputs != weight.outputs:
                return False
            there = layouts.acted_on(weight, info.rows, info.input_side)
            return slots.wrong(self.slots, config, there, rank, leaf) is None

        return [kind for kind in found if any(map(fits, layouts.possible(kind, shape)))]

    def disabled(self, leaf: Mapping[str, Tensor], keep: Tensor) -> Mapping[str, Tensor]:
        """The leaf, or one for each row, that does nothing where `keep` is false (routing's index -1)."""
        if isinstance(self.action, OnWeights):
            return slots.disabled(self.slots, leaf, keep)
        return self.action.disabled(leaf, keep)

    def acting(self, leaf: Mapping[str, Tensor], present: Tensor, *, stacked: bool) -> Mapping[str, Tensor]:
        """The leaf of a stack, or of one of its adapters, as `present` says who acts, or on which of the outputs."""
        if present.dim() == int(stacked):
            return self.disabled(leaf, present)
        return slots.on_outputs(self.slots, leaf, present)

    def trains_neutral(self, leaf: Leaf) -> bool:
        """Whether a leaf that does nothing has gradients: it is off by what is trained, and not by a factor of 0."""
        return any(slot.trained and slot.off is not None for name, slot in self.slots.items() if name in leaf)

    def of_rows(self, leaf: Leaf, kind: str, rows: slice) -> Leaf | None:
        """The leaf that changes these rows of a layer's weight as the given one does; `None` where there is none."""
        if self.on_weights is None or not self.on_weights.by_rows:
            return None
        if kind not in (layers.LINEAR, layers.TRANSPOSED, layers.EMBEDDING):
            return None
        return slots.of_rows(self.slots, leaf, rows, outputs=layouts.output_axis(kind) == 0)

    def pad(self, configs: Sequence[Any], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
        """The leaves of one shape, for a stack; `None` is an adapter without this site."""
        if self.stacking.pad is not None:
            return self.stacking.pad(configs, path, leaves)
        if self.on_weights is None:
            return slots.same_sites(path, leaves)
        ranks = [self.stacking.rank(one, path) for one, leaf in zip(configs, leaves, strict=True) if leaf is not None]
        there = [leaf for leaf in leaves if leaf is not None]
        padded = [self._resized(leaf, rank, max(ranks)) for leaf, rank in zip(there, ranks, strict=True)]
        own = iter(padded)
        return [slots.neutral(self.slots, padded[0]) if leaf is None else next(own) for leaf in leaves]

    def trim(self, config: Any, configs: Sequence[Any], path: str, leaf: Leaf) -> Leaf:
        """The inverse of `pad` for one leaf; `configs` are those of the adapters that have the site."""
        if self.stacking.trim is not None:
            return self.stacking.trim(config, configs, path, leaf)
        rank = self.stacking.rank
        return self._resized(leaf, max(rank(one, path) for one in configs), rank(config, path))

    def _resized(self, leaf: Leaf, old: int, new: int) -> Leaf:
        if self.stacking.resize is not None:
            return self.stacking.resize(leaf, old, new)
        return slots.resized(self.slots, leaf, new)


def refuse_other_kinds(method: Method, site: Site) -> None:
    """A `ValueError` if a method that acts on weights cannot act on a site."""
    action = method.on_weights
    assert action is not None
    what = f"this {site.kind}" if site.kind not in action.kinds else "a part of a fused projection"
    if site.kind in layers.WEIGHT_KINDS:
        what = f"a weight that the base reads itself ({type(site.layer).__name__})"
    if site.kind not in action.kinds or (site.rows is not None and not action.takes_parts):
        name = method.called.replace("Config", "")
        raise ValueError(
            f"{site.path}: {name} cannot act on {what}; expected {' or '.join(action.kinds)}. Leave it out: "
            f"exclude_modules=[{site.path!r}]."
        )
