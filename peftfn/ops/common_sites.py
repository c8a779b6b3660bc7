"""What a stack or a combination of adapters knows of a site: one `SiteInfo` for those of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftfn.core import row_runs
from peftfn.core.adapter import UNKNOWN, Adapter, Leaf, SiteInfo
from peftfn.core.row_runs import Runs
from peftfn.methods import slots
from peftfn.methods.method import Method


def common(what: str, path: str, infos: Sequence[SiteInfo]) -> SiteInfo:
    """What holds for all adapters that have the site: the rows of a fused projection that any of them acts on.

    Args:
        what: the function that the user called, for messages.
        path: the site.
        infos: what each of them says.

    Raises:
        ValueError: they act on unlike sides of the layer.
    """
    if len({one.input_side for one in infos}) > 1:
        raise ValueError(
            f"{what}: some of the adapters act on what goes into {path!r} and others on what comes out "
            "(feedforward_modules); expected adapters that act on the same side."
        )
    kinds = {one.kind for one in infos if one.kind}
    outputs = max((one.outputs for one in infos), default=0)
    rows = _union([one.rows for one in infos])
    return SiteInfo(
        kinds.pop() if len(kinds) == 1 else "",
        rows,
        outputs if rows is not None else 0,
        any(one.input_side for one in infos),
        next((one.tied for one in infos if one.tied), ()),
        next((one.shares for one in infos if one.shares), ""),
    )


def together(
    what: str, method: Method, path: str, leaves: Sequence[Leaf | None], adapters: Sequence[Adapter]
) -> tuple[SiteInfo, list[Leaf | None]]:
    """What the adapters together know of a site, and the leaf of each, all for the same rows of the layer.

    An adapter that lacks the site has `None` for its leaf.
    """
    infos = [adapter.sites.get(path, UNKNOWN) for adapter in adapters]
    wanted = common(what, path, [info for info, leaf in zip(infos, leaves, strict=True) if leaf])
    pairs = zip(leaves, infos, strict=True)
    return wanted, [on_all_rows(method, leaf, info, wanted) if leaf else None for leaf, info in pairs]


def _union(rows: Sequence[Runs | None]) -> Runs | None:
    if len(set(rows)) == 1:
        return rows[0]
    return row_runs.union(run for one in rows for run in one or ()) if rows and None not in rows else None


def on_all_rows(method: Method, leaf: Leaf, own: SiteInfo, wanted: SiteInfo = UNKNOWN) -> Leaf:
    """The leaf, for the rows `own.rows`, as one for the rows `wanted.rows` (all by default): zero on the others."""
    if own.rows == wanted.rows or own.rows is None:
        return leaf
    return slots.among(method.slots, leaf, *_within(leaf, own, wanted))


def rows_of_each(
    leaves: Sequence[Leaf | None], infos: Sequence[SiteInfo], wanted: SiteInfo
) -> list[torch.Tensor] | None:
    """Of which of the rows `wanted.rows` each leaf is, as zeros and ones; `None` where each is of all of them."""
    pairs = list(zip(leaves, infos, strict=True))
    parts = [_within(leaf, info, wanted) for leaf, info in pairs if leaf and info.rows not in (None, wanted.rows)]
    if not parts:
        return None
    model = next(tensor for leaf in leaves if leaf for tensor in leaf.values())
    ones, own = model.new_ones(parts[0][1], requires_grad=False), iter(parts)

    def one(leaf: Leaf | None, info: SiteInfo) -> torch.Tensor:
        if not leaf or info.rows in (None, wanted.rows):
            return ones if leaf else torch.zeros_like(ones)
        return torch.zeros_like(ones).index_fill(0, next(own)[0], 1)

    return [one(leaf, info) for leaf, info in pairs]


def on_own_rows(method: Method, leaf: Leaf, own: SiteInfo, wanted: SiteInfo = UNKNOWN) -> Leaf:
    """The inverse of `on_all_rows`."""
    if own.rows == wanted.rows or own.rows is None:
        return leaf
    return slots.of_rows(method.slots, leaf, _within(leaf, own, wanted)[0], outputs=True)


def _within(leaf: Leaf, own: SiteInfo, wanted: SiteInfo) -> tuple[torch.Tensor, int]:
    """The positions of the rows `own.rows` among `wanted.rows`, and how many rows `wanted` has."""
    assert own.rows is not None, "a whole layer is no part of another"
    device = next(iter(leaf.values())).device
    numbers = row_runs.numbers(own.rows, device)
    if wanted.rows is None:
        return numbers, own.outputs
    every = row_runs.numbers(wanted.rows, device)
    return torch.searchsorted(every, numbers), len(every)
