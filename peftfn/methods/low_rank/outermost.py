"""Whether a backward pass can be differentiated itself.

`torch.func.grad` makes a graph of its backward pass, because a transform around it, or autograd outside, may ask for
the derivative of what it returns. Where there is neither, nobody can; and without the graph the pass may write to what
it has made. Only a call of torch's own is believed: code inside the transformed function that calls
`torch.autograd.grad(..., create_graph=True)` does differentiate its pass.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peftfn.core import transforms

_ENGINE = torch.autograd.grad.__code__


def without_graph(tensors: Iterable[Tensor | None]) -> contextlib.AbstractContextManager[Any]:
    """No gradients, where a backward pass that computes with these tensors cannot be differentiated itself."""
    return torch.no_grad() if _is_last(tensors) else contextlib.nullcontext()


def _is_last(tensors: Iterable[Tensor | None]) -> bool:
    if not transforms.is_one_gradient():
        return False
    given = (one for one in tensors if one is not None)
    return not any(map(transforms.requires_grad_outside, given)) and _is_called_by_torch()


def _is_called_by_torch() -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _ENGINE:
        frame = frame.f_back
    # A GPU's backward pass runs in a thread of its own, where no frame says who asked for it.
    return frame is not None and frame.f_back is not None and frame.f_back.f_code is transforms.ENGINE_CALLER
