"""What transformers calls the things that a call with a prompt or a prefix has to find: the one file to change.

Its names change: 5.24 calls the argument that holds a model's cache `cache` where it was `past_key_values`, and 5.40
drops the old name; the field of the output goes along. So a cache is found by what is annotated as one, then by its
type; names are the last resort, for models that annotate nothing or keep something else (XLNet's `mems`, RWKV's
`state`).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from peftfn import signatures, transforms

HIDDEN = "hidden_states"
IDS = "input_ids"
DECODER_IDS = "decoder_input_ids"
EMBEDS = "inputs_embeds"
MASK = "attention_mask"
POSITIONS = "position_ids"
CACHE_POSITIONS = "cache_position"
GLOBAL_MASK = "global_attention_mask"
TOKEN_TYPES = "token_type_ids"
LABELS = "labels"
USE_CACHE = "use_cache"
ENCODED = "encoder_hidden_states"
ENCODED_MASK = "encoder_attention_mask"
OTHER_HALF = ("decoder_", "encoder_", "cross_")
"""What arguments about the other half of an encoder-decoder begin with."""

ANSWERS = ("start_positions", "end_positions")
"""Places in the input that a question answering model is to find."""

ATTENTION = "_attn_implementation"
"""The field of a config that names the attention of its model."""

ATTENTIONS = "ALL_ATTENTION_FUNCTIONS"
"""The table in a model's module where it looks that name up."""

KNOWS_SDPA = "_supports_sdpa"
"""What classes of models say of themselves, by which a module is known to be one of transformers' models."""

GENERATE = "generate"

GENERATION_MASKS = "create_masks_for_generate"
"""The attribute of a model by which `generate` makes whole masks for a static cache, before it calls the model."""

