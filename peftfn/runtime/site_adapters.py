"""The tensors of each adapter at each site, with what a forward needs to know of the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from peftfn import methods
from peftfn.core.adapter import UNKNOWN, Adapter, SiteInfo
from peftfn.core.config import PeftConfig
from peftfn.methods import Method
from peftfn.models import layouts
from peftfn.runtime.routing.row_index import Rows


class SiteAdapter(NamedTuple):
    """What one adapter brings to one site.

    Attributes:
        config: the adapter's config; of a stack, one that says what a forward reads for all of them.
        method: its method.
        leaf: the method's tensors, params and buffers together.
        replaced: tensors that take the place of parameters and buffers of the layer.
        fixed: names of `replaced` that are not trained (an embedding saved along, of any number of rows).
        rows: which adapter of a stack each row of the batch uses, or `None`.
        info: what the adapter knows of the site.
    """

    config: PeftConfig
    method: Method
    leaf: Mapping[str, Tensor]
    replaced: Mapping[str, Tensor]
    fixed: frozenset[str]
    rows: Rows | None
    info: SiteInfo = UNKNOWN


def of(adapters: Sequence[Adapter], rows: Rows | None = None) -> dict[str, list[SiteAdapter]]:
    """What the adapters bring, by site path, in the adapters' order."""
    found: dict[str, list[SiteAdapter]] = {}
    for adapter in adapters:
        config, method = adapter.config, methods.of(adapter.config)
        own_rows = rows if adapter.members is not None else None
        taken: dict[tuple[str, ...], list[str]] = {}  # sites have few sets of names between them
        for path in {**adapter.params, **adapter.buffers}:
            fixed = adapter.buffers.get(path, {})
            leaf = {**adapter.params.get(path, {}), **fixed}
            names = tuple(leaf)
            if names not in taken:
                taken[names] = [name for name in names if name not in method.slots]
            replaced = {name: leaf.pop(name) for name in taken[names]}
            info = adapter.sites.get(path, UNKNOWN)
            part = SiteAdapter(config, method, leaf, replaced, frozenset(fixed), own_rows, info)
            found.setdefault(path, []).append(part)
    return found


def merged(
    part: SiteAdapter, leaf: Mapping[str, Tensor], kind: str, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The new values of those of a layer's weight and bias that the leaf changes."""
    action = part.method.on_weights
    assert action is not None, "methods that act on whole modules have no site with a weight"
    shape = layouts.of_tensor(kind, tensors["weight"], part.info)
    return action.merge(part.config, leaf, shape, {name: tensors[name] for name in action.reads if name in tensors})
