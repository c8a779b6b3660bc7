"""What methods make of the call of the model itself, as a part of the plan: prompts, prefixes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftfn.methods.prompt import cached_calls, model_call
from peftfn.methods.prompt.own_arguments import OwnArguments
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Site
from peftfn.models.surgery import Plan
from peftfn.runtime.routing import routed_sites
from peftfn.runtime.site_adapters import SiteAdapter


def adapt(
    plan: Plan,
    site: Site,
    by_path: Mapping[str, nn.Module],
    here: Sequence[SiteAdapter],
    *,
    generates: bool,
    lasts: bool,
) -> Sequence[str]:
    """Plan what the methods make of the model's own call, and return the paths of the modules where they change it.

    Args:
        plan: is added to.
        site: the model as a site.
        by_path: its private modules.
        here: what the adapters bring to it.
        generates: whether a model that has a `generate()` of its own, which goes past the modules, is to say so.
        lasts: whether the module is called more than once.
    """
    if any(part.method.on_call is None for part in here if part.leaf):
        raise ValueError("two of the active adapters act on the model itself in unlike ways; apply them apart.")
    root = by_path[""]
    steps: dict[str, list[model_call.Step]] = {}
    for part in here:
        on_call = part.method.on_call
        for home in on_call.call_sites(root) if on_call is not None and part.leaf else ():
            steps.setdefault(home, []).append(_step(part, site))
    noted, own = [0], OwnArguments(arguments(here), lasts)
    if steps and "" not in steps and not torch.compiler.is_compiling():
        plan.then("", functools.partial(_expecting, tuple(steps), noted))
    for home, several in steps.items():
        takes = model_call.Takes.of(by_path[home])
        plan.then(home, functools.partial(_changed_call, takes, several, noted, own))
    if own.names and "" not in steps:
        plan.then("", functools.partial(_taking, own))
    if steps and generates and hf.generates_by_itself(type(root)):
        plan.attributes["", hf.GENERATE] = functools.partial(model_call.generating, root, noted)
    return list(steps)


def arguments(here: Sequence[SiteAdapter]) -> list[str]:
    """The arguments of the model's call that are for the adapters alone."""
    found = [part.method.on_call for part in here if part.leaf]
    return list(dict.fromkeys(name for on_call in found if on_call is not None for name in on_call.arguments))


def _taking(own: OwnArguments, _layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(own.taking, run)


def _expecting(
    homes: tuple[str, ...], noted: list[int], _layer: nn.Module, run: Callable[..., Any]
) -> Callable[..., Any]:
    return functools.partial(model_call.expecting, run, homes, noted)


def _changed_call(
    takes: model_call.Takes,
    steps: Sequence[model_call.Step],
    noted: list[int],
    own: OwnArguments,
    _layer: nn.Module,
    run: Callable[..., Any],
) -> Callable[..., Any]:
    return functools.partial(model_call.run, run, takes, steps, cached_calls.settled, noted, own)


def _step(part: SiteAdapter, site: Site) -> model_call.Step:
    if part.rows is None:
        return functools.partial(part.method.action.forward, part.config, part.leaf, site)
    return functools.partial(routed_sites.of_call, part.method, part.config, part.leaf, part.rows, site)
