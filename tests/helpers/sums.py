"""Another CPU, as far as rounding goes: products of matrices add up in an order of their own.

What a CPU's kernels do differently shows in the last bits: they cut a sum in other pieces. Here each product takes
its terms in a random order, which depends on the shapes and strides, as a kernel's choice does: the same product of the
same tensors has the same bits, and another one need not.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

_LIBRARIES: list[torch.library.Library] = []  # what is registered ends with its library


_SEED = "PEFTFN_TEST_SUMS"


def as_parent() -> None:
    """In a process that a test has started: sums as in the test's own."""
    if _SEED in os.environ:
        reorder(int(os.environ[_SEED]))


def reorder(seed: int) -> None:
    """Let every eager product of matrices on the CPU add up in the order of a seed, until the process ends.

    A process that this one starts does the same, if it calls `as_parent`.
    """
    os.environ[_SEED] = str(seed)
    orders: dict[Any, Tensor] = {}

    def order(a: Tensor, b: Tensor) -> Tensor:
        key = (seed, tuple(a.shape), a.stride(), tuple(b.shape), b.stride())
        if key not in orders:
            generator = torch.Generator().manual_seed(hash(key) % 2**63)  # a hash of numbers is the same everywhere
            orders[key] = torch.randperm(a.shape[-1], generator=generator, device="cpu")
        return orders[key]

    def mm(a: Tensor, b: Tensor) -> Tensor:
        terms = order(a, b)
        made = a.new_empty(a.shape[0], b.shape[1])
        return torch.ops.aten.mm.out(a.index_select(1, terms), b.index_select(0, terms), out=made)

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        terms = order(a, b)
        made = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        return torch.ops.aten.bmm.out(a.index_select(2, terms), b.index_select(1, terms), out=made)

    def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        terms = order(a, b)
        made = a.new_empty(a.shape[0], b.shape[1])
        left, right = a.index_select(1, terms), b.index_select(0, terms)
        return torch.ops.aten.addmm.out(c, left, right, beta=beta, alpha=alpha, out=made)

    library = torch.library.Library("aten", "IMPL")
    _LIBRARIES.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it overrides torch's own kernels: so it should
        for function in (mm, bmm, addmm):
            library.impl(function.__name__, function, "CPU")
