"""Putting adapters on twins: each site's chain of methods, and tensors that replace the base's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.methods.prompt import cached_calls, insert_tokens, model_call
from peftfn.models import activation_checkpointing, attention_masks, layers, surgery
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Place, Site
from peftfn.ops import validate
from peftfn.runtime import site_adapters
from peftfn.runtime.routing import routed_sites, vmapped_module
from peftfn.runtime.site_adapters import AttachOptions, SiteAdapter
from peftfn.weights import codecs


def attach(
    root: nn.Module, by_path: Mapping[str, nn.Module], found: Mapping[str, Sequence[SiteAdapter]], how: AttachOptions
) -> None:
    """Make the twins of the sites compute what the adapters say.

    Args:
        root: the twin of the whole model.
        by_path: the twins, by module path.
        found: what the adapters bring, from `parts`.
        how: the rest.

    Raises:
        KeyError: an adapter has a site that the model does not have.
        ValueError: a tensor does not fit its site, or two adapters replace the same tensor.
    """
    routed: dict[str, list[tuple[str, Place, Sequence[SiteAdapter]]]] = {}
    for path, here in found.items():
        twin = by_path.get(path)
        if twin is None:
            place = _parameter_place(root, by_path, path)
        else:
            _refuse_unread(by_path, path, here)
            _replace(twin, path, here, how)
            if not any(part.leaf for part in here):
                _watch_replaced(twin, path, here, how)
                continue
            if any(part.method.on_call is not None for part in here):
                _adapt_model(root, by_path, here, how)
                continue
            _leave_fast_path(by_path, path)
            place = _module_place(root, by_path, path, twin, here)
        if place.kind not in layers.WEIGHT_KINDS:
            _adapt(by_path[place.owner], place, path, here, how)
        elif any(part.rows is not None for part in here):
            routed.setdefault(_reader(by_path, place), []).append((path, place, here))
        else:
            _adapt_weight(by_path, place, path, here, how)
    for reader, sites in routed.items():
        _adapt_reader(by_path, found, reader, sites, how)


def _parameter_place(root: nn.Module, by_path: Mapping[str, nn.Module], path: str) -> Place:
    owner, _, name = path.rpartition(".")
    twin = by_path.get(owner)
    if twin is not None and name in twin._parameters:
        return layers.place_of_parameter(root, path)
    raise validate.no_such_site(root, path, by_path)


def _adapt_model(
    root: nn.Module, by_path: Mapping[str, nn.Module], here: Sequence[SiteAdapter], how: AttachOptions
) -> None:
    """Adapt the call of the model itself, wherever in it each method changes it."""
    if any(part.method.on_call is None for part in here if part.leaf):
        raise ValueError("two of the active adapters act on the model itself in unlike ways; apply them apart.")
    place = Place("", "", layers.MODEL)
    site = Site("", place.kind, surgery.second(root) if how.apart else root, place.weight)
    steps: dict[str, list[model_call.Step]] = {}
    tensors: list[Tensor] = []
    _refuse_unfit(site.layer, place, "", here, how)
    for part in here:
        on_call = part.method.on_call
        for home in on_call.call_sites(root) if on_call is not None and part.leaf else ():
            steps.setdefault(home, []).append(_step(part, site))
        tensors += part.leaf.values()
        if insert_tokens.LENGTH in part.leaf:  # prompts of unlike length make a mask, also where none is given
            attention_masks.suit(by_path.values(), {hf.MASK: part.leaf[insert_tokens.LENGTH]})
    noted = [0]
    if steps and "" not in steps and not torch.compiler.is_compiling():
        run = surgery.base_forward(surgery.second(root) if how.apart else root)
        surgery.set_forward(root, functools.partial(model_call.expecting, run, tuple(steps), noted))
    for home, several in steps.items():
        twin = by_path[home]
        run = surgery.base_forward(surgery.second(twin) if how.apart else twin)
        run = functools.partial(model_call.run, run, model_call.Takes.of(twin), several, cached_calls.settled, noted)
        surgery.set_forward(
            twin,
            run
            if how.wants_grad is None
            else functools.partial(activation_checkpointing.watched, run, how.wants_grad, home, tensors),
        )
    if steps and how.wants_grad is not None and hf.generates_by_itself(type(root)):
        root.__dict__[hf.GENERATE] = functools.partial(model_call.generating, root, noted)


def _step(part: SiteAdapter, site: Site) -> model_call.Step:
    if part.rows is None:
        return functools.partial(part.method.action.forward, part.config, part.leaf, site)
    return functools.partial(routed_sites.of_call, part.method, part.config, part.leaf, part.rows, site)


def _module_place(
    root: nn.Module, by_path: Mapping[str, nn.Module], path: str, twin: nn.Module, here: Sequence[SiteAdapter]
) -> Place:
    whole = next((part.method.whole for part in here if part.leaf and part.method.whole), None)
    if whole is not None:
        return Place(path, "", whole)
    kind = layers.kind_of(twin)
    if kind is not None:
        parent = by_path.get(path.rpartition(".")[0]) if path else None
        return Place(path, "weight", layers.PARAMETER if isinstance(parent, nn.MultiheadAttention) else kind)
    place = layers.places(root, path).get(path)
    if place is None:
        raise ValueError(
            f"the adapter acts on {path!r}, which is a {type(twin).__name__} here: no method acts on that."
        )
    return place


def _refuse_unread(by_path: Mapping[str, nn.Module], path: str, here: Sequence[SiteAdapter]) -> None:
    """Refuse a row's own tensor on a layer whose forward never runs, because an attention reads it itself."""
    parent = by_path.get(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and any(part.rows is not None and part.replaced for part in here):
        raise ValueError(
            f"{path}: nn.MultiheadAttention reads the tensors of this layer itself, and the adapters replace "
            f"{', '.join(name for part in here for name in part.replaced)} there: such a tensor cannot differ from row "
            "to row. Leave it out of routed adapters (bias='none'), or apply them one at a time."
        )


def _replace(twin: nn.Module, path: str, here: Sequence[SiteAdapter], how: AttachOptions) -> None:
    """Put whole tensors (heads, biases) in place of the twin's."""
    taken: set[str] = set()
    for part in here:
        for name, tensor in part.replaced.items():
            if name in taken:
                raise ValueError(f"two of the active adapters replace {path}.{name}; only one can. Apply them apart.")
            taken.add(name)
            shape = tensor.shape if part.rows is None else tensor.shape[1:]
            validate.refuse_replacement(twin, path, name, shape, name in part.fixed)
            if part.rows is None:
                surgery.put(twin, name, tensor)
        if part.rows is not None and part.replaced:
            layer = surgery.second(twin) if how.apart else twin
            surgery.set_forward(twin, routed_sites.replaced(layer, path, part.replaced, part.rows))


def _watch_replaced(twin: nn.Module, path: str, here: Sequence[SiteAdapter], how: AttachOptions) -> None:
    trained = [tensor for part in here for name, tensor in part.replaced.items() if name not in part.fixed]
    if how.wants_grad is not None and path and trained:
        run = surgery.base_forward(surgery.second(twin) if how.apart else twin)
        surgery.set_forward(
            twin, functools.partial(activation_checkpointing.watched, run, how.wants_grad, path, trained)
        )


def _adapt(twin: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter], how: AttachOptions) -> None:
    _refuse_unfit(twin, place, path, here, how)
    here = [part for part in here if part.leaf]
    layer = surgery.second(twin) if how.apart else twin
    run = surgery.base_forward(layer)
    for number, part in enumerate(here):
        adapted = functools.partial(_adapted, layer, place, here[:number]) if number else None
        site = validate.site_of(layer, place, path, part.info, run, adapted)
        if part.rows is None:
            run = functools.partial(part.method.action.forward, part.config, part.leaf, site)
        else:
            run = routed_sites.step(part.method, part.config, part.leaf, part.rows, run, site)
    surgery.set_forward(twin, _with_watch(run, path, here, how))


