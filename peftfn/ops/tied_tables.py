"""Which other names of parameters follow when trained tokens (`OnWeights.of_tables`) change an embedding.

Nothing follows any other method: a LoRA on a tied embedding leaves the output layer as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import Adapter, SiteInfo
from peftfn.methods import companions
from peftfn.models import layers, tied_weights
from peftfn.models.layers import Place


def is_followed(table: Place | None) -> bool:
    """Whether this is the table of an embedding, which other layers that hold it go along with."""
    return table is not None and table.kind == layers.EMBEDDING


def followers(
    table: Place | None, info: SiteInfo, params: Mapping[str, Tensor], adapter: Adapter, model: nn.Module | None
) -> list[str]:
    """The other names in `params` of a table, without those that the adapter changes by themselves.

    Args:
        table: where it is; `None` where no table changes.
        info: what the adapter knows of the site.
        params: parameters by name, as they are before the change.
        adapter: the whole adapter.
        model: the base, which knows what it ties.

    Raises:
        ValueError: nothing says whether the site is an embedding.
    """
    if table is None:
        return []
    names = {*tied_weights.aliases(params, table.name)}
    if model is not None:
        names |= {f"{path}.weight" for path in tied_weights.holders(model, table.owner)}
    found = sorted(name for name in names - _own(adapter) if name in params)
    if found and model is None and not info.kind:
        raise ValueError(
            f"{table.owner}: {', '.join(found)} in params is the same tensor, and nothing here says whether this is an "
            "embedding, of which the others follow; pass model=... to merge."
        )
    return found if is_followed(table) else []


def followed(
    names: Sequence[str],
    one: Any,
    made: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    changed: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """The same change of other holders of a table: of their own weight, which an adapter before may have parted.

    Args:
        names: the others, from `followers`.
        one: the change, a `merge.Change`.
        made: what it makes.
        params: parameters by name, as they are before it.
        changed: what a change makes of them.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        owner, _, weight = name.rpartition(".")
        there = one._replace(place=one.place._replace(owner=owner, weight=weight), replaced={})
        is_tied = tied_weights.is_one(params[name], params[one.place.name])
        found[name] = made[one.place.name] if is_tied else changed(there, params)[name]
    return found


def _own(adapter: Adapter) -> set[str]:
    """The names of the tables that an adapter changes by themselves."""
    found: set[str] = set()
    for piece in companions.pieces(adapter):
        if methods.of(piece.config).of_tables:
            found |= {f"{path}.weight" for path in piece.params}
    return found
