"""What adapters make of a model, as a plan: the forward that each module is to run, and the tensors that it is to have.

`attach` looks at the private modules and writes to none of them; `surgery.install` carries the plan out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.methods import leaf_dtypes
from peftfn.methods.prompt import insert_tokens
from peftfn.models import activation_checkpointing, layers, surgery
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Place, Site
from peftfn.models.surgery import Plan
from peftfn.ops import validate
from peftfn.runtime import attach_call, attach_weights, token_gate
from peftfn.runtime.routing import routed_sites
from peftfn.runtime.site_adapters import SiteAdapter

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
    lasts: bool = False,
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
        lasts: whether the module is called more than once.

    Raises:
        KeyError: an adapter has a site that the model does not have.
        ValueError: a tensor does not fit its site, or two adapters replace the same tensor.
    """
    plan = Plan({}, {}, {}, {}, {})
    gated = any(part.invocations for here in found.values() for part in here)
    noted = token_gate.Noted(lasts) if gated else None
    routed: dict[str, list[tuple[str, Place, Sequence[SiteAdapter]]]] = {}
    for path, here in found.items():
        twin = by_path.get(path)
        if twin is None:
            place = _parameter_place(root, by_path, path)
        else:
            _refuse_unread(by_path, path, here)
            _leave_fast_path(plan, by_path, path, here)
            _replace(plan, twin, path, here, is_lost=wants_grad is not None and not lasts)
            if not any(part.leaf for part in here):
                if path:
                    _watch(plan, [path], path, _trained(here), wants_grad)
                continue
            if any(part.method.on_call is not None for part in here):
                site = Site("", layers.MODEL, surgery.second(root) if apart else root, "")
                _refuse_unfit(site.layer, Place("", "", layers.MODEL), "", here, check)
                generates = wants_grad is not None
                homes = attach_call.adapt(plan, site, by_path, here, generates=generates, lasts=lasts)
                _watch(plan, homes, path, _leaves(here), wants_grad)
                continue
            place = _module_place(root, by_path, path, twin, here)
        _refuse_unfit(by_path[place.owner], place, path, here, check)
        is_read = place.kind in layers.WEIGHT_KINDS or attach_weights.runs_its_own(by_path[place.owner], place)
        if is_read and any(part.rows is not None for part in here):
            routed.setdefault(attach_weights.reader(by_path, place), []).append((path, place, here))
            continue
        runner = _adapt(plan, by_path, place, path, here, noted, is_read=is_read)
        if runner:
            _watch(plan, [runner], path, _leaves(here), wants_grad)
    for reader, sites in routed.items():
        attach_weights.adapt_reader(plan, by_path[reader], found, reader, sites)
        _watch(plan, [reader], reader, [one for _, _, here in sites for one in _leaves(here)], wants_grad)
    if noted is not None:
        _gate(plan, found, noted)
    return plan


def _adapt(
    plan: Plan,
    by_path: Twins,
    place: Place,
    path: str,
    here: Sequence[SiteAdapter],
    noted: token_gate.Noted | None,
    *,
    is_read: bool,
) -> str:
    """Plan what the adapters make of one site, and return the path of the module that runs there."""
    if place.kind in layers.WEIGHT_KINDS:
        attach_weights.adapt_weight(plan, by_path, place, here)
        return attach_weights.reader(by_path, place)
    attach_weights.adapt_reads(plan, by_path[place.owner], place, path, here)
    if not is_read:
        plan.then(place.owner, functools.partial(_adapted, place, path, [part for part in here if part.leaf], noted))
    return place.owner


def masks(found: Found) -> dict[str, Tensor]:
    """The masks that prompts of unlike length make, also where a call has none."""
    lengths = [
        part.leaf[insert_tokens.LENGTH] for here in found.values() for part in here if insert_tokens.LENGTH in part.leaf
    ]
    return {f"{number}_{hf.MASK}": length for number, length in enumerate(lengths)}


def _gate(plan: Plan, found: Found, noted: token_gate.Noted) -> None:
    """Let the model's own call say on which tokens adapters act that do not act on all."""
    parts = [part for here in found.values() for part in here if part.invocations]
    gates = {part.number: token_gate.Gate(part.invocations, part.rows) for part in parts}
    plan.then("", functools.partial(token_gate.noting, gates, noted))


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


