"""What adapters make of a model, as a plan: the forward that each module is to run, and the tensors that it is to have.

`attach` looks at the private modules and writes to none of them; `surgery.install` carries the plan out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.core.config import PeftConfig
from peftfn.methods.prompt import insert_tokens
from peftfn.models import activation_checkpointing, layers, surgery, twins
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Place, Site
from peftfn.models.surgery import Plan
from peftfn.ops import validate
from peftfn.runtime import attach_call, site_adapters
from peftfn.runtime.routing import routed_sites, vmapped_module
from peftfn.runtime.site_adapters import SiteAdapter
from peftfn.weights import codecs

Found = Mapping[str, Sequence[SiteAdapter]]
Twins = Mapping[str, nn.Module]


def attach(
    root: nn.Module,
    by_path: Twins,
    found: Found,
    wants_grad: Callable[[], bool] | None,
    *,
    check: bool = True,
    apart: bool = False,
) -> Plan:
    """The plan by which the private modules of a model compute what the adapters say.

    Args:
        root: the private object of the whole model.
        by_path: those of all modules, by path.
        found: what the adapters bring, from `site_adapters`.
        wants_grad: says whether the caller wants gradients, so that a site that runs without them is looked at
            (`activation_checkpointing.refuse_lost_gradient`); `None` where nobody does.
        check: whether to hold names and shapes against the layers.
        apart: as of `surgery.install`.

    Raises:
        KeyError: an adapter has a site that the model does not have.
        ValueError: a tensor does not fit its site, or two adapters replace the same tensor.
    """
    plan = Plan({}, {}, {}, {}, {})
    routed: dict[str, list[tuple[str, Place, Sequence[SiteAdapter]]]] = {}
    for path, here in found.items():
        twin = by_path.get(path)
        if twin is None:
            place = _parameter_place(root, by_path, path)
        else:
            _refuse_unread(by_path, path, here)
            _replace(plan, twin, path, here)
            if not any(part.leaf for part in here):
                if path:
                    _watch(plan, [path], path, _trained(here), wants_grad)
                continue
            if any(part.method.on_call is not None for part in here):
                site = Site("", layers.MODEL, surgery.second(root) if apart else root, "")
                _refuse_unfit(site.layer, Place("", "", layers.MODEL), "", here, check)
                homes = attach_call.adapt(plan, site, by_path, here, generates=wants_grad is not None)
                _watch(plan, homes, path, _leaves(here), wants_grad)
                continue
            _leave_fast_path(plan, by_path, path)
            place = _module_place(root, by_path, path, twin, here)
        _refuse_unfit(by_path[place.owner], place, path, here, check)
        is_read = place.kind in layers.WEIGHT_KINDS or _runs_its_own(by_path[place.owner], place)
        if is_read and any(part.rows is not None for part in here):
            routed.setdefault(_reader(by_path, place), []).append((path, place, here))
            continue
        runner = _adapt(plan, by_path, place, path, here, is_read=is_read)
        if runner:
            _watch(plan, [runner], path, _leaves(here), wants_grad)
    for reader, sites in routed.items():
        _adapt_reader(plan, by_path[reader], found, reader, sites)
        _watch(plan, [reader], reader, [one for _, _, here in sites for one in _leaves(here)], wants_grad)
    return plan


def _adapt(plan: Plan, by_path: Twins, place: Place, path: str, here: Sequence[SiteAdapter], *, is_read: bool) -> str:
    """Plan what the adapters make of one site, and return the path of the module that runs there."""
    if place.kind in layers.WEIGHT_KINDS:
        _adapt_weight(plan, by_path, place, here)
        return _reader(by_path, place)
    _read_adapted(plan, by_path[place.owner], place, path, here)
    if not is_read:
        plan.then(place.owner, functools.partial(_adapted, place, path, [part for part in here if part.leaf]))
    return place.owner


def masks(found: Found) -> dict[str, Tensor]:
    """The masks that prompts of unlike length make, also where a call has none."""
    lengths = [
        part.leaf[insert_tokens.LENGTH] for here in found.values() for part in here if insert_tokens.LENGTH in part.leaf
    ]
    return {f"{number}_{hf.MASK}": length for number, length in enumerate(lengths)}


def _leaves(here: Sequence[SiteAdapter]) -> list[Tensor]:
    return [tensor for part in here for tensor in part.leaf.values()]


def _trained(here: Sequence[SiteAdapter]) -> list[Tensor]:
    return [tensor for part in here for name, tensor in part.replaced.items() if name not in part.fixed]


def _watch(
    plan: Plan, modules: Sequence[str], path: str, tensors: Sequence[Tensor], wants_grad: Callable[[], bool] | None
) -> None:
    if wants_grad is not None and tensors:
        for module in modules:
            plan.then(module, functools.partial(_watched, wants_grad, path, tensors))


def _watched(
    wants_grad: Callable[[], bool], path: str, tensors: Sequence[Tensor], _layer: nn.Module, run: Callable[..., Any]
) -> Callable[..., Any]:
    return functools.partial(_watching, run, wants_grad, path, tensors)


def _watching(
    run: Callable[..., Any],
    wants_grad: Callable[[], bool],
    path: str,
    tensors: Sequence[Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled() and wants_grad():
        activation_checkpointing.refuse_lost_gradient(path, tensors)
    return run(*args, **kwargs)


def _parameter_place(root: nn.Module, by_path: Twins, path: str) -> Place:
    owner, _, name = path.rpartition(".")
    twin = by_path.get(owner)
    if twin is not None and name in twin._parameters:
        return layers.place_of_parameter(root, path)
    raise validate.no_such_site(root, path, by_path)


def _module_place(root: nn.Module, by_path: Twins, path: str, twin: nn.Module, here: Sequence[SiteAdapter]) -> Place:
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


def _refuse_unread(by_path: Twins, path: str, here: Sequence[SiteAdapter]) -> None:
    """Refuse a row's own tensor on a layer whose forward never runs, because an attention reads it itself."""
    parent = by_path.get(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and any(part.rows is not None and part.replaced for part in here):
        raise ValueError(
            f"{path}: nn.MultiheadAttention reads the tensors of this layer itself, and the adapters replace "
            f"{', '.join(name for part in here for name in part.replaced)} there: such a tensor cannot differ from row "
            "to row. Leave it out of routed adapters (bias='none'), or apply them one at a time."
        )


def _replace(plan: Plan, twin: nn.Module, path: str, here: Sequence[SiteAdapter]) -> None:
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
                plan.tensors[path, name] = tensor
        if part.rows is not None and part.replaced:
            plan.then(path, functools.partial(_replaced_by_row, path, part))


def _replaced_by_row(path: str, part: SiteAdapter, layer: nn.Module, _run: Callable[..., Any]) -> Callable[..., Any]:
    assert part.rows is not None, "of a routed adapter"
    return routed_sites.replaced(layer, path, part.replaced, part.rows)


def _adapted(
    place: Place, path: str, here: Sequence[SiteAdapter], layer: nn.Module, run: Callable[..., Any]
) -> Callable[..., Any]:
    """The forward of a layer with one method around the other."""
    for number, part in enumerate(here):
        before = functools.partial(_tensors, layer, place, here[:number]) if number else None
        site = layers.site_of(layer, place, path, part.info, run, before)
        if part.rows is None:
            run = functools.partial(part.method.action.forward, part.config, part.leaf, site)
        else:
            run = routed_sites.step(part.method, part.config, part.leaf, part.rows, run, site)
    return run


def _adapt_weight(plan: Plan, by_path: Twins, place: Place, here: Sequence[SiteAdapter]) -> None:
    """Adapt a tensor that the base reads itself."""
    here = [part for part in here if part.leaf]
    plan.computed[place.owner, place.weight] = functools.partial(_merged, by_path[place.owner], place, here)


def _runs_its_own(layer: nn.Module, place: Place) -> bool:
    """Whether the layer is adapted through its weight, because its class computes something of its own with it."""
    return bool(place.weight) and codecs.has_own_forward(layer)


def _read_adapted(plan: Plan, layer: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter]) -> None:
    """Let whoever reads the layer's weight past its forward find the adapted one."""
    if not place.weight or codecs.of(layer) is not codecs.DENSE or place.weight not in layer._parameters:
        return  # a hook or a property makes it, each time
    if twins.has_set_forward(layer):
        return  # it reads the module itself
    acting = [part for part in here if part.leaf]
    names = {"weight"}.union(*(part.method.on_weights.reads for part in acting if part.method.on_weights))
    for name in names:
        if layer._parameters.get(name) is not None:
            plan.reads[place.owner, name] = functools.partial(_read, layer, place, path, acting, name)


