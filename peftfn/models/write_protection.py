"""What keeps a bound module's own methods from reaching the base through the storage that they share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftfn.weights import codecs

_SHARED = "_peftfn_shared"
_REFUSED = (
    "A bound module shares the base's weights and writes to none of them: load other weights (as "
    "save_pretrained(folder, merge=True) writes) into a base with from_pretrained, the adapter with peftfn.load, and "
    "bind again."
)


def protect(bound: nn.Module, own: Collection[int]) -> None:
    """Make the methods that write to parameters leave those of the base alone.

    `load_state_dict` (of any module of the tree, or of a wrapper) refuses other values for them, `apply(fn)` refuses
    to write to them, `requires_grad_` passes them by, and DDP does not broadcast them. Code that writes to one by
    name, `bound.layer.weight.normal_()`, writes to the base: no method of the module is called that could refuse it.

    Args:
        bound: the module, whose parameters share the base's storage.
        own: ids of the parameters that are the adapter's.
    """
    for module in bound.modules():
        attributes = module.__dict__
        attributes[_SHARED] = frozenset(
            name for name, parameter in module._parameters.items() if parameter is not None and id(parameter) not in own
        )
        attributes["_load_from_state_dict"] = functools.partial(_load, module)
        attributes["apply"] = functools.partial(_apply, module)
        attributes["requires_grad_"] = functools.partial(_requires_grad, module)
    names = [name for name, parameter in bound.named_parameters(remove_duplicate=False) if id(parameter) not in own]
    bound.__dict__["_ddp_params_and_buffers_to_ignore"] = names


def _is_shared(module: nn.Module, name: str) -> bool:
    return name in module.__dict__.get(_SHARED, ())


def _load(module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Load into placeholders for the base's tensors, and report an error where a value is not the base's."""
    errors: list[str] = rest[-1]
    before = len(errors)
    state = _unpacked(module, state, prefix, errors)
    lent = {
        name: tensor for name, tensor in _of_base(module).items() if prefix + name in state and not _is_sharded(tensor)
    }
    for name, tensor in lent.items():
        _home(module, name)[name] = _blank(tensor)
    try:
        # load_state_dict's step for one module: it has no public name
        type(module)._load_from_state_dict(module, state, prefix, *rest)  # noqa: SLF001
    finally:
        # FSDP puts its own back in there
        given = {name: new for name in lent if not _is_sharded(new := _home(module, name)[name])}
        for name in given:
            _home(module, name)[name] = lent[name]
    changed = [name for name, new in given.items() if not _same(new, lent[name])]
    if changed:
        _refuse(f"{prefix}{changed[0]}", errors, before)


def _refuse(name: str, errors: list[str], before: int) -> None:
    if len(errors) == before and not any(_REFUSED in error for error in errors):
        errors.append(f"{name} is not what the base has. {_REFUSED}")


def _unpacked(module: nn.Module, state: Mapping[str, Any], prefix: str, errors: list[str]) -> Mapping[str, Any]:
    """The state, in which a packed weight that is the base's is the base's own tensors.

    Beside those tensors a state dict has entries (scales of bitsandbytes) that the formats' classes load nowhere else.
    """
    codec, name = codecs.of(module), f"{prefix}weight"
    entry = None if codec is codecs.DENSE else codecs.find(state, name, module)
    if entry is None:
        return state
    if not _same(entry.dense, codec.read(module, "weight")):
        _refuse(name, errors, len(errors))
        return state
    own = _of_base(module)
    read_by = {name, *entry.companions}
    kept = {key: tensor for key, tensor in state.items() if key not in read_by}
    return kept | {key: own[last] for key in read_by if (last := key.removeprefix(prefix)) in own and key in state}


def _of_base(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors that are the base's: parameters, and buffers that hold a packed weight."""
    fixed = {id(one) for one in codecs.of(module).shared(module)}
    return {
        **{name: one for name, one in module._parameters.items() if one is not None and _is_shared(module, name)},
        **{name: one for name, one in module._buffers.items() if one is not None and id(one) in fixed},
    }


def _home(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


def _blank(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _is_sharded(parameter: Tensor | None) -> bool:
    return hasattr(parameter, "device_mesh")  # and so a copy of the base's


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _requires_grad(module: nn.Module, requires_grad: bool = True) -> nn.Module:
    """`module.requires_grad_()` for the adapter's parameters."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and not _is_shared(inner, name):
                parameter.requires_grad_(requires_grad)
    return module


def _apply(module: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
    """`module.apply(fn)`, in which `fn` can write to everything but the base's parameters."""
    names = {
        parameter.untyped_storage().data_ptr(): f"{type(inner).__name__}.{name}"
        for inner in module.modules()
        for name, parameter in inner._parameters.items()
        if parameter is not None and not parameter.is_meta and _is_shared(inner, name)
    }
    with _ReadOnly(names):
        return type(module).apply(module, fn)


class _ReadOnly(TorchDispatchMode):
    """Refuses to write to some storages, given by address and name."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):  # noqa: SLF001  # what it writes to is said there
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                several = cast("list[Any]", value) if isinstance(value, (list, tuple)) else [value]
                for tensor in several:
                    self._check(tensor)
        return func(*args, **kwargs)

    def _check(self, tensor: Any) -> None:
        name = self._names.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
        if name is not None:
            raise RuntimeError(
                f"apply(fn) on a bound module: fn writes to {name}, whose memory is the base's. Give new values to the "
                "base before bind, or let fn leave frozen parameters alone."
            )
