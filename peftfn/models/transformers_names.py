"""transformers' names for what prompts and prefixes look for: the one file to change when they change.

Its names change: 5.24 calls the argument that holds a model's cache `cache` where it was `past_key_values`, and 5.40
drops the old name; the field of the output goes along. So a cache is found by what is annotated as one, then by its
type; names are the last resort, for models that annotate nothing or keep something else (XLNet's `mems`, RWKV's
`state`).
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any, cast

from torch import nn

from peftfn.core import transforms
from peftfn.models import signatures

HIDDEN = "hidden_states"
IDS = "input_ids"
DECODER_IDS = "decoder_input_ids"
EMBEDS = "inputs_embeds"
MASK = "attention_mask"
POSITIONS = "position_ids"
CACHE_POSITIONS = "cache_position"
GLOBAL_MASK = "global_attention_mask"
TOKEN_TYPES = "token_type_ids"
TOKEN_KINDS = "mm_token_type_ids"
LABELS = "labels"
USE_CACHE = "use_cache"
LAST = "logits_to_keep"
KEEPS_STATES = "_is_stateful"
"""The attribute of a model's class that says that it keeps states, which are written in place."""
ENCODED = "encoder_hidden_states"
ENCODED_MASK = "encoder_attention_mask"
OTHER_HALF = ("decoder_", "encoder_", "cross_")
"""Prefixes of the names of arguments for the other half of an encoder-decoder."""

ANSWERS = ("start_positions", "end_positions")
"""Labels of question answering: positions of tokens in the input."""

ATTENTION = "_attn_implementation"
"""The field of a config that names the attention of its model."""

ATTENTIONS = "ALL_ATTENTION_FUNCTIONS"
"""The table in a model's module where it looks that name up."""

KNOWS_SDPA = "_supports_sdpa"
"""A class attribute that only transformers' models have."""

GENERATE = "generate"

GENERATION_MASKS = "create_masks_for_generate"
"""The attribute of a model by which `generate` makes whole masks for a static cache, before it calls the model."""

_KEY_CACHES = ("cache", "past_key_values", "layer_past")
_KEY_CACHE_TYPES = ("Cache", "DynamicCache", "EncoderDecoderCache")
_PER_LAYER_GATE = "per_layer_input_gate"
_BESIDE_THE_ROW = (
    "token_dropout",  # ESM's, which depends on which of the tokens are masked
    "encoder_hash_byte_group_size",  # BLT's, of the bytes before it
)
_STATES = ("cache_params", "mems", "state", "past_buckets_states")


# --- the argument -----------------------------------------------------------------------------------------------------


def cache_argument(module: nn.Module) -> str | None:
    """The name of the argument of the module's forward that holds what earlier calls left, or `None` if it has none.

    It is the one annotated as a cache; else, as in RoBERTa, the one that a module inside calls so; else one of a list.
    """
    own = annotated_cache(type(module))
    if own is not None:
        return own
    names = signatures.argument_names(type(module))
    inside = (annotated_cache(kind) for kind in dict.fromkeys(type(one) for one in module.modules()))
    return next((name for name in (*inside, *_KEY_CACHES, *_STATES) if name in names), None)


def keeps_keys(module: nn.Module) -> bool:
    """Whether what the module's forward takes from earlier calls is a cache of keys and values, for any model.

    The argument's name and annotation say it: Jamba's of transformers 4 is a HybridMambaAttentionDynamicCache.
    """
    name, kinds = cache_argument(module), set(_cache_classes(type(module)))
    return name is not None and not holds_states(name) and (not kinds or bool(kinds & set(_KEY_CACHE_TYPES)))


def holds_states(name: str | None) -> bool:
    """Whether the argument of this name holds recurrent states, as Mamba's: they have no place for each token."""
    return name in _STATES


@transforms.constant_result
def annotated_cache(cls: type[nn.Module]) -> str | None:
    """The name of the first argument of a class's `forward` that is annotated as a cache of transformers."""
    return _annotation(cls)[0]


@transforms.constant_result
def _cache_classes(cls: type[nn.Module]) -> tuple[str, ...]:
    return _annotation(cls)[1]


