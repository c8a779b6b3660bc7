"""The tensors of each adapter at each site, with what a forward needs to know of the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import PRESENT, UNKNOWN, Adapter, SiteInfo, is_shared, leaf_of
from peftfn.core.config import PeftConfig
from peftfn.methods import Method, companions, leaf_dtypes
from peftfn.models import layers, layouts, tied_weights
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
        number: the adapter's place among the active ones.
        invocations: of the adapter, or of each of a stack, the tokens from which on it acts; () where on all.
    """

    config: PeftConfig
    method: Method
    leaf: Mapping[str, Tensor]
    replaced: Mapping[str, Tensor]
    fixed: frozenset[str]
    rows: Rows | None
    info: SiteInfo = UNKNOWN
    number: int = 0
    invocations: tuple[Sequence[int] | None, ...] = ()


def of(adapters: Sequence[Adapter], rows: Rows | None = None) -> dict[str, list[SiteAdapter]]:
    """What the adapters bring, by site path, in the adapters' order."""
    found: dict[str, list[SiteAdapter]] = {}
    for number, adapter in [(n, piece) for n, one in enumerate(adapters) for piece in _pieces(one)]:
        config, method = adapter.config, methods.of(adapter.config)
        own_rows = rows if adapter.members is not None else None
        invocations = _invocations(method, adapter)
        taken: dict[tuple[str, ...], list[str]] = {}  # sites have few sets of names between them
        for path in {**adapter.params, **adapter.buffers}:
            if is_shared(path):
                continue
            fixed, info = adapter.buffers.get(path, {}), adapter.sites.get(path, UNKNOWN)
            leaf = {**adapter.params.get(path, {}), **fixed} if not info.shares else leaf_of(adapter, path)
            names = tuple(leaf)
            if names not in taken:
                taken[names] = [name for name in names if method.replaces(name)]
            replaced = {name: leaf.pop(name) for name in taken[names]}
            part = SiteAdapter(config, method, leaf, replaced, frozenset(fixed), own_rows, info, number, invocations)
            found.setdefault(path, []).append(part)
    return found


def _pieces(adapter: Adapter) -> tuple[Adapter, ...]:
    return companions.pieces(adapter) if methods.companion_configs(adapter.config) else (adapter,)


def _invocations(method: Method, adapter: Adapter) -> tuple[Sequence[int] | None, ...]:
    if not method.invocation:
        return ()
    configs = (adapter.config,) if adapter.members is None else adapter.members.configs
    found = tuple(getattr(config, method.invocation) or None for config in configs)
    return found if any(found) else ()


class _Acting(Mapping[str, Tensor]):
    """A stack's leaf of which slices do nothing where their adapter has no such site, or no such outputs.

    So what fills them up has no gradient, and is of no account after training either. It is read at each use, as
    tensors of a bound module are.
    """

    def __init__(self, part: SiteAdapter) -> None:
        self._part = part

    def __getitem__(self, name: str) -> Tensor:
        leaf = self._part.leaf
        return self._part.method.acting({name: leaf[name]}, leaf[PRESENT], stacked=self._part.rows is not None)[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._part.leaf if name != PRESENT)

    def __len__(self) -> int:
        return len(self._part.leaf) - 1


def _acting(part: SiteAdapter) -> SiteAdapter:
    if PRESENT not in part.leaf:
        return part
    acting = _Acting(part)
    return part._replace(leaf=dict(acting) if isinstance(part.leaf, dict) else acting)


def with_ties(found: Mapping[str, Sequence[SiteAdapter]], model: nn.Module) -> dict[str, list[SiteAdapter]]:
    """The same as they act, and what changes the table of an embedding also where another layer of the model holds it.

    Before it, `bind` puts the adapters' tensors into its module, all that there are of a stack.
    """
    every = {path: [_acting(part) for part in here] for path, here in found.items()}
    for path, here in list(every.items()):
        for part in list(here):
            module = layers.module_at(model, path) if part.leaf and part.method.of_tables else None
            if module is None or layers.kind_of(module) != layers.EMBEDDING:
                continue
            for other in tied_weights.holders(model, path):
                there = every.setdefault(other, [])
                if not any(one.number == part.number and one.method.of_tables for one in there):
                    there.append(part)
                    there.sort(key=_number)
    return every


def _number(part: SiteAdapter) -> int:
    return part.number


def merged(
    part: SiteAdapter, leaf: Mapping[str, Tensor], kind: str, tensors: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The new values of those of a layer's weight and bias that the leaf changes."""
    action = part.method.on_weights
    assert action is not None, "methods that act on whole modules have no site with a weight"
    shape = layouts.of_tensor(kind, tensors["weight"], part.info)
    leaf = leaf_dtypes.widened(leaf, tensors["weight"].dtype)
    return action.merge(part.config, leaf, shape, {name: tensors[name] for name in action.reads if name in tensors})
