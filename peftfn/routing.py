"""A different adapter of a stack for each row of the batch, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn import calls, codecs, stacking
from peftfn.adapter import Adapter, is_traced
from peftfn.config import PeftConfig
from peftfn.layers import Site
from peftfn.methods import Method


class Rows(NamedTuple):
    """Which adapter of a stack each row of the batch uses.

    Attributes:
        numbers: (rows,), from 0; where `keep` is false it says nothing.
        keep: (rows,), false where a row uses the bare base.
        in_order: whether it is known that row n uses adapter n, and every adapter has its row: then nothing is copied.
        adapted: whether it is known that no row uses the bare base: then nothing is silenced.
    """

    numbers: Tensor
    keep: Tensor
    in_order: bool
    adapted: bool


def of_adapters(adapters: Sequence[Adapter], index: Any) -> Rows | None:
    """The rows of the one stack among the adapters, or `None` where there is neither a stack nor an index.

    Raises:
        TypeError, ValueError: there is one without the other, or the index is none.
    """
    stacks = [adapter for adapter in adapters if isinstance(adapter.config, stacking.Stacked)]
    if any(map(stacking.is_half, stacks)):
        raise ValueError(
            "the stack's params are mapped by torch.vmap and its buffers are not (or the other way round); map over "
            "all of it: torch.vmap(lambda a, batch: torch.func.grad(lambda p: loss(a.replace(params=p), batch))"
            "(a.params))(stacked, batches)."
        )
    if index is None:
        for adapter in filter(stacking.is_whole, stacks):
            raise ValueError(
                f"the adapter is a stack of {stacking.size(adapter)}; pass index=..., one number per row of the batch, "
                "or map over it: torch.vmap(lambda a: pf.apply(model, a, batch))(stacked)."
            )
        return None
    if len(stacks) != 1:
        raise ValueError(f"index is given and {len(stacks)} of the adapters are stacks; expected exactly one stack.")
    return as_rows(index, stacking.size(stacks[0]))


def as_rows(index: Any, adapters: int) -> Rows:
    """`index`, a 1-D integer tensor with values from -1 (the bare base) up to the number of adapters, as rows.

    Raises:
        TypeError, ValueError: it is something else; values are looked at only outside transforms.
    """
    rows = torch.as_tensor(index)
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise TypeError(
            f"index has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected one integer per row of the batch: "
            "the number of the adapter in the stack, or -1 for the bare base."
        )
    known = rows.device.type == "cpu" and not is_traced(rows)
    if rows.numel() and not is_traced(rows) and not -1 <= int(rows.min()) <= int(rows.max()) < adapters:
        raise ValueError(
            f"index has values from {int(rows.min())} to {int(rows.max())}; this stack has adapters 0 to "
            f"{adapters - 1}, and -1 is the bare base."
        )
    in_order = known and len(rows) == adapters and bool((rows == torch.arange(adapters)).all())
    return Rows(rows.clamp(min=0), rows >= 0, in_order, known and bool((rows >= 0).all()))


def step(
    method: Method, config: PeftConfig, leaf: Mapping[str, Tensor], rows: Rows, run: Callable[..., Any], site: Site
) -> Callable[..., Any]:
    """A site's forward in which row n is adapted by the leaf's slice `rows[n]`; axis 0 of x is the row.

    What the site computes without the method is computed once, for all rows; only the method is mapped: by its own
    batched kernels where it has them, by `torch.vmap` otherwise.
    """
    inside = Site(site.path, site.kind, site.layer, site.weight_name, run)
    if method.kind is not None:
        return functools.partial(_whole, method, config, leaf, rows, inside)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if method.takes_rows(leaf, site.kind) and x.dim() > 1 and x.shape[0] % rows.numbers.shape[0] == 0:
            return method.forward(config, _picked(method, leaf, rows), inside, x, *args, **kwargs)
        picked, keep = _pick(leaf, _rows_of(x, rows, site.path))
        whole = run(x, *args, **kwargs)

        def one(leaf: dict[str, Tensor], keep: Tensor, x: Tensor, y: Tensor) -> Tensor:
            x, y = x.unsqueeze(0), y.unsqueeze(0)

            def computed(given: Tensor, *_: Any, **__: Any) -> Any:
                return y if given is x else run(given, *args, **kwargs)

            inner = Site(site.path, site.kind, site.layer, site.weight_name, computed)
            return method.forward(config, method.silence(leaf, keep), inner, x).squeeze(0)

        return torch.vmap(one, randomness="different")(picked, keep, x, whole)

    return forward


def _whole(
    method: Method, config: PeftConfig, leaf: Mapping[str, Tensor], rows: Rows, site: Site, *args: Any, **kwargs: Any
) -> Any:
    """What a whole module computes with each row's slice of the leaf."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return method.forward(config, _picked(method, leaf, _rows_of(x, rows, site.path)), site, *args, **kwargs)


