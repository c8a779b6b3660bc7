"""Outputs of our Functions, which whoever called them may change in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# torch has no public name for it; without it, a view is copied
_UNSAFE_VIEW: Any = getattr(torch.ops.aten, "_unsafe_view", None)


def unviewed(tensor: Tensor) -> Tensor:
    """The same numbers in the same memory, as a tensor that is no view.

    A view that is made inside a `torch.autograd.Function` cannot be changed in place after it: autograd has no rule for
    the tensor that it is a view of, which nobody outside has ever seen. `F.linear` of three axes with a bias returns a
    view, and so does every `view` at the end of a forward. Only for a tensor whose base is dropped with it.
    """
    if _UNSAFE_VIEW is None:
        return tensor.clone()
    return _UNSAFE_VIEW(tensor, tensor.shape)
