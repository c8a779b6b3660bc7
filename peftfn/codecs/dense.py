"""Floating-point weights, stored as they are used."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def matches(module: nn.Module) -> bool:
    """Always: what no other codec claims is dense."""
    del module
    return True


def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward."""
    return type(module).forward(module, *args, **kwargs)


def read(module: nn.Module, name: str) -> Tensor:
    """The weight itself."""
    # Past any property of that name: torch's parametrizations have one, and so has a bound module.
    own = module._parameters.get(name)
    return getattr(module, name) if own is None else own


def write(module: nn.Module, name: str, dense: Tensor) -> Tensor:
    """The tensor in the dtype of the weight that it replaces."""
    return dense.to(getattr(module, name).dtype)
