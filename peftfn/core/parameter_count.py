"""How many numbers adapters train, of how many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from peftfn.core.adapter import Adapter, as_tuple


class Count(NamedTuple):
    """How many numbers are trained, and how many there are in all.

    Attributes:
        trained: numbers in the adapters' `params`.
        total: these, and those of the base or of the adapters' `buffers`.

    Example:
        >>> import peftfn as pf
        >>> print(pf.Count(trained=50, total=1000))
        trained 50 of 1,000 parameters (5.00%)
    """

    trained: int
    total: int

    @property
    def share(self) -> float:
        """Trained over total, between 0 and 1.

        Example:
            >>> import peftfn as pf
            >>> pf.Count(trained=50, total=1000).share
            0.05
        """
        return self.trained / max(self.total, 1)

    def __str__(self) -> str:
        return f"trained {self.trained:,} of {self.total:,} parameters ({self.share:.2%})"


def count(adapter: Adapter | Iterable[Adapter], model: nn.Module | None = None) -> Count:
    """How many numbers the adapter trains, of how many in all.

    Args:
        adapter: one adapter or several.
        model: the base. With it the total is the base's parameters and the adapter's together, as PEFT's
            `print_trainable_parameters` counts; without it, the adapter's tensors alone.

    Raises:
        TypeError: something else than adapters was given.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> pf.count(adapter), pf.count(adapter, model)
        (Count(trained=14, total=15), Count(trained=14, total=29))
    """
    adapters = as_tuple(adapter)
    trained = sum(t.numel() for one in adapters for leaf in one.params.values() for t in leaf.values())
    if model is None:
        rest = sum(t.numel() for one in adapters for leaf in one.buffers.values() for t in leaf.values())
    else:
        rest = sum(parameter.numel() for parameter in model.parameters())
    return Count(trained, trained + rest)
