"""What the `forward` of a class names as its arguments."""

from __future__ import annotations

import functools
import inspect

from torch import nn

from peftfn.core import transforms


@transforms.constant_result
def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of a class's positional arguments in `forward`, in order."""
    return _argument_names(cls)


@transforms.constant_result
def required_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Those of them that have no default."""
    parameters = inspect.signature(cls.forward).parameters
    return tuple(name for name in _argument_names(cls) if parameters[name].default is inspect.Parameter.empty)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward, or one that it may pass its arguments on to, names this argument."""
    return _takes(type(module), name)


@transforms.constant_result
def _takes(cls: type[nn.Module], name: str) -> bool:
    return any(name in _argument_names(one) for one in cls.__mro__ if "forward" in vars(one))


@functools.cache
def _argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind in positional)
