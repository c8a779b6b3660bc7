"""`init` makes an adapter for a base; `apply` runs the base with adapters, and writes to nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn import (
    attach,
    checked,
    codecs,
    graft,
    layers,
    layouts,
    masks,
    matching,
    methods,
    parts,
    rows,
    targets,
    twins,
)
from peftfn.adapter import Adapter, SiteInfo, Tree, as_tuple, sorted_tree
from peftfn.config import PeftConfig


def init(
    model: nn.Module,
    config: PeftConfig,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """A fresh adapter for the model: with the default init, one that changes nothing yet.

    A pure function: the same arguments give the same adapter, and the model and the global random state are left
    as they are.

    Args:
        model: the base; only its structure, shapes, dtypes and devices are read. It may be on the meta device.
        config: what to adapt, and how.
        generator: where random numbers come from; by default a new one seeded with 0. Give differently seeded ones
            to get different adapters.
        dtype: of the method's tensors. By default the weight's own, but float32 for a half-precision or packed one.

    Returns:
        The adapter. Its `config` is the given one with what the model decided filled in: target modules, heads, the
        base's name.

    Raises:
        ValueError: the config names nothing in this model (near names are offered), or something that its method
            cannot act on.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
        >>> {path: sorted(leaf) for path, leaf in adapter.params.items()}
        {'0': ['lora_A', 'lora_B'], '2': ['bias', 'weight']}
    """
    method = methods.of(config)
    targets.check_task(model, config.task_type)
    heads = matching.HEADS.get(config.task_type or "", ())
    resolved = method.targets.resolve(model, config)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    params: Tree = {}
    buffers: Tree = {}
    sites: dict[str, SiteInfo] = {}
    places = method.targets.sites(model, resolved)
    with generator.device:  # where numbers are drawn, whatever torch's default device is; methods move them
        for path, place in places.items():
            owner, at = model.get_submodule(place.owner), layers.pattern_path(path, places)
            side = method.targets.input_side(resolved, at)
            site = layers.Site(path, place.kind, owner, place.weight, rows=place.rows, input_side=side)
            sites[path] = _noted(site)
            params[path], buffers[path] = method.fresh(resolved, at, site, generator, dtype)
            params[path] = _detached(params[path])
    _add_replaced(model, resolved, heads, places, params, buffers)
    resolved = _with_base(model, resolved, any(place.kind == layers.TRANSPOSED for place in places.values()))
    return Adapter(sorted_tree(params), sorted_tree(buffers), resolved, sites)


def _noted(site: layers.Site) -> SiteInfo:
    outputs = 0 if site.rows is None else site.shape[layouts.output_axis(site.kind)]
    return SiteInfo(site.kind, site.rows, outputs, site.input_side)


def _detached(leaf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in leaf.items()}


def _add_replaced(
    model: nn.Module,
    config: PeftConfig,
    heads: Sequence[str],
    places: Mapping[str, layers.Place],
    params: Tree,
    buffers: Tree,
) -> None:
    """Whole modules (`modules_to_save`) and biases that are trained beside the method: copies of the base's own."""
    names = cast("Sequence[str]", getattr(config, "modules_to_save", None) or ())
    for path, module in targets.saved_modules(model, names, optional=heads).items():
        trained, kept = _own(module)
        params.setdefault(path, {}).update(_copies(trained))
        buffers.setdefault(path, {}).update(_copies(kept))
    bias = getattr(config, "bias", "none")
    adapted = list(places) if bias.endswith("_only") else []
    paths = [path for path, _ in layers.named_modules(model)] if bias == "all" else adapted
    for path in paths:
        owner = model.get_submodule(places[path].owner) if path in places else model.get_submodule(path)
        at = places[path].owner if path in places else path
        params.setdefault(at, {}).update(_copies({"bias": codecs.bias(owner)}))


def _own(module: nn.Module) -> tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]]:
    """A module's parameters and persistent buffers; a packed weight, which cannot be trained as it is, is dense."""
    codec = codecs.of(module)
    if codec is not codecs.DENSE:
        return {"weight": codec.read(module, "weight"), "bias": codecs.bias(module)}, {}
    gone = module._non_persistent_buffers_set
    return module._parameters, {name: buffer for name, buffer in module._buffers.items() if name not in gone}


def _copies(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}


