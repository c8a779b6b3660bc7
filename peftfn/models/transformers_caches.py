"""The caches of transformers: how to find one in a call or an output, what it holds, and how much it can hold.

Found by their types, whatever a model calls the argument and the field of its output
(`peftfn.models.transformers_names`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.models import signatures
from peftfn.models import transformers_names as hf
from peftfn.models.transformers_names import text_config

_OF_KEYS = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layer whose cache has keys and values, which are joined to new ones and not written over."""

# --- what is in a call and its output ---------------------------------------------------------------------------------


def is_cache(value: Any) -> bool:
    """Whether the value is one of transformers' caches, by its type."""
    return _is_cache_type(cast("type[Any]", type(value)))


@transforms.constant_result
def _is_cache_type(cls: type[Any]) -> bool:
    return any(one.__module__.startswith("transformers.") and one.__name__.endswith("Cache") for one in cls.__mro__)


def cache_in(given: Mapping[str, Any], name: str | None, others: Iterable[str] = ()) -> Any:
    """The cache among a call's arguments: under its name, or under one that the forward does not have (an old one).

    Args:
        given: the arguments.
        name: that of the argument for it, from `cache_argument`.
        others: the names of the forward's arguments: one of those may hold a cache for something else.
    """
    if name is not None and given.get(name) is not None:
        return given[name]
    known = set(others)
    return next((one for key, one in given.items() if key not in known and is_cache(one)), None)