def _adapt_weight(
    by_path: Mapping[str, nn.Module], place: Place, path: str, here: Sequence[SiteAdapter], how: AttachOptions
) -> None:
    """Adapt a tensor that the base reads itself."""
    twin = by_path[place.owner]
    _refuse_unfit(twin, place, path, here, how)
    here = [part for part in here if part.leaf]
    how.hold(twin, place.weight, functools.partial(_merged, twin, place, here))
    reader = by_path[_reader(by_path, place)]
    if how.wants_grad is not None and reader is not by_path[""]:
        run = surgery.base_forward(surgery.second(reader) if how.apart else reader)
        surgery.set_forward(reader, _with_watch(run, path, here, how))


def _reader(by_path: Mapping[str, nn.Module], place: Place) -> str:
    """The path of the module that reads a tensor itself: its owner, or the attention around it."""
    parent = place.owner.rpartition(".")[0]
    return parent if isinstance(by_path.get(parent), nn.MultiheadAttention) else place.owner


def _adapt_reader(
    by_path: Mapping[str, nn.Module],
    found: Mapping[str, Sequence[SiteAdapter]],
    path: str,
    sites: Sequence[tuple[str, Place, Sequence[SiteAdapter]]],
    how: AttachOptions,
) -> None:
    """Adapt tensors that a module of the base reads itself, each row's by its own adapter."""
    reader, inside = by_path[path], f"{path}." if path else ""
    others = [one for one in found if one.startswith(inside) and one not in {site for site, _, _ in sites}]
    if others or "forward" in reader.__dict__:
        raise ValueError(
            f"{path}: {type(reader).__name__} reads an adapted weight itself, so it runs a row at a time, and the "
            f"adapters act on {', '.join(others[:3]) or 'it'} in another way too. Leave one of them out of routed "
            "adapters, or apply them one at a time."
        )
    read: list[vmapped_module.Read] = []
    for site, place, here in sites:
        _refuse_unfit(by_path[place.owner], place, site, here, how)
        relative = place._replace(owner=place.owner.removeprefix(path).removeprefix("."))
        read.append(vmapped_module.Read(relative, [part for part in here if part.leaf]))
    run = vmapped_module.by_row(surgery.second(reader) if how.apart else reader, path, read)
    surgery.set_forward(reader, _with_watch(run, path, [part for one in read for part in one.here], how))


