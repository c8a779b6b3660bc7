"""The shapes of the keys and values that each layer puts into a cache, found by running a copy without weights."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf


class Shape(NamedTuple):
    """The shape of what one layer puts into the cache for a token.

    Attributes:
        heads: the number of heads of keys and values.
        key: the width of a head's keys.
        value: the width of its values.
    """

    heads: int
    key: int
    value: int

    def __str__(self) -> str:
        width = str(self.key) if self.key == self.value else f"{self.key} (values {self.value})"
        return f"{self.heads} x {width}"


def key_shapes(model: nn.Module, count: int) -> list[Shape] | None:
    """The shapes of each layer of a model; `None` where they cannot be found out.

    Configs do not always say them: latent attention keeps one head of keys, of another width than its values, and
    layers may share keys. So a model of the same class and config, whose tensors have no storage, is run on one token.
    Where that run fails half way (experts read how many tokens each of them has), the other layers are taken to be
    like the last one that ran.

    Args:
        model: one that takes a cache of keys and values.
        count: how many layers it has.
    """
    part = _of_words(model)
    config: Any = copy.deepcopy(getattr(part, "config", None))
    names = (hf.IDS, hf.DECODER_IDS) if getattr(config, "is_encoder_decoder", False) else (hf.IDS,)
    cache, is_whole = caches.new_cache(config), True
    try:
        with torch.random.fork_rng(devices=[]), transforms.without_numbers(), torch.no_grad():
            given: dict[str, Any] = {name: torch.zeros(1, 1, dtype=torch.long) for name in names}
            type(part)(config).eval()(**given, **{hf.cache_argument(part) or "": cache}, use_cache=True)
    except Exception:  # noqa: BLE001  # another's constructor, or a forward that looks at values: then nothing is known
        is_whole = False
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in caches.layers_of(cache) or ()]
    shapes = [_shape(key, value) for key, value in kept if isinstance(key, Tensor) and isinstance(value, Tensor)]
    return (shapes if is_whole else shapes + shapes[-1:] * (count - len(shapes))) or None


def _of_words(model: nn.Module) -> nn.Module:
    """The language model of a multimodal one: it has the keys, and constructors of other parts may read values."""
    find: Any = getattr(model, "get_decoder", None)
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    found = find() if callable(find) and not is_pair else None
    return found if isinstance(found, nn.Module) and hf.keeps_keys(found) else model


def _shape(key: Tensor, value: Tensor) -> Shape:
    return Shape(key.shape[1], key.shape[-1], value.shape[-1])