_KEY_CACHES = ("cache", "past_key_values", "layer_past")
_KEY_CACHE_TYPES = ("Cache", "DynamicCache", "EncoderDecoderCache")
_PER_LAYER_GATE = "per_layer_input_gate"
_BESIDE_THE_ROW = (
    "token_dropout",  # ESM's, that depends on which of the tokens are masked
    "encoder_hash_byte_group_size",  # BLT's, of the bytes before it
)
_TURNS = "apply_rotary_position_embeddings"
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
_MIXING = (
    "trigram_input",  # MobileBERT reads each token with its neighbours
    "head_ratio",  # ConvBERT has convolutions in place of some heads
    "conv1d_width",  # RecurrentGemma's, before its recurrence
    "pooling_type",  # Funnel's layers shorten the row
    "num_landmarks",  # Nyströmformer's, of equal parts of the row
    "block_per_row",  # MRA's blocks
    "num_hash",  # YOSO's hashes
    "rescale_every",  # RWKV's recurrence
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
    """Whether the argument of this name holds states, which know no tokens: Mamba's positions are no token's."""
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
    """The class of a layer that is given token ids, or what was made of them, beside what comes out of other layers.

    A prompt's tokens have no ids: Gemma 3n embeds them once more in each layer, and DeepSeek V4 routes by them.
    """
    modules = {type(module): module for module in model.modules()}
    for kind, module in modules.items():
        by_id = signatures.takes(module, HIDDEN) and signatures.takes(module, IDS)
        if by_id or hasattr(module, _PER_LAYER_GATE):
            return kind.__name__
    return None


def ids_in_embedding(config: Any) -> str | None:
    """The field of a config that says that tokens are embedded by more than their row of the table.

    Such a model takes what it is given for embedded tokens as it is.
    """
    return next((name for name in _BESIDE_THE_ROW if hasattr(config, name)), None)


@transforms.constant_result
def shows_first(cls: type[nn.Module]) -> bool:
    """Whether a class lets all tokens see a row's first one, as Longformer's classifiers do, and needs ids for that."""
    return GLOBAL_MASK in signatures.argument_names(cls) and "zeros_like" in _names_in(cls)


@transforms.constant_result
def seeks_question(cls: type[nn.Module]) -> bool:
    """Whether a class lets all tokens see those of the question, as Longformer's do, which it finds by their ids."""
    return GLOBAL_MASK in signatures.argument_names(cls) and "sep_token_id" in _names_in(cls)


def reads_one_by_one(model: nn.Module) -> bool:
    """Whether a model goes on from a cache a single token at a time (ProphetNet), or by lengths of its own (XLM)."""
    return hasattr(getattr(model, "config", None), "ngram") or signatures.takes(model, "lengths")


def keeps_two_caches(model: nn.Module) -> bool:
    """Whether a model without an encoder makes a cache of two halves, as BLT does for its bytes at both ends."""
    modules = {type(module): module for module in model.modules()}
    embeds = {kind: one for kind, one in modules.items() if signatures.takes(one, EMBEDS)}
    alone = [kind for kind, one in embeds.items() if not signatures.takes(one, ENCODED)]
    return any("EncoderDecoderCache" in _names_in(kind) for kind in alone)


def local_window(module: nn.Module) -> int | None:
    """How many tokens back layers see whose window is their own business and not that of the cache, as GPT-Neo's."""
    config: Any = getattr(module, "config", None)
    kinds: Any = getattr(config, "attention_layers", None)
    return config.window_size if isinstance(kinds, list) and "local" in kinds else None


# --- positions --------------------------------------------------------------------------------------------------------


def counts_by_mask(model: nn.Module) -> bool:
    """Whether the positions of a model are those of the places that its mask leaves, as OPT's are."""
    return any(
        isinstance(table, nn.Embedding) and signatures.takes(table, MASK) and "cumsum" in _names_in(type(owner))
        for owner in model.modules()
        for table in owner.children()
    )


def _names_in(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a class's own forward calls, its own code alone."""
    forward: Any = inspect.unwrap(cast("Any", cls.forward))
    return getattr(getattr(forward, "__code__", None), "co_names", ())


def first_position(config: Any) -> int:
    """The position of a row's first token in a model that counts masked places too: in PaliGemma it is 1."""
    return 1 if getattr(config, "model_type", None) == "paligemma" else 0


def counted_from_pictures(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """The argument by which a model with rotary positions in space counts those of its tokens, if there is one.

    It finds a picture's place in the ids, of which a prompt has none, and only while its cache is empty.
    """
    if not any(hasattr(module, "get_rope_index") for module in model.modules()):
        return None
    return next((name for name in (*_numbers(given), *given) if name.endswith("_thw") or name in _numbers(given)), None)


def mask_with_pictures(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """The argument by which a model's mask has other places than tokens have, if there is one.

    Token types of pictures (Gemma 3, PaliGemma) count from the text's start, GIT puts its pictures before the mask.
    """
    pictures = next(iter(_numbers(given)), None)
    is_other = TOKEN_TYPES in given or getattr(getattr(model, "config", None), "model_type", None) == "git"
    return pictures if is_other else None


def _numbers(given: Mapping[str, Any]) -> list[str]:
    """The names of pictures and sounds in a call."""
    numbers = [name for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return [name for name in numbers if name != EMBEDS and not name.startswith(OTHER_HALF)]


def position_table(model: nn.Module, *, rotary: bool = False) -> str | None:
    """The class of what gives a model's words their positions; `None` where only distances count.

    Args:
        model: any.
        rotary: whether rotary ones are meant too: they make distances of all but a prefix, whose keys are not turned.
    """
    find: Any = getattr(model, "get_decoder", None)
    inner: Any = cast("Any", find)() if callable(find) else None
    part: Any = inner if isinstance(inner, nn.Module) else model
    classes = "PositionalEmbedding|Rotary" if rotary else "PositionalEmbedding"
    named: Iterable[tuple[str, nn.Module]] = part.named_modules()
    # RoFormer's is a table of angles, whatever its name
    is_rotary = any(hasattr(type(module), _TURNS) for module in part.modules())
    for path, module in named:
        if path.rpartition(".")[2] in _TABLES or re.search(classes, type(module).__name__):
            return type(module).__name__ if rotary or not is_rotary else None
    return None


def reads_masked(config: Any) -> str | None:
    """The field of a config that says that its model mixes tokens whatever their mask says; `None` if none does."""
    return next((name for name in _MIXING if getattr(config, name, None)), None)


# --- masks and configs ------------------------------------------------------------------------------------------------


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
