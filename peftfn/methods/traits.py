"""What a method says of itself beside its tensors and its action: targets, stacks, files, combinations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from peftfn.core.adapter import Adapter, Leaf, Tree
from peftfn.core.config import PeftConfig
from peftfn.methods.low_rank.weighted_sum import Recipe
from peftfn.models import targets
from peftfn.models.layers import Place, Site

Padded = Callable[[Sequence[Any], str, Sequence[Leaf | None]], list[Leaf]]


def _resolve(model: nn.Module, config: Any) -> Any:
    return targets.resolved(model, config, {})


class Targets(NamedTuple):
    """Where a method acts.

    Attributes:
        resolve: `(model, config) -> config` with what the model decides filled in (default targets, ...).
        sites: `(model, config) -> {site path: Place}`.
        input_side: `(config, path) -> whether it acts on what goes in there`, of a method that acts on either side;
            else `None`, and it acts on outputs.
    """

    resolve: Callable[[nn.Module, Any], Any] = _resolve
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


def _same(leaf: Leaf) -> Leaf:
    return leaf


def _as_read(config: Any, leaf: Leaf) -> Leaf:
    return leaf


class Files(NamedTuple):
    """How a method's files differ from its leaves.

    Attributes:
        check: `(config, path, leaf) -> None`, or a `KeyError` or `ValueError` that says what a file's leaf has.
        config: `(adapter) -> config` for a file, where the adapter's tensors say a part of it.
        write: `(leaf) -> leaf` in PEFT's shapes.
        read: `(config, leaf) -> leaf`, back.
        derived: if it has some, `(config, path, leaf, site) -> buffers leaf` that follows from the base where a file
            has it not; the site is `None` where no model is given, and a `ValueError` says what for it is needed.
        inside: the part of a key before its names where the method goes along with another one.
        copies: the part of a key before the name of a tensor that replaces one of the site's own.
    """

    check: Callable[[Any, str, Leaf], None] = _no_check
    config: Callable[[Adapter], Any] = _as_given
    write: Callable[[Leaf], Leaf] = _same
    read: Callable[[Any, Leaf], Leaf] = _as_read
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


class Companions(NamedTuple):
    """Other methods that a config may ask for beside its own, by one of its fields.

    Attributes:
        field: the field; they are asked for where it is set.
        configs: `(config) -> configs` of them.
    """

    field: str
    configs: Callable[[Any], Sequence[PeftConfig]]
