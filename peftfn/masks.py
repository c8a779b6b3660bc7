"""Padding masks that `torch.vmap` maps over: attention that does not look at their values.

transformers asks whether a padding mask is all ones, to leave it out; under `torch.vmap` there is no one answer. A
model of its `sdpa` attention is therefore run, for such a call, with the same attention under a name of its own, whose
mask is always made. The names are registered where transformers offers it: its `AttentionInterface` and
`AttentionMaskInterface`. Of `eager` attention each architecture has its own, found by that name, so there only what
makes the mask, the model, is told another one. The model's config stays as it is; the call's twins get a copy.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# torch has no public way to ask whether a tensor is mapped over
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor

_NAMES = {"sdpa": "peftfn_sdpa", "eager": "peftfn_eager"}


def suit(twins: Iterable[nn.Module], given: Mapping[str, Any]) -> None:
    """Let the twins of a transformers model run a call whose padding masks are mapped over.

    Args:
        twins: every module of this call.
        given: the call's arguments by name.
    """
    masks = [value for name, value in given.items() if name.endswith("attention_mask") and isinstance(value, Tensor)]
    if torch.compiler.is_compiling() or not any(is_mapped(mask) for mask in masks):
        return  # transformers does not look at masks while Dynamo traces
    from transformers import PreTrainedModel

    copies: dict[int, Any] = {}
    for twin in twins:
        config = twin.__dict__.get("config")
        kind = getattr(config, "_attn_implementation", None)
        if kind == "sdpa" or (kind == "eager" and isinstance(twin, PreTrainedModel)):
            if id(config) not in copies:
                _register()
                copies[id(config)] = copy.deepcopy(config)
                setattr(copies[id(config)], "_attn_implementation", _NAMES[kind])  # noqa: B010  # transformers' one way to set it
            twin.__dict__["config"] = copies[id(config)]
        if twin.__dict__.get("attn_implementation") == "sdpa":
            twin.__dict__["attn_implementation"] = "eager"  # BERT and its kin of transformers 4 choose a mask by this


def is_mapped(tensor: Tensor) -> bool:
    """Whether a `torch.vmap` that is going on maps over the tensor."""
    while is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    masking: Any = importlib.import_module("transformers.masking_utils")
    attention: Any = importlib.import_module("transformers.integrations.sdpa_attention")

    def whole(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return make(*args, **kwargs | skips)

        return made

    AttentionInterface.register(_NAMES["sdpa"], attention.sdpa_attention_forward)
    AttentionMaskInterface.register(_NAMES["sdpa"], whole(masking.sdpa_mask))
    AttentionMaskInterface.register(_NAMES["eager"], whole(masking.eager_mask))
