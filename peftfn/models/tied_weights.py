"""Layers that hold one weight, such as an embedding and the output layer that is tied to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from peftfn.core.transforms import is_traced
from peftfn.models import layers

_WITH_POINTER = frozenset((Tensor, nn.Parameter))
"""Classes whose `data_ptr` may be asked for; a fake or a sharded tensor has none."""


def holders(model: nn.Module, path: str) -> list[str]:
    """The paths of the other modules that hold the same weight as the one at `path`."""
    module = model.get_submodule(path)
    weight = module._parameters.get("weight")
    if weight is None:
        return []
    found = layers.named_modules(model)
    return [one for one, other in found if other is not module and other._parameters.get("weight") is weight]


def names(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of each parameter that several modules hold."""
    found: dict[int, list[str]] = {}
    for path, module in layers.named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return tuple(tuple(several) for several in found.values() if len(several) > 1)


def aliases(params: Mapping[str, Tensor], name: str) -> Iterator[str]:
    """The other names in `params` of the same tensor, or of another view of all of it, as a state dict has them."""
    own = params[name]
    for other, tensor in params.items():
        if other != name and is_one(tensor, own):
            yield other


def is_one(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same one, or views of all of the same memory."""
    if one is other:
        return True
    if one.shape != other.shape or {type(one), type(other)} - _WITH_POINTER:
        return False
    if one.is_meta or other.is_meta or is_traced(one, other) or not one.numel():
        return False
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.dtype == other.dtype
