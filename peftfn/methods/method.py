"""What a method is: a tuple of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn import layers, targets
from peftfn.adapter import Adapter, Leaf, Tree
from peftfn.config import PeftConfig
from peftfn.layers import Place, Site
from peftfn.mixing import Recipe


def like_weight(tensor: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor where the weight is; without `dtype`, as float64 where that is so, else as float32."""
    dtype = dtype or (weight.dtype if weight.dtype == torch.float64 else torch.float32)
    return tensor.to("cpu" if weight.is_meta else weight.device, dtype)


def refuse_other_kinds(name: str, site: Site, kinds: Sequence[str]) -> None:
    """A `ValueError` if a method cannot act on a site."""
    what = f"this {site.kind}" if site.kind not in kinds else "a part of a fused projection"
    if site.kind in layers.WEIGHT_KINDS:
        what = f"a weight that the base reads itself ({type(site.layer).__name__})"
    if site.kind not in kinds or site.rows is not None:
        raise ValueError(
            f"{site.path}: {name} cannot act on {what}, in peft neither; expected {' or '.join(kinds)}. Leave it out: "
            f"exclude_modules=[{site.path!r}]."
        )


def _resolve(model: nn.Module, config: Any) -> Any:
    return targets.resolved(model, config, {})


def _no_buffers(config: Any, path: str, leaf: Leaf) -> Leaf:
    return {}


def _no_check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    return None


def _no_check_of_file(config: Any, path: str, leaf: Leaf) -> None:
    return None


def _one_by_one(leaf: Mapping[str, Tensor], kind: str) -> bool:
    return False


def _linear(leaf: Mapping[str, Tensor], weight: torch.Size) -> list[str]:
    return [layers.LINEAR]


def _not_by_rows(leaf: Leaf, kind: str, rows: slice) -> Leaf | None:
    return None