def _with_base(model: nn.Module, config: PeftConfig, transposed: bool) -> PeftConfig:
    changes: dict[str, Any] = {}
    if config.base_model_name_or_path is None:
        found = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
        if isinstance(found, str) and found:
            changes["base_model_name_or_path"] = found
    if config.task_type is None and config.auto_mapping is None:
        changes["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    if getattr(config, "fan_in_fan_out", transposed) != transposed:
        changes["fan_in_fan_out"] = transposed  # as PEFT, which corrects it from the layers that it finds
    return dataclasses.replace(config, **changes)


def apply(
    model: nn.Module,
    adapter: Adapter | Iterable[Adapter],
    batch: Any,
    *,
    params: Mapping[str, Tensor] | None = None,
    index: Any = None,
) -> Any:
    """What `model(**batch)` returns, adapted.

    The model is a constant: nothing is written to it, it gets no gradient, and other threads may use it. Everything
    else is differentiable and can be mapped: the adapter's tensors, the batch, and `params`.

    Args:
        model: the base, any `nn.Module`, in training or evaluation mode as it is to be run.
        adapter: one adapter, or several that are active together (in this order); `()` is the base itself. A stack
            is mapped by `torch.vmap`, or routed by `index`.
        batch: a mapping is keyword arguments, a tuple or list positional ones, a tensor the only argument.
        params: base parameters and buffers by name, in place of the model's own: any part of
            `dict(model.named_parameters())` or a state dict; all of them for a model on the meta device.
        index: for a stack, the number of the adapter for each row of the batch, -1 for the bare base. With a number
            for each token, (rows, tokens), linear and embedding layers treat each token with its own adapter.

    Raises:
        TypeError: batch, adapter or index is of the wrong type.
        KeyError: the adapter or `params` names something that the model does not have.
        ValueError: a tensor does not fit.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> x = torch.ones(3, 4)
        >>> torch.equal(pf.apply(model, adapter, x), model(x))
        True
    """
    adapters = as_tuple(adapter)
    arguments, keywords = as_call(batch)
    which = rows.of_adapters(adapters, index)
    if which is not None:
        rows.refuse_other_batch(which, (*arguments, *keywords.values()))
    made = twins.Twins(model, params)
    tracing = torch.compiler.is_compiling()
    graft.run_packed(made.by_path.values(), apart=not tracing)
    for table in made.tables:
        graft.keep_norms(table)
    masks.suit(made.by_path.values(), keywords)
    how = parts.How(
        hold=_put,
        armed=_always if torch.is_grad_enabled() and not tracing else None,
        check=tracing or not checked.are_known(model, adapters, made.by_path),
        apart=not tracing,
    )
    attach.attach(made.root, made.by_path, parts.of(adapters, which), how)
    if how.check and not tracing:
        checked.remember(model, adapters, made.by_path)
    if made.checkpointing:
        graft.let_inputs_require_grad(made.root)
    try:
        # The twins hold every tensor already, and keep it for the backward pass (a checkpointed block looks for it
        # there): functional_call finds each in its place, and leaves it there.
        named = {name: made.tensor(name) for name in params or ()}
        return torch.func.functional_call(made.root, named, arguments, keywords, tie_weights=False)
    except RuntimeError as error:
        clearer = graft.explained(error, made.checkpointing)
        if clearer is None:
            raise
        raise clearer from error


def _always() -> bool:
    return True


def _put(twin: nn.Module, name: str, compute: Any) -> None:
    graft.put(twin, name, compute())


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The batch as positional and keyword arguments."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        items = cast("Mapping[Any, Any]", batch)
        wrong = [key for key in items if not isinstance(key, str)]
        if wrong:
            raise TypeError(
                f"batch is a mapping with keys {wrong[:3]} of type {type(wrong[0]).__name__}; expected the names of "
                "the model's arguments, e.g. 'input_ids'. Positional arguments go in a tuple."
            )
        if items:
            return (), dict(items)
    elif isinstance(batch, (tuple, list)):
        if batch:
            return tuple(cast("Sequence[Any]", batch)), {}
    else:
        raise TypeError(
            f"batch is a {type(batch).__name__}; expected a mapping (keyword arguments), a tuple or list (positional "
            "arguments) or a tensor (the only argument)."
        )
    given = type(cast("Any", batch)).__name__
    raise ValueError(f"batch is an empty {given}; expected the model's inputs.")