def _read(layer: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter], name: str) -> Tensor:
    """A layer's tensor as the adapters make it."""
    if any(part.rows is not None for part in here):
        raise ValueError(
            f"{path}: the model reads this layer's {name} itself, and each row has an adapter of its own: there is no "
            "one value. Leave the layer out of routed adapters (exclude_modules), or apply them one at a time."
        )
    if layer.training and (dropout := [field for part in here for field in _dropouts(part.config)]):
        raise ValueError(
            f"{path}: the model reads this layer's {name} itself, where {dropout[0]} has no meaning: it drops what "
            f"goes into a layer. Set {dropout[0]}=0, or leave the layer out (exclude_modules)."
        )
    tensors = _tensors(layer, place, here)
    return cast("Tensor", tensors[name])


def _dropouts(config: PeftConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    return [name for name in names if getattr(config, name)]


def _reader(by_path: Twins, place: Place) -> str:
    """The path of the module that reads a tensor itself: its owner, or the attention around it."""
    parent = place.owner.rpartition(".")[0]
    return parent if isinstance(by_path.get(parent), nn.MultiheadAttention) else place.owner


def _adapt_reader(
    plan: Plan,
    reader: nn.Module,
    found: Found,
    path: str,
    sites: Sequence[tuple[str, Place, Sequence[SiteAdapter]]],
) -> None:
    """Adapt tensors that a module of the base reads itself, each row's by its own adapter."""
    inside = f"{path}." if path else ""
    others = [one for one in found if one.startswith(inside) and one not in {site for site, _, _ in sites}]
    if others or path in plan.forwards or "forward" in reader.__dict__:
        raise ValueError(
            f"{path}: {type(reader).__name__} reads an adapted weight itself, so it runs a row at a time, and the "
            f"adapters act on {', '.join(others[:3]) or 'it'} in another way too. Leave one of them out of routed "
            "adapters, or apply them one at a time."
        )
    read: list[vmapped_module.Read] = []
    for _, place, here in sites:
        relative = place._replace(owner=place.owner.removeprefix(path).removeprefix("."))
        read.append(vmapped_module.Read(relative, [part for part in here if part.leaf]))
    plan.then(path, functools.partial(_read_by_row, path, read))


def _read_by_row(
    path: str, read: Sequence[vmapped_module.Read], layer: nn.Module, _run: Callable[..., Any]
) -> Callable[..., Any]:
    return vmapped_module.by_row(layer, path, read)


def _refuse_unfit(twin: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter], check: bool) -> None:
    for part in here:
        if part.leaf and (check or part.method.on_weights is None):  # the others are few, and never remembered
            one = part.leaf if part.rows is None else {name: tensor[0] for name, tensor in part.leaf.items()}
            validate.refuse_leaf(part.method, part.config, one, layers.site_of(twin, place, path, part.info))


def _merged(twin: nn.Module, place: Place, here: Sequence[SiteAdapter]) -> Tensor:
    weight = codecs.of(twin).read(twin, place.weight)
    for part in here:
        weight = site_adapters.merged(part, part.leaf, place.kind, {"weight": weight})["weight"]
    return weight


def _tensors(layer: nn.Module, place: Place, before: Sequence[SiteAdapter]) -> dict[str, Tensor | None]:
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


def _leave_fast_path(plan: Plan, by_path: Twins, path: str) -> None:
    """Keep torch's encoder layer off its fused inference kernel, which reads the weights past our forward."""
    parent = path.rpartition(".")[0]
    if isinstance(by_path.get(parent), nn.TransformerEncoderLayer):
        plan.attributes[parent, "activation_relu_or_gelu"] = 0
