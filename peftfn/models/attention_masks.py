"""transformers' attention in a call that `torch.vmap` maps over.

Padding masks: transformers asks whether a mask is all ones, to leave it out; under `torch.vmap` there is no one answer.
A model of its `sdpa` attention is therefore run, for such a call, with the same attention under a name of its own,
whose mask is always made. Of `eager` attention each architecture has its own, found by its name, so there only the
model, which makes the mask, is told another one.

Attention itself: under that name, and under another with transformers' own masks where none is mapped, `sdpa` is what
`peftfn.models.attention` makes of it, which takes the mapped axis as a part of the batch.

The names are registered where transformers offers it: its `AttentionInterface` and `AttentionMaskInterface`. The
model's config stays as it is; the call's twins get a copy.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.models import attention
from peftfn.models import transformers_names as hf

_NAME = "peftfn_sdpa"
_WHOLE = "peftfn_sdpa_whole"  # the same, with masks that are always made
_EAGER = "peftfn_eager"  # each architecture's own attention, with masks that are always made


def suit(twins: Iterable[nn.Module], given: Mapping[str, Any]) -> None:
    """Give the twins of a transformers model, in a call under `torch.vmap`, attention that works when it is mapped.

    Args:
        twins: every module of this call.
        given: the call's arguments by name.
    """
    masks = [value for name, value in given.items() if name.endswith(hf.MASK) and isinstance(value, Tensor)]
    whole = any(map(transforms.is_mapped, masks))
    copies: dict[int, Any] = {}
    for twin in twins:
        config = twin.__dict__.get("config")
        name = _instead(twin, getattr(config, hf.ATTENTION, None), whole)
        if name is not None:
            if id(config) not in copies:
                _register()
                copies[id(config)] = copy.deepcopy(config)
                setattr(copies[id(config)], hf.ATTENTION, name)
            twin.__dict__["config"] = copies[id(config)]
        if whole and twin.__dict__.get("attn_implementation") == "sdpa":
            twin.__dict__["attn_implementation"] = "eager"  # BERT and its kin of transformers 4 choose a mask by this


def _instead(twin: nn.Module, kind: str | None, whole: bool) -> str | None:
    """The name under which the twin is to look up its attention, or `None` to leave its config as it is."""
    if kind in ("sdpa", _NAME) and _asks(twin, whole):
        return _WHOLE if whole else _NAME
    return _EAGER if kind == "eager" and whole and hasattr(twin, hf.KNOWS_SDPA) else None


def _asks(twin: nn.Module, whole: bool) -> bool:
    """Whether the twin looks up its attention, or masks that have to be made, by the name in its config.

    Falcon, for one, has its masks made by that name, but compares it with "sdpa" where it calls torch's attention.
    """
    home = sys.modules.get(type(twin).__module__)
    return hasattr(home, hf.ATTENTIONS) or (whole and hasattr(twin, hf.KNOWS_SDPA))


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    masking: Any = importlib.import_module("transformers.masking_utils")

    def whole(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return make(*args, **kwargs | skips)

        return made

    for name, mask in ((_NAME, masking.sdpa_mask), (_WHOLE, whole(masking.sdpa_mask))):
        AttentionInterface.register(name, attention.of_transformers)
        AttentionMaskInterface.register(name, mask)
    AttentionMaskInterface.register(_EAGER, whole(masking.eager_mask))
