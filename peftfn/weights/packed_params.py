"""Packed weights among parameters that are given by name, as the state dict of a bitsandbytes model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.weights import codecs


def settled(model: nn.Module, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The parameters without entries that only serve to read a packed weight, which the model has no tensor for.

    Such a weight is dense then; or left out, where it is what the module itself holds.
    """
    every = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    lost = [name for name in params if name not in every]
    if not lost:
        return params
    found = dict(params)
    for path, module in cast("Any", model.named_modules(remove_duplicate=False)):
        prefix = f"{path}." if path else ""
        name = f"{prefix}weight"
        if name not in params or codecs.of(module) is codecs.DENSE:
            continue
        held: Mapping[str, Tensor] = module.state_dict(prefix=prefix)
        own = [one for one in lost if one in held]
        if not own:
            continue
        if all(_is_same(held[one], params[one]) for one in (name, *own) if one in held):
            del found[name]
        else:
            entry = codecs.find(params, name, module)
            if entry is None:
                continue
            found[name] = entry.dense
        for one in own:
            found.pop(one, None)
    return found


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
