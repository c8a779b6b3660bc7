"""What a method is: a tuple of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn.adapter import Leaf
from peftfn.config import PeftConfig
from peftfn.layers import Place, Site


class Method(NamedTuple):
    """One way to adapt a layer.

    Attributes:
        config: the config's class.
        held: names of the method's buffers (LoRA: `scaling`).
        names: leaf name -> the ending of its key in PEFT's files (`lora_A` -> `lora_A.weight`).
        resolve: `(model, config) -> config` with what the model decides filled in (default targets, ...).
        sites: `(model, config) -> {site path: Place}`.
        init: `(config, path, site, generator, dtype) -> (params leaf, buffers leaf)`; patterns match `path`.
        buffers: `(config, path, params leaf) -> buffers leaf`, for tensors that come from a file.
        forward: `(config, leaf, site, x) -> y`; `leaf` maps the names of params and buffers to tensors.
        merge: `(config, leaf, kind, weight) -> weight`: the adapted weight, a new dense tensor.
        check: `(leaf, site) -> what is wrong with the leaf's names or shapes`, or `None`.
        kinds: `(leaf, weight shape) -> kinds` of layer that the leaf fits, judged by shapes alone.
        silence: `(leaf, keep) -> leaf` that does nothing where `keep` is 0 (routing's index -1).
        pad: `(configs, path, leaves) -> leaves` of one shape, zeros added so that nothing changes; `None` is an
            adapter without this site.
        trim: `(config, configs, path, leaf) -> leaf`, the inverse of `pad` for one of them.
        to_file: `(leaf) -> leaf` in PEFT's shapes, and `from_file` back, where they differ from ours.
    """

    config: type[PeftConfig]
    held: frozenset[str]
    names: Mapping[str, str]
    resolve: Callable[[nn.Module, Any], Any]
    sites: Callable[[nn.Module, Any], dict[str, Place]]
    init: Callable[[Any, str, Site, torch.Generator, torch.dtype | None], tuple[Leaf, Leaf]]
    buffers: Callable[[Any, str, Leaf], Leaf]
    forward: Callable[..., Any]
    merge: Callable[[Any, Mapping[str, Tensor], str, Tensor], Tensor]
    check: Callable[[Mapping[str, Tensor], Site], str | None]
    kinds: Callable[[Mapping[str, Tensor], torch.Size], list[str]]
    silence: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]
    pad: Callable[[Sequence[Any], str, Sequence[Leaf | None]], list[Leaf]]
    trim: Callable[[Any, Sequence[Any], str, Leaf], Leaf]
    to_file: Callable[[Leaf], Leaf]
    from_file: Callable[[Leaf], Leaf]

    def replaces(self, name: str) -> bool:
        """Whether a leaf's name is not the method's own: then it is a tensor that replaces one of the base."""
        return name not in self.names and name not in self.held
