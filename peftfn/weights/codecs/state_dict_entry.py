"""What the codecs share about entries of a state dict, and about classes of libraries that may not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    """A packed weight among parameters by name.

    Attributes:
        dense: the weight as a dense tensor.
        companions: names of other entries that are a part of it (scales).
        pack: `(dense) -> entries`: a dense weight in the same format with the same settings, under the same names.
    """

    dense: Tensor
    companions: tuple[str, ...]
    pack: Callable[[Tensor], dict[str, Any]]


def library(name: str) -> Any:
    """A module of an optional library that is known to be installed, as `Any`: few of them have types."""
    return importlib.import_module(name)


def is_a(cls: type, library: str, *names: str) -> bool:
    """Whether a class is, or inherits from, one of these of a library; nothing is imported to find out."""
    return any(one.__name__ in names and one.__module__.partition(".")[0] == library for one in cls.__mro__)
