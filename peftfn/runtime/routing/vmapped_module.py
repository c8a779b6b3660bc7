"""Weights that the base reads itself, by row: the module that reads them runs under `torch.vmap`, a row at a time.

`nn.MultiheadAttention` reads its projections itself, a mixture of experts its bare parameters: there is no layer whose
output could be changed. So each row gets merged weights of its own, W + ΔW, and the reader runs once, mapped over rows.
That copies its adapted weights once for each row, and needs a forward that can be mapped: one that decides by values
(a loop over the experts that were hit) cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from peftfn.core import stack_slices
from peftfn.core.unlike_rows import UnlikeRowsError
from peftfn.models import signatures, surgery
from peftfn.models.layers import Place
from peftfn.runtime import site_adapters
from peftfn.runtime.routing import row_index, segments
from peftfn.runtime.routing.row_index import Rows
from peftfn.runtime.site_adapters import SiteAdapter
from peftfn.weights import codecs


class Read(NamedTuple):
    """One adapted tensor: its place, with the owner's path inside the reader, and what the adapters bring to it."""

    place: Place
    here: Sequence[SiteAdapter]


class Given(NamedTuple):
    """The tensors among a reader's arguments, the axis of rows of each, and the axes of rows of what it returns."""

    tensors: Mapping[Any, Tensor]
    axes: Mapping[Any, int | None]
    out: Any


Run = Callable[[nn.Module, Mapping[Any, Tensor]], Any]
"""What a copy of the reader computes for one row of what it is given."""


def by_row(layer: nn.Module, path: str, read: Sequence[Read]) -> Callable[..., Any]:
    """A forward of the reader in which row n is computed with the weights that its adapter makes."""
    which = next(part.rows for one in read for part in one.here if part.rows is not None)
    row_index.refuse_tokens(which, path)
    run = _attention if isinstance(layer, nn.MultiheadAttention) else _plain
    return functools.partial(run, layer, path, read, which)


def _attention(
    layer: nn.MultiheadAttention, path: str, read: Sequence[Read], which: Rows, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    named = {**dict(zip(signatures.argument_names(type(layer)), args, strict=False)), **kwargs}
    axis = 0 if layer.batch_first else 1
    given = {name: named.pop(name) for name in ("query", "key", "value")}
    own = row_index.of_input(given["query"].movedim(axis, 0), which, path)
    dims: dict[str, int | None] = dict.fromkeys(given, axis)
    for name in ("key_padding_mask", "attn_mask"):
        if (mask := named.pop(name, None)) is not None:
            has_rows = name == "key_padding_mask" or mask.dim() == 3  # (rows * heads, ...)
            given[name] = segments.grouped(mask, own.size) if mask.dim() == 3 else mask
            dims[name] = 0 if has_rows else None
    wants = bool(named.pop("need_weights", True))

    def one(inner: Any, given: Mapping[Any, Tensor]) -> Any:
        # With weights it multiplies plain matrices, which can be mapped; the fused kernel falls back to a loop.
        return type(layer).forward(inner, **given, need_weights=True, **named)

    output, weights = _mapped(layer, read, own, one, Given(given, dims, (axis, 0)))
    return output, weights if wants else None


def _plain(layer: nn.Module, path: str, read: Sequence[Read], which: Rows, *args: Any, **kwargs: Any) -> Any:
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {name: one for name, one in named.items() if isinstance(one, Tensor)}
    by_row = [name for name, one in tensors.items() if one.dim() > 0 and one.shape[0] and not one.shape[0] % which.size]
    first = next(iter(tensors.values()), None)
    if first is not None:
        row_index.flat(first, which, path)  # says so if there is no row for each index
    given = {name: segments.grouped(one, which.size) if name in by_row else one for name, one in tensors.items()}
    rest = {name: one for name, one in named.items() if name not in tensors}

    def one(inner: nn.Module, given: Mapping[Any, Tensor]) -> Any:
        every = {**rest, **given}
        positional = [every.pop(number) for number in range(len(args))]
        return type(layer).forward(inner, *positional, **every)

    dims = {name: 0 if name in by_row else None for name in given}
    try:
        found = _mapped(layer, read, which, one, Given(given, dims, 0))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UnlikeRowsError(
            f"{path}: {type(layer).__name__} reads this weight itself, in a way that torch.vmap cannot map over rows "
            "(it decides by values). Of transformers' experts, those of model.set_experts_implementation('batched_mm') "
            "can be mapped; or leave the site out of routed adapters, or apply them one at a time."
        ) from error
    return torch_pytree.tree_map(_flat, found)


def _flat(found: Tensor) -> Tensor:
    return found.flatten(0, 1)


def _mapped(layer: nn.Module, read: Sequence[Read], which: Rows, run: Run, given: Given) -> Any:
    """What `run` computes for each row with the reader that holds the row's weights."""
    leaves = [[_slices(part, which) for part in one.here] for one in read]
    keep = torch.ones(which.size, dtype=torch.bool, device="cpu") if which.keep is None else which.keep
    keep = keep.to(next(iter(given.tensors.values())).device)

    def one(leaves: list[list[dict[str, Tensor]]], keep: Tensor, given: Mapping[Any, Tensor]) -> Any:
        inner = surgery.second(layer)
        for adapted, own in zip(read, leaves, strict=True):
            _put(inner, adapted, own, keep)
        return run(inner, given)

    in_leaves = [[0 if part.rows is not None else None for part in one.here] for one in read]
    mapped = torch.vmap(one, in_dims=(in_leaves, 0, dict(given.axes)), out_dims=given.out, randomness="different")
    return mapped(leaves, keep, dict(given.tensors))


def _slices(part: SiteAdapter, which: Rows) -> dict[str, Tensor]:
    if part.rows is None:
        return dict(part.leaf)
    return stack_slices.picked(part.leaf, which.numbers)


def _put(inner: nn.Module, adapted: Read, leaves: Sequence[Mapping[str, Tensor]], keep: Tensor) -> None:
    """Put one row's merged weight into the reader, a copy of its own for this row."""
    place = adapted.place
    owner = inner
    if place.owner:  # the out_proj of an attention
        owner = surgery.second(inner.get_submodule(place.owner))
        inner.__dict__["_modules"] = {**inner._modules, place.owner: owner}
    weight = codecs.of(owner).read(owner, place.weight)
    for part, leaf in zip(adapted.here, leaves, strict=True):
        own = leaf if part.rows is None else part.method.disabled(leaf, keep)
        weight = site_adapters.merged(part, own, place.kind, {"weight": weight})["weight"]
    owner.__dict__["_parameters"] = {**owner._parameters, place.weight: weight}