def _replace(plan: Plan, twin: nn.Module, path: str, here: Sequence[SiteAdapter], *, is_lost: bool) -> None:
    """Put whole tensors (heads, biases) in place of the twin's; `is_lost`: it trains, and is gone after the call."""
    if is_lost:
        _refuse_statistics(twin, path, here)
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
                own = twin._parameters.get(name)
                if own is not None and leaf_dtypes.in_place_of(own, tensor, part.method) is not tensor:
                    plan.computed[path, name] = functools.partial(leaf_dtypes.held_as, twin, name, own.dtype)
        if part.rows is not None and part.replaced:
            plan.then(path, functools.partial(_replaced_by_row, path, part))


def _refuse_statistics(twin: nn.Module, path: str, here: Sequence[SiteAdapter]) -> None:
    """Refuse to train a BatchNorm along in a module that is gone after the call, and its statistics with it."""
    is_whole = any("running_mean" in part.replaced for part in here)  # not its bias alone
    if twin.training and is_whole and _trained(here):
        raise ValueError(
            f"{path}: the adapter trains this {type(twin).__name__}, whose statistics are gathered in training: apply "
            "writes to nothing, so they would stay as they are. Train through peftfn.bind, which keeps them "
            f"(peftfn.unbind gives them back), or hold them: model.get_submodule({path!r}).eval()."
        )


def _replaced_by_row(path: str, part: SiteAdapter, layer: nn.Module, _run: Callable[..., Any]) -> Callable[..., Any]:
    assert part.rows is not None, "of a routed adapter"
    return routed_sites.replaced(layer, path, part.replaced, part.rows, part.method)


def _adapted(
    place: Place,
    path: str,
    here: Sequence[SiteAdapter],
    noted: token_gate.Noted | None,
    layer: nn.Module,
    run: Callable[..., Any],
) -> Callable[..., Any]:
    """The forward of a layer with one method around the other."""
    for number, part in enumerate(here):
        before = functools.partial(attach_weights.tensors, layer, place, here[:number]) if number else None
        site = layers.site_of(layer, place, path, part.info, run, before)
        action = part.method.on_weights
        takes_rows = part.rows is None or action is None or action.takes_rows(place.kind, part.info.rows)
        if number and part.replaced and not takes_rows:
            raise ValueError(
                f"{path}: the routed adapters replace {', '.join(part.replaced)} of a layer that another active "
                "adapter acts on before them. Apply the routed ones first, or without it (bias='none')."
            )
        act = functools.partial(_acting, part, site)
        run = (
            act(run) if noted is None or not part.invocations else token_gate.gated(noted, part.number, path, act, run)
        )
    return run


def _acting(part: SiteAdapter, site: Site, run: Callable[..., Any]) -> Callable[..., Any]:
    """A site's forward with one method around what it runs."""
    if part.method.on_weights is not None and leaf_dtypes.is_narrower(part.leaf, site.stored.dtype):
        return functools.partial(_acting_wide, part, site, run)
    return _method_around(part, site, run)


def _acting_wide(part: SiteAdapter, site: Site, run: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same, of a leaf in half precision where the layer computes in more: products are taken in the wider dtype."""
    seen = x.dtype if isinstance(x, Tensor) and x.is_floating_point() else site.stored.dtype
    wide = part._replace(leaf=leaf_dtypes.widened(part.leaf, seen))
    return _method_around(wide, site, run)(x, *args, **kwargs)


def _method_around(part: SiteAdapter, site: Site, run: Callable[..., Any]) -> Callable[..., Any]:
    if part.rows is not None:
        return routed_sites.step(part.method, part.config, part.leaf, part.rows, run, site, replaced=part.replaced)
    return functools.partial(part.method.action.forward, part.config, part.leaf, site.running(run))


def _refuse_unfit(twin: nn.Module, place: Place, path: str, here: Sequence[SiteAdapter], check: bool) -> None:
    for part in here:
        if part.leaf and part.invocations and place.kind not in token_gate.KINDS:
            raise token_gate.other_kind(path, place.kind)
        if part.leaf and (check or part.method.on_weights is None):  # methods on whole modules are checked at each call
            one = part.leaf if part.rows is None else {name: tensor[0] for name, tensor in part.leaf.items()}
            validate.refuse_leaf(part.method, part.config, one, layers.site_of(twin, place, path, part.info))


def _leave_fast_path(plan: Plan, by_path: Twins, path: str, here: Sequence[SiteAdapter]) -> None:
    """Keep torch's encoder layer off its fused inference kernel, which reads the tensors past a forward of ours."""
    parent = path.rpartition(".")[0]
    is_run = any(part.leaf or part.rows is not None for part in here)
    if is_run and isinstance(by_path.get(parent), nn.TransformerEncoderLayer):
        plan.attributes[parent, "activation_relu_or_gelu"] = 0
