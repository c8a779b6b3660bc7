"""The parts of a method that are neither its tensors nor its action: targets, stacks, files, combinations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from peftfn.core.adapter import SHARED, Adapter, Leaf, Tree
from peftfn.core.config import PeftConfig
from peftfn.methods.low_rank.weighted_sum import Recipe
from peftfn.models import targets
from peftfn.models.layers import Place, Site

Padded = Callable[[Sequence[Any], str, Sequence[Leaf | None]], list[Leaf]]


def by_type(
    table: Mapping[str, Sequence[str] | str], *, has_exclusions: bool = True
) -> Callable[[nn.Module, Any], Any]:
    """A `Targets.resolve` that fills in what the model decides, with these default targets by the model's type.

    Args:
        table: the type -> names, or a regex.
        has_exclusions: whether PEFT's config has `exclude_modules`; else what is left becomes a regex of paths.
    """

    def resolve(model: nn.Module, config: Any) -> Any:
        found = targets.resolved(model, config, table)
        return found if has_exclusions else targets.without_exclusions(model, found)

    return resolve


class Targets(NamedTuple):
    """Where a method acts.

    Attributes:
        resolve: `(model, config) -> config` with what the model decides filled in (default targets, ...).
        sites: `(model, config) -> {site path: Place}`.
        input_side: `(config, path) -> whether it acts on what goes in there`, of a method that acts on either side;
            else `None`, and it acts on outputs.
    """

    resolve: Callable[[nn.Module, Any], Any] = by_type({})
    sites: Callable[[nn.Module, Any], dict[str, Place]] = targets.sites
    input_side: Callable[[Any, str], bool] | None = None


def _no_rank(config: Any, path: str) -> int:
    return 0


def _first(configs: Sequence[Any]) -> Any:
    return configs[0]


class Stacking(NamedTuple):
    """What is needed to put adapters that differ into one stack; by default, what the slots say.

    Attributes:
        rank: `(config, path) -> rank` of a site.
        resize: `(leaf, old rank, new rank) -> leaf`, where the slots' axes do not say it.
        pad: `(configs, path, leaves) -> leaves` of one shape, params and buffers; `None` is one without this site.
        trim: `(config, configs, path, leaf) -> leaf`, the inverse of `pad` for one of them.
        shared: `(configs) -> config` that a forward reads for all adapters of a stack.
        varies: the method's own fields of the config in which they may differ: what they say is in the tensors.
    """

    rank: Callable[[Any, str], int] = _no_rank
    resize: Callable[[Leaf, int, int], Leaf] | None = None
    pad: Padded | None = None
    trim: Callable[[Any, Sequence[Any], str, Leaf], Leaf] | None = None
    shared: Callable[[Sequence[Any]], Any] = _first
    varies: Sequence[str] = ()


def _no_check(config: Any, path: str, leaf: Leaf) -> None:
    return None


def _as_given(adapter: Adapter) -> Any:
    return adapter.config


def _same(config: Any, leaf: Leaf) -> Leaf:
    return leaf


class Files(NamedTuple):
    """How a method's files differ from its leaves.

    Attributes:
        check: `(config, path, leaf) -> None`, or a `KeyError` or `ValueError` that says what a file's leaf has.
        config: `(adapter) -> config` for a file, where the adapter's tensors say a part of it.
        write: `(config, leaf) -> leaf` as PEFT's files have it.
        read: `(config, leaf) -> leaf`, back.
        derived: `(config, path, leaf, site) -> buffers leaf`, computed from the base where a file lacks it; `None`
            where there is no such part. The site is `None` where no model is given: then it raises a `ValueError`
            that says what the model is needed for.
        inside: what a key has before the tensor's name where the adapter is a companion: `<path>.<inside>.<name>`.
        copies: the part of a key before the name of a tensor that replaces one of the site's own.
    """

    check: Callable[[Any, str, Leaf], None] = _no_check
    config: Callable[[Adapter], Any] = _as_given
    write: Callable[[Any, Leaf], Leaf] = _same
    read: Callable[[Any, Leaf], Leaf] = _same
    derived: Callable[[Any, str, Leaf, Site | None], Leaf] | None = None
    inside: str = ""
    copies: str = ""


def _same_config(config: Any, adapters: Sequence[Adapter], params: Tree) -> Any:
    return config


class Combining(NamedTuple):
    """How several adapters become one.

    Attributes:
        leaf: `(recipe, configs, path, leaves) -> (params leaf, buffers leaf)`, the weighted combination at one site;
            `None` is an adapter without this site.
        config: `(config, adapters, params) -> config` of it, from one that has their targets already.
    """

    leaf: Callable[[Recipe, Sequence[Any], str, Sequence[Leaf | None]], tuple[Leaf, Leaf]]
    config: Callable[[Any, Sequence[Adapter], Tree], Any] = _same_config


def _all_share(config: Any, paths: Sequence[str], sites: Mapping[str, Site]) -> dict[str, str]:
    return dict.fromkeys(paths, SHARED)


class Sharing(NamedTuple):
    """Tensors that several sites of an adapter have in common.

    Attributes:
        init: `(config, {path: Site}, generator, dtype) -> leaves` at `SHARED` and below, or also of sites where they
            depend on all of them; trained tensors and others. Sites are in the model's order.
        homes: `(config, site paths, {path: Site}) -> {site path: path of the leaf that it shares}`. The sites are in
            the model's order, and empty where no model is given: then it raises a `ValueError` if it needs them.
        derived: `(config, {path: leaf}, {path: Site}) -> leaves` that a file has not, as `Files.derived` has those of
            one site; the sites are in the model's order, and empty where no model is given.
    """

    init: Callable[[Any, Mapping[str, Site], torch.Generator, torch.dtype | None], Tree]
    homes: Callable[[Any, Sequence[str], Mapping[str, Site]], dict[str, str]] = _all_share
    derived: Callable[[Any, Tree, Mapping[str, Site]], Tree] | None = None


class Companions(NamedTuple):
    """The companions of a method: adapters of other methods that a config asks for by one of its fields.

    Attributes:
        field: the field; they are asked for where it is set.
        configs: `(config) -> configs` of them.
    """

    field: str
    configs: Callable[[Any], Sequence[PeftConfig]]
