"""The forward of a site in which each row of the batch uses its own adapter of a stack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn.core import stack_slices
from peftfn.core.config import PeftConfig
from peftfn.core.unlike_rows import UnlikeRowsError
from peftfn.methods import Method, leaf_dtypes
from peftfn.methods.prompt import model_call
from peftfn.models.layers import Site
from peftfn.runtime.routing import row_index, segments
from peftfn.runtime.routing.row_index import Rows
from peftfn.runtime.routing.segments import Segments
from peftfn.weights import codecs


class Routed(NamedTuple):
    """A site with a slice of a leaf for each row of its input.

    Attributes:
        method: what adapts it.
        config: what the method's forward reads.
        leaf: the stack's tensors here, and those that replace the layer's own.
        which: the slice of each row.
        site: the layer, or what the adapters before this one make of it.
        cheapest: `(x, numbers in the output) -> how to sort the rows`, or `None` where copying slices takes less.
    """

    method: Method
    config: PeftConfig
    leaf: Mapping[str, Tensor]
    which: Rows
    site: Site
    cheapest: Callable[[Tensor, int], Segments | None]


def step(
    method: Method,
    config: PeftConfig,
    leaf: Mapping[str, Tensor],
    which: Rows,
    run: Callable[..., Any],
    site: Site,
    *,
    replaced: Mapping[str, Tensor],
) -> Callable[..., Any]:
    """A site's forward in which row n is adapted by the leaf's slice `which[n]`; axis 0 of x is the row.

    What the site computes without the method is computed once, for all rows; only the method is mapped: by its own
    batched kernels where it has them, by `torch.vmap` otherwise. Either each row gets a copy of its slice, or rows are
    sorted by adapter, whichever moves less memory. `replaced` has what the layer has instead of its own tensors, as
    `run` has it already: a method that runs the layer once more, or reads it, sees each row's.
    """
    inside = site.running(run)
    if method.on_weights is None:
        return functools.partial(_whole, method, config, leaf, which, inside)
    numbers = sum(tensor.numel() // tensor.shape[0] for tensor in leaf.values()) if which.ways else 0
    cheapest = functools.partial(segments.cheapest, which.ways, which.size, numbers)
    adapted = _batched if method.on_weights.takes_rows(site.kind, site.rows) else _vmapped
    own = leaf if adapted is _batched else {**leaf, **replaced}
    routed = Routed(method, config, own, which, inside, cheapest)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = row_index.flat(x, which, site.path)
        found = adapted(routed, given, *args, **kwargs)
        return found if given is x else found.view(*x.shape[:2], *found.shape[1:])

    return forward


def _batched(routed: Routed, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The site of a method whose forward takes a slice for each row of x; a linear layer, (..., in) -> (..., out)."""
    method, config, leaf, which, site, cheapest = routed
    if which.in_order:
        return method.action.forward(config, leaf, site, x, *args, **kwargs)
    inputs = x.shape[-1]
    way = cheapest(x, x.numel() // max(1, inputs) * (sum(site.shape) - inputs))
    if way is None:
        return method.action.forward(config, _disabled(method, leaf, which), site, x, *args, **kwargs)
    if way.is_order:  # then the site itself may run on the sorted rows
        found = method.action.forward(config, way.of(leaf), site, way.sorted(x, which.size), *args, **kwargs)
        return way.restored(found, found, which.size)
    y = site(x, *args, **kwargs)
    sorted_x, sorted_y = (way.sorted(one, which.size) for one in (x, y))
    known = site.running(functools.partial(_known, sorted_x, sorted_y, site))
    return way.restored(method.action.forward(config, way.of(leaf), known, sorted_x), y, which.size)


def _vmapped(routed: Routed, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The site of any other method, whose forward `torch.vmap` gives one row or one segment at a time."""
    method, config, leaf, which, site, cheapest = routed
    y = site(x, *args, **kwargs)
    run = functools.partial(_run, args=args, kwargs=kwargs)
    act = functools.partial(_mapped, method, config, site, run=run)
    way = cheapest(x, y.numel())
    if way is None:
        return act(_pick(leaf, which), x, y)
    sorted_x, sorted_y = (way.sorted(one, which.size) for one in (x, y))
    return way.restored(act((way.of(leaf), None), sorted_x, sorted_y), y, which.size)


def _run(run: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return run(x, *args, **kwargs)


Picked = tuple[dict[str, Tensor], Tensor | None]
"""Slices of a leaf, and a mask of those that are to be used; `None` if all are."""


def _mapped(
    method: Method, config: PeftConfig, site: Site, picked: Picked, x: Tensor, y: Tensor, *, run: Callable[..., Any]
) -> Tensor:
    """What the method makes of y = site(x), with a slice of the leaf for each group of rows."""

    def one(given: Mapping[str, Tensor], keep: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        leaf = {name: tensor for name, tensor in given.items() if not method.replaces(name)}
        own = {name: tensor for name, tensor in given.items() if method.replaces(name)}
        there = _with(site, own, keep) if own else site
        inner = there.running(functools.partial(_known, x, y, functools.partial(run, there)))
        return method.action.forward(config, leaf if keep is None else method.disabled(leaf, keep), inner, x)

    leaf, keep = picked
    groups = next(iter(leaf.values())).shape[0]
    dims = (0, None if keep is None else 0, 0, 0)
    mapped = torch.vmap(one, in_dims=dims, randomness="different")
    return mapped(leaf, keep, segments.grouped(x, groups), segments.grouped(y, groups)).flatten(0, 1)


def _known(x: Tensor, y: Tensor, run: Callable[..., Any], given: Tensor, *_: Any, **__: Any) -> Any:
    return y if given is x else run(given)


def _with(site: Site, tensors: Mapping[str, Tensor], keep: Tensor | None) -> Site:
    """The site of a layer with these tensors in the place of its own, where `keep` is not false."""
    codec, layer = codecs.of(site.layer), site.layer
    if keep is not None:
        tensors = {name: torch.where(keep, one, _own(layer, name)) for name, one in tensors.items()}
    inner = _twin(layer, tensors)
    run = functools.partial(codec.run, inner)
    return Site(site.path, site.kind, inner, site.weight_name, run, rows=site.rows, input_side=site.input_side)


def _own(layer: nn.Module, name: str) -> Tensor:
    """A tensor of a layer by its name; its weight dense."""
    return codecs.of(layer).read(layer, name) if name == "weight" else getattr(layer, name)


def _twin(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layer with these parameters in the place of its own."""
    inner: nn.Module = object.__new__(type(layer))
    inner.__dict__.update(layer.__dict__)
    inner.__dict__["_parameters"] = {**layer._parameters, **tensors}
    return inner


def _whole(
    method: Method, config: PeftConfig, leaf: Mapping[str, Tensor], which: Rows, site: Site, *args: Any, **kwargs: Any
) -> Any:
    """What a whole module computes with each row's slice of the leaf."""
    row_index.refuse_tokens(which, site.path)
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return method.action.forward(
        config, _disabled(method, leaf, row_index.of_input(x, which, site.path)), site, *args, **kwargs
    )


def of_call(
    method: Method, config: PeftConfig, leaf: Mapping[str, Tensor], which: Rows, site: Site, call: model_call.Call
) -> model_call.Call:
    """The call of the model with each row's own prompt. What makes the prompts runs once for each adapter."""
    row_index.refuse_tokens(which, "")
    encode = None if method.on_call is None else method.on_call.encoded
    if encode is not None:

        def one(leaf: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return encode(config, leaf, site)

        leaf = torch.vmap(one, randomness="different")(dict(leaf))
    tokens = model_call.tokens_of(call)
    if tokens is None:
        raise ValueError(
            f"the batch has {sorted(call.given)}; expected input_ids or inputs_embeds, a row for each index."
        )
    return method.action.forward(
        config, _disabled(method, leaf, row_index.of_input(tokens, which, row_index.MODEL)), site, call
    )


def replaced(
    twin: nn.Module, path: str, tensors: Mapping[str, Tensor], which: Rows, method: Method
) -> Callable[..., Any]:
    """A forward of the twin in which row n is computed with the slice `which[n]` of each tensor."""
    codec = codecs.of(twin)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = row_index.flat(x, which, path)
        picked, keep = _pick(tensors, row_index.of_input(given, which, path))
        for name, tensor in picked.items():
            own = _own(twin, name)
            picked[name] = placed = leaf_dtypes.in_place_of(own, tensor, method)
            if keep is not None:
                picked[name] = torch.where(keep.view(-1, *(1 for _ in own.shape)), placed, own)

        def one(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
            return codec.run(_twin(twin, tensors), x.unsqueeze(0), *args, **kwargs).squeeze(0)

        try:
            found = torch.vmap(one, randomness="different")(picked, given)
        except RuntimeError as error:
            if "atching rule" not in str(error):
                raise
            raise UnlikeRowsError(
                f"{path}: torch.vmap cannot map {type(twin).__name__} over rows, each with its own tensors "
                f"({', '.join(tensors)}). Apply the adapters one at a time."
            ) from error
        return found if given is x else found.view(*x.shape[:2], *found.shape[1:])

    return functools.wraps(type(twin).forward)(forward)


def _disabled(method: Method, leaf: Mapping[str, Tensor], which: Rows) -> Mapping[str, Tensor]:
    """Each row's slice of the leaf; where the row uses the bare base, one that does nothing."""
    picked, keep = _pick(leaf, which)
    return picked if keep is None else method.disabled(picked, keep)


def _pick(tensors: Mapping[str, Tensor], which: Rows) -> Picked:
    """Each row's slice of the tensors."""
    if which.in_order:
        return dict(tensors), None
    picked = stack_slices.picked(tensors, which.numbers)
    return picked, None if which.keep is None else which.keep.to(next(iter(picked.values())).device)
