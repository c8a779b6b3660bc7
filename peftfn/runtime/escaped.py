"""Whether a call computes with private copies alone, and whether the adapters had any part in it.

What leads from a model's code to its own modules is followed (`models.references`), as far as Python can be asked. Past
that (a global name, a library's own memory) a layer runs the base's own tensors, and the adapter is lost without a
word. So the first call of its kind is watched: every function of torch is asked whether one of those goes in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftfn.core import transforms
from peftfn.models.surgery import Plan


def can_watch(twins: Mapping[str, nn.Module]) -> bool:
    """Whether a mode around the call changes nothing of it.

    Dynamo has no way with one, so no part of the model may be compiled. And torch's attention takes another kernel in
    evaluation where a mode is active, which rounds otherwise.
    """
    if torch.compiler.is_compiling():
        return False
    every = twins.values()
    fused = any(isinstance(twin, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for twin in every)
    return not fused and not any(type(twin).__module__.startswith(transforms.TORCHS_OWN) for twin in every)


def _several(value: Any) -> Iterable[Any]:
    return cast("Iterable[Any]", value) if isinstance(value, (list, tuple)) else (value,)


_ABOUT = frozenset(("requires_grad_", "detach_", "share_memory_", "rename_", "retain_grad"))
"""Functions with the name of one that writes, which change what is known of a tensor and not its numbers."""
_SETS = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__"))


def _written(called: str, args: Sequence[Any], given: Mapping[str, Any]) -> list[Any]:
    """The arguments that a function of this name writes to."""
    found = [*_several(given.get("out"))]
    writes = called in _SETS or (called.endswith("_") and called[-2:] != "__" and called not in _ABOUT)
    if args and writes:
        found += _several(args[0])  # `_foreach_add_` has a list
    if args and given.get("inplace") is True:
        found.append(args[0])
    return found


def _address(tensor: Tensor) -> int:
    """Where a plain tensor's memory is; 0 for others."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or transforms.is_wrapped(tensor):
        return 0
    return tensor.untyped_storage().data_ptr()


def _around(path: str, twins: Mapping[str, nn.Module]) -> str:
    """The nearest module around one that runs: no list of modules."""
    around = path.rpartition(".")[0]
    while isinstance(twins.get(around), (nn.ModuleList, nn.ModuleDict)):
        around = around.rpartition(".")[0]
    return around


class Watch(TorchFunctionMode):
    """A context that refuses uses of the base's own tensors and writes to their memory, and notes whether a site ran.

    Args:
        plan: what the adapters change, before it is carried out: its sites say from now on when they run.
        twins: the private modules, by path.
    """

    def __init__(self, plan: Plan, twins: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._put = [(path, name) for path, name in (*plan.tensors, *plan.computed)]
        self._sites = [*filter(None, plan.forwards), *(f"{path}.{name}" for path, name in self._put)]
        self._has_run = not self._sites or "" in plan.forwards
        # Where the modules around the sites do not run either, the base has skipped them: no image, no such branch.
        homes = {_around(path, twins) for path in plan.forwards} | {path for path, _ in self._put}
        self._is_reached = "" in homes
        for path in filter(None, [*plan.forwards]):
            plan.then(path, lambda _, run: functools.partial(self._noting, run))
        for path in homes - {""}:
            plan.then(path, lambda _, run: functools.partial(self._reaching, run))
        for key, compute in plan.reads.items():
            plan.reads[key] = functools.partial(self._noting, compute)
        self._names: dict[int, str] = {}
        self._memory: dict[int, str] = {}
        self._read: set[int] = set()

    def look_for(self, model: nn.Module, twins: Mapping[str, nn.Module], given: Any) -> None:
        """Know the tensors of the base that are not to be seen: those that neither the twins nor the caller gives."""
        used = {id(one) for twin in twins.values() for one in (*twin._parameters.values(), *twin._buffers.values())}
        used |= {id(one) for one in cast("Iterable[Any]", torch_pytree.tree_leaves(given)) if isinstance(one, Tensor)}
        named = list(model.named_parameters(remove_duplicate=False))
        self._names = {id(one): name for name, one in named if id(one) not in used}
        self._memory = {address: name for name, one in named if (address := _address(one))}
        put = [(twins[path], name) for path, name in self._put]
        self._read = {id({**twin._buffers, **twin._parameters}[name]) for twin, name in put}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What the function gives, if no tensor of the base's own goes in."""
        given = dict(kwargs or {})
        called = func.__name__
        if called != "__get__":  # of a tensor's shape or dtype
            for one in (*args, *given.values()):
                for tensor in _several(one):
                    self._look_at(tensor, called)
        for one in _written(called, args, given):
            name = self._memory.get(_address(one)) if isinstance(one, Tensor) else None
            if name is not None:
                raise ValueError(
                    f"{name}: the model's forward writes to it (`{called}`), and a base is a constant here. Let the "
                    "forward compute with a copy (weight = self.weight.clone()), or keep what changes in a buffer, "
                    "which each call has of its own."
                )
        return func(*args, **given)

    def _look_at(self, tensor: Any, called: str) -> None:
        self._has_run = self._has_run or id(tensor) in self._read
        if id(tensor) in self._names:
            raise ValueError(
                f"{self._names[id(tensor)]}: the model's forward runs `{called}` on this tensor of the base itself, "
                "past the private copies that adapters act on: something that cannot be followed leads there (a global "
                "name, an object of a library). Let it go through the module (self.layer), or an attribute of it."
            )

    def _noting(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._has_run = True
        return run(*args, **kwargs)

    def _reaching(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_reached = True
        return run(*args, **kwargs)

    def __exit__(self, *raised: Any) -> None:
        """Leave the context; refuse a call that came to where the sites are, and in which the adapters had no part."""
        super().__exit__(*raised)
        if raised[0] is None and self._is_reached and not self._has_run:
            raise ValueError(
                f"no site of the adapter ran or was read in this call: {', '.join(self._sites[:3])}"
                f"{', ...' if len(self._sites) > 3 else ''}. The model's forward does not come to them, or has code of "
                "a library that runs past the modules; without them, peftfn.apply(model, (), batch) is the same."
            )
