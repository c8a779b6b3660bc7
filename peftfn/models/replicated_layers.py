"""Layers repeated: a model that runs some of its layers several times, as a view (PEFT's `layer_replication`).

Each place in the view has module objects of its own, whose parameters are aliases of the base's: adapters act on each
place by itself, and merged weights are each place's own, where PEFT adds all of them to the one weight that is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from peftfn.models import copies
from peftfn.weights import codecs

_MARK = "_peftfn_layer_replication"

Ranges = tuple[tuple[int, int], ...]


def replicate_layers(model: nn.Module, layer_replication: Sequence[Sequence[int]]) -> Any:
    """A model of the same class that runs ranges of the given one's layers, one after the other.

    It shares the memory of the base's weights, and nothing is written to the base. Use it as a base itself:
    `pf.init(view, config)` fills `layer_replication` into a `LoraConfig`, so that PEFT makes the same of the file, and
    `pf.load(folder, view)` reads one of PEFT's.

    Args:
        model: a model of transformers with a list of layers, as Llama, BERT or Falcon have it.
        layer_replication: ranges of layers, `[start, end]` with `end` left out: `[[0, 4], [2, 5]]` runs layers 0, 1, 2,
            3, 2, 3, 4.

    Raises:
        ValueError: the model has no such list, is such a view already, or a range is not one of its layers.

    Example:
        >>> import peftfn as pf, transformers
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, vocab_size=8)
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        >>> view = pf.replicate_layers(model, [[0, 2], [1, 2]])
        >>> len(view.model.layers), view.config.num_hidden_layers, len(model.model.layers)
        (3, 3, 2)
    """
    if replication_of(model) is not None:
        raise ValueError("replicate_layers was given a view that it made; give it the base, and all ranges at once.")
    found = _home(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no list of layers where Llama (layers), BERT (encoder.layer) or Falcon (h) "
            "have theirs, so none can be repeated."
        )
    count = len(cast("nn.ModuleList", getattr(*found)))
    ranges = tuple((int(start), int(end)) for start, end in layer_replication)
    if not ranges or any(not 0 <= start < end <= count for start, end in ranges):
        raise ValueError(
            f"layer_replication={[list(one) for one in layer_replication]}; expected ranges [start, end] of the "
            f"{count} layers of {type(model).__name__}, with start below end."
        )
    order = [number for start, end in ranges for number in range(start, end)]
    view = copies.shared(model, codecs.shared(model))
    view.__dict__[_MARK] = ranges
    home, name = cast("tuple[nn.Module, str]", _home(view))
    layers = cast("nn.ModuleList", getattr(home, name))
    setattr(home, name, nn.ModuleList(_copy(view, layers[number], place) for place, number in enumerate(order)))
    _tell(view, order)
    return view


def replication_of(model: nn.Module) -> Ranges | None:
    """The ranges of layers that a view runs; `None` of any other model."""
    return model.__dict__.get(_MARK)


def _home(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The module that has the list of layers, and the list's name."""
    inner: Any = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    for home, name in ((inner, "layers"), (getattr(inner, "encoder", None), "layer"), (inner, "h")):
        if isinstance(getattr(home, name, None), nn.ModuleList):
            return cast("nn.Module", home), name
    return None


def _copy(view: nn.Module, layer: nn.Module, place: int) -> nn.Module:
    """The layer's module objects anew, for a place in the view."""
    configs = [module.__dict__["config"] for module in view.modules() if "config" in module.__dict__]
    made = copies.shared(layer, [*configs, *codecs.shared(layer)])
    for module in made.modules():
        if "layer_idx" in module.__dict__:  # by it a layer finds its part of a cache
            module.layer_idx = place
    return made


def _tell(view: nn.Module, order: Sequence[int]) -> None:
    """Write the number of layers, and what the config says of each, into the view's own config."""
    config: Any = getattr(view, "config", None)
    get: Any = getattr(config, "get_text_config", None)
    found: dict[int, Any] = {id(one): one for one in (config, get() if callable(get) else config)}
    for one in found.values():
        kinds: Sequence[str] | None = getattr(one, "layer_types", None)
        if hasattr(one, "num_hidden_layers"):
            one.num_hidden_layers = len(order)
        if kinds:
            one.layer_types = [kinds[number] for number in order]