@functools.cache
def _annotation(cls: type[nn.Module]) -> tuple[str | None, tuple[str, ...]]:
    """The name of that argument, and the classes in its annotation."""
    for one in cls.__mro__:
        if "forward" in vars(one):
            forward: Any = vars(one)["forward"]
            said = {
                given.name: tuple(re.findall(r"\w*Cache\b", str(given.annotation)))
                for given in inspect.signature(inspect.unwrap(forward)).parameters.values()
            }
            for wanted in (_KEY_CACHE_TYPES, tuple(kind for kinds in said.values() for kind in kinds)):
                found = ((name, kinds) for name, kinds in said.items() if set(kinds) & set(wanted))
                if (first := next(found, None)) is not None:
                    return first
    return None, ()


def layer_that_reads_ids(model: nn.Module) -> str | None:
    """The class of a layer that reads token ids, or an embedding of them, beside the hidden states; else `None`.

    A prompt's tokens have no ids: Gemma 3n embeds them once more in each layer, and DeepSeek V4 routes by them.
    """
    for module in {type(module): module for module in model.modules()}.values():
        by_id = signatures.takes(module, HIDDEN) and signatures.takes(module, IDS)
        if by_id or hasattr(module, _PER_LAYER_GATE):
            return type(module).__name__
    return None


def ids_in_embedding(config: Any) -> str | None:
    """The config's field by which tokens are embedded by more than their row of the table; `None` if it has none.

    Such a model does not add the rest to `inputs_embeds`.
    """
    return next((name for name in _BESIDE_THE_ROW if hasattr(config, name)), None)


@transforms.constant_result
def shows_first(cls: type[nn.Module]) -> bool:
    """Whether a class lets all tokens see a row's first one, as Longformer's classifiers do, and needs ids for that."""
    return GLOBAL_MASK in signatures.argument_names(cls) and "zeros_like" in names_in(cls)


@transforms.constant_result
def seeks_question(cls: type[nn.Module]) -> bool:
    """Whether a class lets all tokens see those of the question, as Longformer's do, which it finds by their ids."""
    return GLOBAL_MASK in signatures.argument_names(cls) and "sep_token_id" in names_in(cls)


def reads_one_by_one(model: nn.Module) -> bool:
    """Whether a model goes on from a cache a single token at a time (ProphetNet), or by lengths of its own (XLM)."""
    return hasattr(getattr(model, "config", None), "ngram") or signatures.takes(model, "lengths")


def keeps_two_caches(model: nn.Module) -> bool:
    """Whether a model without an encoder makes a cache of two halves, as BLT does for its bytes at both ends."""
    whole = [module for module in model.modules() if signatures.takes(module, EMBEDS)]
    return any("EncoderDecoderCache" in names_in(type(one)) for one in whole if not signatures.takes(one, ENCODED))


def local_window(module: nn.Module) -> int | None:
    """The window, in tokens, of layers that apply one themselves, outside of the cache, as GPT-Neo's."""
    config: Any = getattr(module, "config", None)
    kinds: Any = getattr(config, "attention_layers", None)
    return config.window_size if isinstance(kinds, list) and "local" in kinds else None


# --- code, masks and configs ------------------------------------------------------------------------------------------


@transforms.constant_result
def names_in(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a class's own forward calls, its own code alone."""
    forward: Any = inspect.unwrap(cast("Any", cls.forward))
    return getattr(getattr(forward, "__code__", None), "co_names", ())


@transforms.constant_result
def generates_by_itself(cls: type[nn.Module]) -> bool:
    """Whether a class has a `generate` of its own, which may run another way than through the model's forward."""
    own = getattr(cls, GENERATE, None)
    return callable(own) and not own.__module__.startswith("transformers.generation.")


def mask_as_given(*_: Any, attention_mask: Any = None, **__: Any) -> Any:
    """The mask of one number for each token, in place of one for each pair of them, in which a prompt has no place.

    The model makes the latter itself, for whatever cache it is given.
    """
    return attention_mask


@transforms.constant_result
def wants_whole_mask(cls: type[nn.Module]) -> bool:
    """Whether a model's mask has a number for each place of a static cache, as Bloom's has, that counts by it.

    Its own method for the masks of `generate` then gives such a mask, where others give some for each kind of layer.
    """
    own = getattr(cls, GENERATION_MASKS, None)
    return own is not None and "Tensor" in str(inspect.signature(own).return_annotation)


def said(config: Any, name: str) -> Any:
    """What a config says under a name; `None` where it says nothing, or something else for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001  # transformers has an error of its own for what differs from layer to layer
        return None


def text_config(config: Any) -> Any:
    """A model's config, of a multimodal one its language model's."""
    find: Any = getattr(config, "get_text_config", None)
    return find(decoder=True) if callable(find) else config