def with_cache(given: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """The call's arguments with this cache, and without the one that it replaces, whatever that is called."""
    old = cache_in(given, name, (name,))
    return {**{key: one for key, one in given.items() if old is None or one is not old}, name: cache}


def without_states(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that `torch.vmap` maps over, with no cache of states where nobody asked for a cache.

    States are written in place where they are, and a fresh one is not mapped (Qwen3-Next, Jamba, Mamba and their kin).
    """
    asked = given.get(hf.USE_CACHE) is not None or cache_in(given, None) is not None
    if asked or not signatures.takes(model, hf.USE_CACHE):
        return dict(given)
    kinds = cast("Sequence[str]", hf.said(text_config(getattr(model, "config", None)), "layer_types") or ())
    keeps = not all(kind in _OF_KEYS for kind in kinds) or any(
        hf.said(type(one), hf.KEEPS_STATES) for one in model.modules()
    )
    return {**given, hf.USE_CACHE: False} if keeps else dict(given)


def without_caches(output: Any) -> Any:
    """A model's output without its caches."""
    if isinstance(output, tuple):
        return tuple(one for one in cast("tuple[Any, ...]", output) if not is_cache(one))
    if not hasattr(output, "items") or not any(map(is_cache, output.values())):
        return output
    kind = cast("type[Any]", type(output))
    return kind(**{name: value for name, value in output.items() if not is_cache(value)})


# --- what is in a cache -----------------------------------------------------------------------------------------------


def is_empty(cache: Any) -> bool:
    """Whether nothing was put into a cache yet."""
    if cache is None:
        return True
    if isinstance(cache, (tuple, list)):
        return not any(map(_holds, cast("Sequence[Any]", cache)))
    layers = layers_of(cache)
    return not any(map(_layer_holds, [cache] if layers is None else layers))


def _holds(state: Any) -> bool:
    if isinstance(state, (tuple, list)):
        return any(map(_holds, cast("Sequence[Any]", state)))
    return isinstance(state, Tensor) and state.numel() > 0


def layers_of(cache: Any) -> Sequence[Any] | None:
    """The layers of a cache, of an encoder-decoder's those of the decoder's own tokens; `None` of a class without."""
    return getattr(self_attention(cache), "layers", None)


def _layer_holds(layer: Any) -> bool:
    """Whether a layer of a cache holds keys or states."""
    says: Any = getattr(layer, "has_previous_state", False)  # of states: a flag, or one for each of several
    if any(cast("Mapping[int, bool]", says).values()) if isinstance(says, dict) else says is True:
        return True
    count: Any = getattr(layer, "get_seq_length", None)
    if callable(count) and (found := cast("Any", count())) is not None:
        return int(found) > 0
    # Mamba's of transformers 4 and Reformer's have neither: states that are not all zero hold something.
    held = cast("dict[str, Any]", vars(layer)).values()
    return not hasattr(layer, "has_previous_state") and any(map(_moved, held))


def _moved(state: Any) -> bool:
    if isinstance(state, (tuple, list)):
        return any(map(_moved, cast("Sequence[Any]", state)))
    return isinstance(state, Tensor) and bool(state.any())


def length(cache: Any) -> int | None:
    """How many tokens a cache of keys and values holds; `None` of recurrent states, which have no number of tokens."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):  # of versions before the cache classes
        first: Any = next(iter(cast("Sequence[Any]", cache)), None)
        return int(cast("Sequence[Tensor]", first)[0].shape[-2]) if isinstance(first, (tuple, list)) else None
    layers = layers_of(cache)
    if layers is not None and len(layers) == 0:
        return 0  # layers are made when something is put into them
    counts: Iterable[Any] = (getattr(one, "get_seq_length", None) for one in ([cache] if layers is None else layers))
    found: Any = next((count for count in counts if count is not None), None)
    held: Any = None if found is None else found()
    return None if held is None else int(held)


def self_attention(cache: Any) -> Any:
    """The part of an encoder-decoder's cache that is about the decoder's own tokens, or the cache itself."""
    return getattr(cache, "self_attention_cache", cache)


# --- a cache of fixed size --------------------------------------------------------------------------------------------


def make_room(cache: Any, places: int, config: Any) -> None:
    """Enlarge a static cache by this many tokens: it was made for the input without the prompt.

    Args:
        cache: an empty one; one that has its memory already stays as it is.
        places: how many.
        config: the model's, which says how far a sliding window reaches.
    """
    text = text_config(config)
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    window = next((one for one in windows if isinstance(one, int)), None)
    for layer in _fixed_layers(cache):
        if getattr(layer, "is_initialized", False):
            continue
        wanted = layer.max_cache_len + places
        if not getattr(layer, "is_sliding", False):
            layer.max_cache_len = wanted
        elif window is not None:
            layer.max_cache_len = min(window, wanted)


def _fixed_layers(cache: Any) -> list[Any]:
    return [layer for layer in layers_of(cache) or () if isinstance(getattr(layer, "max_cache_len", None), int)]


def window(cache: Any) -> int | None:
    """The smallest window of the layers, in tokens, the current one included; `None` where all see every token."""
    sliding = [layer for layer in layers_of(cache) or () if getattr(layer, "is_sliding", False)]
    sizes = [getattr(layer, "sliding_window", None) or getattr(layer, "max_cache_len", None) for layer in sliding]
    known = [size for size in sizes if isinstance(size, int)]
    return min(known) if known else None  # with `default=`, torch.compile stops at min


def capacity(cache: Any) -> int | None:
    """How many tokens a static cache can hold, or `None` where it grows or slides."""
    sizes = (layer.max_cache_len for layer in _fixed_layers(cache) if not getattr(layer, "is_sliding", False))
    return next(sizes, None)


# --- making one -------------------------------------------------------------------------------------------------------


def new_cache(config: Any) -> Any:
    """An empty cache for a model of this config."""
    from transformers import DynamicCache, EncoderDecoderCache

    try:
        cache = DynamicCache(config=config)
    except AttributeError as error:  # BLT's config of transformers 4 does not say how many layers it has
        raise ValueError(
            f"{type(config).__name__}: transformers makes no cache of keys and values for it ({error}), and a prefix "
            "goes into one. Use a method that changes layers."
        ) from error
    is_pair = getattr(config, "is_encoder_decoder", False)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if is_pair else cache


def layers_without_keys(config: Any) -> list[int]:
    """The numbers of the layers whose part of a new cache is not one of keys and values, or of nothing else."""
    kinds: Sequence[str] = getattr(text_config(config), "layer_types", None) or ()
    # transformers 4 makes a cache of keys for these too, which their models do not take
    of_states = {number for number, kind in enumerate(kinds) if kind == "linear_attention"}
    made = enumerate(layers_of(new_cache(config)) or ())
    return sorted(of_states | {number for number, one in made if not _keeps_keys(one)})


def _keeps_keys(layer: Any) -> bool:
    """Whether a layer of a cache is one of transformers' own for keys and values, without a second table of keys."""
    is_own = type(layer).__module__.rpartition(".")[2] == "cache_utils"  # DeepSeek V4 compresses what it keeps
    return is_own and hasattr(layer, "keys") and not hasattr(layer, "update_indexer")