def _alike(configs: Sequence[Any], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    found = [leaf for leaf in leaves if leaf is not None]
    if len(found) < len(leaves):
        raise ValueError(f"stack: only some of the adapters have the site {path}, and this method cannot fill it in.")
    return found


def _first(configs: Sequence[Any]) -> Any:
    return configs[0]


def _as_it_is(config: Any, configs: Sequence[Any], path: str, leaf: Leaf) -> Leaf:
    return leaf


def _no_combination(recipe: Recipe, configs: Sequence[Any], path: str, leaves: Sequence[Leaf | None]) -> Any:
    raise ValueError(f"combine: {type(configs[0]).__name__} has no weighted combination.")


def _same_config(config: Any, adapters: Sequence[Adapter], params: Tree) -> Any:
    return config


def _as_given(adapter: Adapter) -> Any:
    return adapter.config


def _same(leaf: Leaf) -> Leaf:
    return leaf


def _itself(model: nn.Module) -> Sequence[str]:
    return ("",)


def refuse_merge(
    config: Any, leaf: Mapping[str, Tensor], kind: str, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """For methods that change what a module is given, not a weight."""
    raise ValueError(
        f"{type(config).__name__}: this method changes what the model is given, not its weights, so it cannot be "
        "merged. Run it with peftfn.apply or peftfn.bind."
    )


class Method(NamedTuple):
    """One way to adapt a layer. The first six fields are a method; the others have defaults.

    Attributes:
        config: the config's class, a `TargetedConfig`.
        names: leaf name -> the ending of its key in PEFT's files (`lora_A` -> `lora_A.weight`).
        init: `(config, path, site, generator, dtype) -> (params leaf, buffers leaf)`; patterns match `path`.
        forward: `(config, leaf, site, x) -> y`; `leaf` maps the names of params and buffers to tensors.
        merge: `(config, leaf, kind, tensors) -> tensors`: of the layer's `weight` (dense) and, where it has one, its
            `bias`, those that change. A tensor that the base reads itself comes alone, as the `weight`.
        silence: `(leaf, keep) -> leaf` that does nothing where `keep` is 0 (routing's index -1).
        takes_rows: `(leaf, kind) -> whether forward takes a leaf of which each tensor has an axis for the rows of x
            before the others`; where it does not, `torch.vmap` gives it one row at a time.
        reads: those of the layer's tensors that `merge` is given; the others stay as they are.
        of_rows: `(leaf, kind, rows) -> leaf` that merges into these rows of a weight alone as the given one does into
            all of it; `None` where there is no such leaf.
        encoded: `(config, leaf, site) -> leaf`: what the leaf's network makes of it, which is what rows share; of a
            method that has one.
        held: names of the method's buffers (LoRA: `scaling`).
        resolve: `(model, config) -> config` with what the model decides filled in (default targets, ...).
        sites: `(model, config) -> {site path: Place}`.
        buffers: `(config, path, params leaf) -> buffers leaf`, for tensors that come from a file.
        check: `(leaf, site) -> what is wrong with the leaf's names or shapes`, or `None`.
        check_file: `(config, path, leaf) -> None`, or a `KeyError` or `ValueError` that says what a file's leaf has.
        kinds: `(leaf, weight shape) -> kinds` of layer that the leaf fits, judged by shapes alone.
        pad: `(configs, path, leaves) -> leaves` (params and buffers together) of one shape, filled up so that nothing
            changes; `None` is an adapter without this site.
        by_column: names of the matrices whose columns a stack holds in one piece each (see `peftfn.slices`).
        trim: `(config, configs, path, leaf) -> leaf`, the inverse of `pad` for one of them.
        shared: `(configs) -> config` that a forward reads for all adapters of a stack.
        combine: `(recipe, configs, path, leaves) -> (params leaf, buffers leaf)`, the weighted combination at one site;
            `None` is an adapter without this site.
        combined: `(config, adapters, params) -> config` of their combination, from one that has their targets already.
        file_config: `(adapter) -> config` for a file, where the adapter's tensors say a part of it.
        to_file: `(leaf) -> leaf` in PEFT's shapes, and `from_file` back, where they differ from ours.
        kind: of a method that acts on whole modules, `layers.ATTENTION` or `layers.MODEL`; `None` acts on layers, which
            have kinds of their own. Whole modules have no weight, so there is nothing to merge.
        homes: `(model) -> paths` of the modules whose call a method of kind `MODEL` changes. There `forward` is
            `(config, leaf, site, call) -> call` on a `peftfn.calls.Call`, and the site's layer is the model.
    """

    config: type[PeftConfig]
    names: Mapping[str, str]
    init: Callable[[Any, str, Site, torch.Generator, torch.dtype | None], tuple[Leaf, Leaf]]
    forward: Callable[..., Any]
    merge: Callable[[Any, Mapping[str, Tensor], str, Mapping[str, Tensor]], Mapping[str, Tensor]]
    silence: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]
    takes_rows: Callable[[Mapping[str, Tensor], str], bool] = _one_by_one
    reads: Sequence[str] = ("weight", "bias")
    of_rows: Callable[[Leaf, str, slice], Leaf | None] = _not_by_rows
    encoded: Callable[[Any, Mapping[str, Tensor], Site], Mapping[str, Tensor]] | None = None
    held: frozenset[str] = frozenset()
    resolve: Callable[[nn.Module, Any], Any] = _resolve
    sites: Callable[[nn.Module, Any], dict[str, Place]] = targets.sites
    buffers: Callable[[Any, str, Leaf], Leaf] = _no_buffers
    check: Callable[[Mapping[str, Tensor], Site], str | None] = _no_check
    check_file: Callable[[Any, str, Leaf], None] = _no_check_of_file
    kinds: Callable[[Mapping[str, Tensor], torch.Size], list[str]] = _linear
    pad: Callable[[Sequence[Any], str, Sequence[Leaf | None]], list[Leaf]] = _alike
    by_column: frozenset[str] = frozenset()
    trim: Callable[[Any, Sequence[Any], str, Leaf], Leaf] = _as_it_is
    shared: Callable[[Sequence[Any]], Any] = _first
    combine: Callable[[Recipe, Sequence[Any], str, Sequence[Leaf | None]], tuple[Leaf, Leaf]] = _no_combination
    combined: Callable[[Any, Sequence[Adapter], Tree], Any] = _same_config
    file_config: Callable[[Adapter], Any] = _as_given
    to_file: Callable[[Leaf], Leaf] = _same
    from_file: Callable[[Leaf], Leaf] = _same
    kind: str | None = None
    homes: Callable[[nn.Module], Sequence[str]] = _itself

    def replaces(self, name: str) -> bool:
        """Whether a leaf's name is not the method's own: then it is a tensor that replaces one of the base."""
        return name not in self.names and name not in self.held
