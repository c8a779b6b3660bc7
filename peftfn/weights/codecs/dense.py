"""Floating-point weights, stored as they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.weights import offloaded
from peftfn.weights.codecs.state_dict_entry import Entry

# As torch has them: one that somebody put in their place does more.
_FORWARDS = frozenset((nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward))
_PLAIN = (Tensor, nn.Parameter)  # a subclass may be packed, or spread over devices


def matches(module: nn.Module) -> bool:
    """Always: what no other codec claims is dense."""
    del module
    return True


def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward."""
    return type(module).forward(module, *args, **kwargs)


def product(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of torch's own linear layers and convolutions."""
    if type(module).forward not in _FORWARDS:
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return None if weight is None or type(weight) not in _PLAIN else (weight, bias)


def shape(module: nn.Module, name: str) -> torch.Size:
    """The weight's own."""
    return _held(module, name).shape


def read(module: nn.Module, name: str) -> Tensor:
    """The weight itself; one that accelerate keeps elsewhere, from there."""
    found = _held(module, name)
    there = offloaded.value(module, name) if found.is_meta else None
    return found if there is None else there


def _held(module: nn.Module, name: str) -> Tensor:
    # Past any property of that name: torch's parametrizations have one, and so has a bound module.
    own = module._parameters.get(name)
    return getattr(module, name) if own is None else own


def find(params: Mapping[str, Tensor], name: str, module: nn.Module | None) -> Entry | None:
    """Never: a dense weight needs no unpacking."""
    return None


def shared(module: nn.Module) -> list[Any]:
    """Nothing."""
    return []