def of_call(
    method: Method, config: PeftConfig, leaf: Mapping[str, Tensor], rows: Rows, site: Site, call: calls.Call
) -> calls.Call:
    """The call of the model with each row's own prompt. What makes the prompts runs once for each adapter."""
    if method.encoded is not None:
        encode = method.encoded

        def one(leaf: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return encode(config, leaf, site)

        leaf = torch.vmap(one, randomness="different")(dict(leaf))
    tokens = calls.tokens_of(call)
    if tokens is None:
        raise ValueError(
            f"the batch has {sorted(call.given)}; expected input_ids or inputs_embeds, a row for each index."
        )
    return method.forward(config, _picked(method, leaf, _rows_of(tokens, rows, "the model")), site, call)


def replaced(twin: nn.Module, path: str, tensors: Mapping[str, Tensor], rows: Rows) -> Callable[..., Any]:
    """A forward of the twin in which row n is computed with the slice `rows[n]` of each tensor."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        picked, keep = _pick(tensors, _rows_of(x, rows, path))
        for name, tensor in picked.items():
            own = codecs.of(twin).read(twin, name) if name == "weight" else getattr(twin, name)
            picked[name] = torch.where(keep.view(-1, *(1 for _ in own.shape)), tensor, own)

        def one(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
            inner: nn.Module = object.__new__(type(twin))
            inner.__dict__.update(twin.__dict__)
            inner.__dict__["_parameters"] = {**twin._parameters, **tensors}
            return codecs.of(inner).run(inner, x.unsqueeze(0), *args, **kwargs).squeeze(0)

        return torch.vmap(one, randomness="different")(picked, x)

    return functools.wraps(type(twin).forward)(forward)


def refuse(path: str, twin: nn.Module) -> None:
    """A site whose tensor the base reads itself has one tensor for the whole batch: it cannot be routed by row."""
    raise ValueError(
        f"{path}: {type(twin).__name__} reads this weight itself, so it cannot differ from row to row. Leave the site "
        "out of routed adapters, or apply them one at a time (or under torch.vmap)."
    )


def _rows_of(x: Tensor, rows: Rows, path: str) -> Rows:
    """The rows of an input that has one for each index, or as many for each, one group after the other.

    So some blocks flatten (rows, tokens, features) or cut a row into windows, and generate() repeats rows for beams.
    """
    count = rows.numbers.shape[0]
    if x.shape[0] == count:
        return rows
    if x.shape[0] % count == 0:
        each = x.shape[0] // count
        return rows._replace(
            numbers=rows.numbers.repeat_interleave(each), keep=rows.keep.repeat_interleave(each), in_order=False
        )
    raise ValueError(
        f"{path}: index has {count} rows and the input here has shape {tuple(x.shape)}; expected one index for "
        "each row of the batch, on the first axis."
    )


def refuse_other_batch(rows: Rows, given: Iterable[Any]) -> None:
    """A `ValueError` if no tensor of a call has as many rows as the index."""
    tensors = [one for one in given if isinstance(one, Tensor) and one.dim() > 0]
    count = rows.numbers.shape[0]
    if tensors and all(one.shape[0] != count for one in tensors):
        raise ValueError(
            f"index has {count} rows and the batch has tensors of shape {[tuple(one.shape) for one in tensors]}; "
            "expected one index for each row of the batch, on the first axis."
        )


def _picked(method: Method, leaf: Mapping[str, Tensor], rows: Rows) -> Mapping[str, Tensor]:
    """Each row's slice of the leaf, silent where the row uses the bare base."""
    picked, keep = _pick(leaf, rows)
    return picked if rows.adapted else method.silence(picked, keep)


def _pick(tensors: Mapping[str, Tensor], rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    if rows.in_order:
        return dict(tensors), rows.keep
    # index_select copies whole slices: eight times as fast as tensor[index] for a (32, 8, 512) one
    picked = {name: tensor.index_select(0, rows.numbers.to(tensor.device)) for name, tensor in tensors.items()}
    return picked, rows.keep.to(next(iter(picked.values())).device)
