"""`apply`: what a base with adapters computes, as a function that leaves both as they are."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.core.adapter import Adapter, as_tuple
from peftfn.models import attention_masks, surgery, transformers_caches, twins
from peftfn.runtime import attach, escaped, remembered_checks, site_adapters
from peftfn.runtime.routing import row_index, row_layouts, rows_apart
from peftfn.runtime.routing.row_index import Rows
from peftfn.weights import packed_params


@transforms.traced_whole
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
            for each token, (rows, tokens), linear and embedding layers treat each token with its own adapter. Where
            rows are in a model is found out at the first call, in a few runs of the bare base; where a site is not
            given them on its first axis (tokens first, windows, experts, a BatchNorm in training), the model runs once
            for each of the adapters, and each row is taken from the run of its own.

    Raises:
        TypeError: batch, adapter or index is of the wrong type.
        KeyError: the adapter or `params` names something that the model does not have.
        ValueError: a tensor does not fit; a stack is neither mapped nor given an index; the batch is empty; active
            adapters exclude each other (two that replace one tensor); or a prompt has no place in this batch.
        NotImplementedError: the model's forward runs past the module whose call the adapter changes (prompts).
        RuntimeError: a transform of `torch.func` meets activation checkpointing, or a checkpointed block would lose the
            adapter's gradient (`use_reentrant=True`, and no input of the block requires grad).

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> x = torch.ones(3, 4)
        >>> torch.equal(pf.apply(model, adapter, x), model(x))
        True
    """
    adapters = (adapter,) if isinstance(adapter, Adapter) else as_tuple(adapter)
    arguments, keywords = as_call(batch)
    stacks = any(one.members is not None for one in adapters)
    which = row_index.of_adapters(adapters, index) if stacks or index is not None else None
    if which is not None:
        row_index.refuse_other_batch(which, (*arguments, *keywords.values()))
    params = packed_params.settled(model, params) if params else params
    if which is None or torch.compiler.is_compiling():
        return _once(model, params, arguments, adapters, keywords, which)
    once = functools.partial(_once, model, params, arguments)
    return rows_apart.run(once, row_layouts.Call(model, params, arguments, keywords), adapters, which)


def _once(
    model: nn.Module,
    params: Mapping[str, Tensor] | None,
    arguments: tuple[Any, ...],
    adapters: Sequence[Adapter],
    keywords: Mapping[str, Any],
    which: Rows | None,
) -> Any:
    """One pass of the model."""
    made = twins.Twins(model, params)
    tracing = torch.compiler.is_compiling()
    surgery.run_packed(made.by_path.values(), apart=not tracing)
    for table in made.tables:
        surgery.keep_norms(table)
    found = site_adapters.with_ties(site_adapters.of(adapters, which), model)
    if not tracing and transforms.is_mapping():  # transformers does not look at masks while Dynamo traces
        attention_masks.suit(made.by_path.values(), {**keywords, **attach.masks(found)})
        keywords = transformers_caches.without_states(made.root, keywords)
    wants_grad = _always if torch.is_grad_enabled() and not tracing else None
    check = tracing or not remembered_checks.are_known(model, adapters, made.by_path)
    call = (*keywords, len(arguments), model.training, params is None)
    known = tracing or not (adapters or params) or remembered_checks.is_known_call(model, call, made.led_by)
    plan = attach.attach(made.root, made.by_path, found, wants_grad, check=check, apart=not tracing)
    watch = escaped.Watch(plan, made.by_path) if (check or not known) and escaped.can_watch(made.by_path) else None
    surgery.install(plan, made.by_path, _put, apart=not tracing)
    if check and not tracing:
        remembered_checks.remember(model, adapters, made.by_path)
    if made.checkpointing:
        surgery.let_inputs_require_grad(made.root)
    if watch is None:
        return _run(made, params, arguments, keywords)
    watch.look_for(
        model, made.by_path, (arguments, dict(keywords), dict(params or {}), [one.params for one in adapters])
    )
    with watch:
        output = _run(made, params, arguments, keywords)
    remembered_checks.remember_call(model, call, made.led_by)
    return output


def _run(
    made: twins.Twins, params: Mapping[str, Tensor] | None, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Any:
    try:
        # The twins hold every tensor already, and keep it for the backward pass (a checkpointed block looks for it
        # there): functional_call finds each in its place, and leaves it there.
        named = {name: made.tensor(name) for name in params or ()}
        return torch.func.functional_call(made.root, named, arguments, dict(keywords), tie_weights=False)
    except RuntimeError as error:
        clearer = surgery.explained(error, made.checkpointing)
        if clearer is None:
            raise
        raise clearer from error


def _always() -> bool:
    return True


def _put(twin: nn.Module, name: str, compute: Any) -> None:
    surgery.put(twin, name, compute())


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
