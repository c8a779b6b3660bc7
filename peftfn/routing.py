"""A different adapter of a stack for each row of the batch, at every site, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn import codecs
from peftfn.adapter import is_traced
from peftfn.config import PeftConfig
from peftfn.layers import Site
from peftfn.methods import Method


class Rows(NamedTuple):
    """Which adapter of a stack each row of the batch uses.

    Attributes:
        numbers: (rows,), from 0; where `keep` is false it says nothing.
        keep: (rows,), false where a row uses the bare base.
        in_order: whether it is known that row n uses adapter n, and every adapter has its row: then nothing is copied.
    """

    numbers: Tensor
    keep: Tensor
    in_order: bool


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
    return Rows(rows.clamp(min=0), rows >= 0, in_order)


def step(
    method: Method, config: PeftConfig, leaf: Mapping[str, Tensor], rows: Rows, run: Callable[..., Any], site: Site
) -> Callable[..., Any]:
    """A site's forward in which row n is adapted by the leaf's slice `rows[n]`; axis 0 of x is the row.

    What the site computes without the method is computed once, for all rows; only the method is mapped: by its own
    batched kernels where it has them, by `torch.vmap` otherwise.
    """
    inside = Site(site.path, site.kind, site.layer, site.weight_name, run)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if method.takes_rows(leaf, site.kind) and x.dim() > 1 and x.shape[0] % rows.numbers.shape[0] == 0:
            picked, keep = _pick(leaf, rows)
            return method.forward(config, method.silence(picked, keep), inside, x, *args, **kwargs)
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
    count = rows.numbers.shape[0]
    if x.shape[0] == count:
        return rows
    if x.dim() == 2 and x.shape[0] % count == 0:  # (rows * tokens, features), as some blocks flatten it
        each = x.shape[0] // count
        return Rows(rows.numbers.repeat_interleave(each), rows.keep.repeat_interleave(each), in_order=False)
    raise ValueError(
        f"{path}: index has {count} rows and the input here has shape {tuple(x.shape)}; expected one index for "
        "each row of the batch, on the first axis."
    )


def _pick(tensors: Mapping[str, Tensor], rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    if rows.in_order:
        return dict(tensors), rows.keep
    # index_select copies whole slices: eight times as fast as tensor[index] for a (32, 8, 512) one
    return {name: tensor.index_select(0, rows.numbers) for name, tensor in tensors.items()}, rows.keep
