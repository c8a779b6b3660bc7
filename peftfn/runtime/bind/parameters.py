"""Where a bound module holds its adapters: as parameters and buffers of the modules that they adapt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.core.adapter import SHARED, Adapter
from peftfn.runtime import site_adapters

Names = dict[str, dict[str, str]]
"""Full names in the bound module, by site path and leaf name."""


class Slots(NamedTuple):
    """Where a bound module holds one adapter, which is here without its tensors."""

    adapter: Adapter
    params: Names
    buffers: Names


class Held(Mapping[str, Tensor]):
    """A leaf that is read from modules at each use, so that `to`, an optimizer or DDP may put others there.

    Args:
        homes: name -> the module that has the tensor, and as what.
    """

    def __init__(self, homes: Mapping[str, tuple[nn.Module, str]]) -> None:
        self._homes = dict(homes)

    def __getitem__(self, name: str) -> Tensor:
        module, own = self._homes[name]
        found = module._parameters.get(own)  # most are there, and getattr looks there last
        return getattr(module, own) if found is None else found

    def __contains__(self, name: object) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


class Holder(NamedTuple):
    """What `hold` reads and fills.

    Attributes:
        by_path: the modules.
        adapters: whose tensors are held.
        slots: where they are.
        made: the trained parameters, by the id of the adapter's tensor.
        fixes: whether tensors that do not require grad are held fixed, because others of the adapters do.
    """

    by_path: Mapping[str, nn.Module]
    adapters: tuple[Adapter, ...]
    slots: tuple[Slots, ...]
    made: dict[int, nn.Parameter]
    fixes: bool


def hold(holder: Holder, path: str, here: list[site_adapters.SiteAdapter]) -> list[site_adapters.SiteAdapter]:
    """The adapters of one site, with their tensors registered on its module and read from there."""
    owner = path if path in holder.by_path else path.rpartition(".")[0]
    module = holder.by_path.get(owner)
    if module is None:
        return here  # attach will say that there is no such site
    made: list[site_adapters.SiteAdapter] = []
    for part in here:
        trained = holder.adapters[part.number].params.get(path, {})
        made.append(_hold_part(holder, module, part, _Where(path, owner, part.number, frozenset(trained))))
    return made


class _Where(NamedTuple):
    """Whose tensors are held at which site: the path, its module's, the adapter's number, and what of it is trained."""

    path: str
    owner: str
    number: int
    trained: frozenset[str]


def _hold_part(
    holder: Holder, module: nn.Module, part: site_adapters.SiteAdapter, where: _Where
) -> site_adapters.SiteAdapter:
    count = len(holder.adapters)
    shared = _hold_shared(holder, part) if part.info.shares else {}
    own = {name: _attribute(name, where, count) for name in part.leaf if name not in shared}
    leaf, replaced = Held({**{name: (module, one) for name, one in own.items()}, **shared}), part.replaced
    if part.rows is not None:  # a replacement for each adapter of the stack: beside the tensor, not in its place
        stacked = {name: f"stacked_{name}" for name in part.replaced}
        own |= stacked
        replaced = Held({name: (module, one) for name, one in stacked.items()})
    for name, attribute in own.items():
        tensor = part.leaf[name] if name in part.leaf else part.replaced[name]
        _register(holder, module, attribute, tensor, name in where.trained)
    if part.rows is None:
        replaced = {
            name: _parameter(holder, tensor, name in where.trained) if name in module._parameters else tensor
            for name, tensor in part.replaced.items()
        }
    for name in (*own, *(name for name in part.replaced if name not in own)):
        names = holder.slots[where.number].params if name in where.trained else holder.slots[where.number].buffers
        names.setdefault(where.path, {})[name] = (f"{where.owner}." if where.owner else "") + own.get(name, name)
    return part._replace(leaf=leaf, replaced=replaced)


def _hold_shared(holder: Holder, part: site_adapters.SiteAdapter) -> dict[str, tuple[nn.Module, str]]:
    """What the site shares with others: held once, by the whole module."""
    home, count, slots = part.info.shares, len(holder.adapters), holder.slots[part.number]
    where = _Where(home, home, part.number, frozenset(holder.adapters[part.number].params.get(home, {})))
    found: dict[str, tuple[nn.Module, str]] = {}
    for name in (name for name, slot in part.method.slots.items() if slot.shared and name in part.leaf):
        own = _attribute(name, where, count) + home.removeprefix(SHARED).replace(".", "_")
        names = (slots.params if name in where.trained else slots.buffers).setdefault(home, {})
        if name not in names:
            _register(holder, holder.by_path[""], own, part.leaf[name], name in where.trained)
            names[name] = own
        found[name] = holder.by_path[""], own
    return found


def _attribute(name: str, where: _Where, count: int) -> str:
    parameter = "" if where.path == where.owner else f"{where.path.rpartition('.')[2]}_"
    return f"{parameter}{name}" + (f"_{where.number}" if count > 1 else "")


def _register(holder: Holder, module: nn.Module, name: str, tensor: Tensor, trained: bool) -> None:
    if hasattr(module, name):
        raise ValueError(
            f"{type(module).__name__} already has an attribute {name!r}; bind cannot put the adapter there."
        )
    if trained:
        module.register_parameter(name, _parameter(holder, tensor, trained))
    else:
        module.register_buffer(name, tensor)


def _parameter(holder: Holder, tensor: Tensor, trained: bool) -> nn.Parameter:
    is_graph = tensor.grad_fn is not None and torch.is_grad_enabled()
    if trained and (is_graph or transforms.is_differentiated(tensor)):
        raise ValueError(
            f"bind was given a tensor {tuple(tensor.shape)} of an adapter that was computed (it has a gradient of its "
            "own): as a parameter of the bound module it would be cut from what made it. Use peftfn.apply, through "
            "which gradients flow; or call bind under torch.no_grad(), to run it or to train from its values."
        )
    if not trained or (holder.fixes and not tensor.requires_grad):
        return nn.Parameter(tensor.detach(), requires_grad=False)
    made = holder.made.get(id(tensor))
    if made is None:
        made = holder.made[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=True)
    return made
