"""Which keys and values the layers of a model leave in its cache, as a copy of it without weights leaves them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn import transformers_caches as caches
from peftfn import transformers_names as hf
from peftfn import transforms


class Shape(NamedTuple):
    """What one layer keeps of a token.

    Attributes:
        heads: how many have keys of their own.
        key: how wide one's keys are.
        value: how wide its values are.
    """

    heads: int
    key: int
    value: int

    def __str__(self) -> str:
        width = str(self.key) if self.key == self.value else f"{self.key} (values {self.value})"
        return f"{self.heads} x {width}"


def key_shapes(model: nn.Module) -> list[Shape] | None:
    """What each layer of a model keeps; `None` where it cannot be found out.

    A config says it in many ways, and not always what its model does: latent attention keeps one head of keys, of
    another width than its values; layers share keys. So a model of the same class and config, whose tensors have no
    numbers, is run on one token.
    """
    config: Any = copy.deepcopy(getattr(model, "config", None))
    names = (hf.IDS, hf.DECODER_IDS) if getattr(config, "is_encoder_decoder", False) else (hf.IDS,)
    try:
        with torch.random.fork_rng(devices=[]), transforms.without_numbers(), torch.no_grad():
            empty = type(model)(config).eval()
            output: Any = empty(**{name: torch.zeros(1, 1, dtype=torch.long) for name in names}, use_cache=True)
    except Exception:  # noqa: BLE001  # another's constructor, or a forward that looks at values: then nothing is known
        return None
    cache = next((one for one in getattr(output, "values", tuple)() if caches.is_cache(one)), None)
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in caches.layers_of(cache) or ()]
    shapes = [_shape(key, value) for key, value in kept if isinstance(key, Tensor) and isinstance(value, Tensor)]
    return shapes or None


def _shape(key: Tensor, value: Tensor) -> Shape:
    return Shape(key.shape[1], key.shape[-1], value.shape[-1])