def _with_watch(
    run: Callable[..., Any], path: str, here: Sequence[SiteAdapter], how: AttachOptions
) -> Callable[..., Any]:
    if how.wants_grad is None:
        return run
    return functools.partial(
        activation_checkpointing.watched,
        run,
        how.wants_grad,
        path,
        [tensor for part in here for tensor in part.leaf.values()],
    )


def _refuse_unfit(twin: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter], how: AttachOptions) -> None:
    for part in here:
        if part.leaf and (how.check or part.method.on_weights is None):  # the others are few, and never remembered
            one = part.leaf if part.rows is None else {name: tensor[0] for name, tensor in part.leaf.items()}
            validate.refuse_leaf(part.method, part.config, one, validate.site_of(twin, place, path, part.info))


def _merged(twin: nn.Module, place: Place, here: Sequence[SiteAdapter]) -> Tensor:
    weight = codecs.of(twin).read(twin, place.weight)
    for part in here:
        weight = site_adapters.merged(part, part.leaf, place.kind, {"weight": weight})["weight"]
    return weight


def _adapted(layer: nn.Module, place: Place, before: Sequence[SiteAdapter]) -> dict[str, Tensor | None]:
    """A layer's weight and bias as the adapters before another one leave them."""
    weight, bias = codecs.of(layer).read(layer, place.weight), codecs.bias(layer)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for part in before:
        if part.rows is not None:
            raise ValueError(
                f"{place.name}: an adapter of one row each acts here before one that reads the weight, which then has "
                "no one value. Put the other adapter first, or apply them apart."
            )
        tensors |= site_adapters.merged(part, part.leaf, place.kind, tensors)
    return {"bias": None, **tensors}


def _leave_fast_path(by_path: Mapping[str, nn.Module], path: str) -> None:
    """Keep torch's encoder layer off its fused inference kernel, which reads the weights past our forward."""
    parent = by_path.get(path.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.__dict__["activation_relu_or_gelu"] = 0
