"""What is known of each kind of base weight: how to run the layer, read its weight, and write it back.

A method never asks how a weight is stored. `of(module)` picks the codec from one table; a new format is one
file here and one line in the table, and every method works on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftfn.codecs import dense


class Codec(NamedTuple):
    """One kind of base weight.

    Attributes:
        matches: whether a module's weight is of this kind.
        is_linear: whether such a module is a linear layer although it is no `nn.Linear`.
        run: `(module, *args) -> output`, the layer's own forward, that writes nothing to the module.
        read: `(module, name) -> tensor`, the weight as a dense tensor in the layer's own layout.
        write: `(module, name, dense) -> tensor`, a dense tensor in the form in which the module holds it.
    """

    matches: Callable[[nn.Module], bool]
    is_linear: bool
    run: Callable[..., Any]
    read: Callable[[nn.Module, str], Tensor]
    write: Callable[[nn.Module, str, Tensor], Tensor]


TABLE: tuple[Codec, ...] = (Codec(dense.matches, False, dense.run, dense.read, dense.write),)


_BY_CLASS: dict[type[nn.Module], Codec] = {}


def of(module: nn.Module) -> Codec:
    """The codec of a module's weight: the first of the table that matches its class."""
    cls = type(module)
    if cls not in _BY_CLASS:
        _BY_CLASS[cls] = next(codec for codec in TABLE if codec.matches(module))
    return _BY_CLASS[cls]
