"""How transformers' models count positions and read masks, which decides where a prompt or a prefix can be put."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from peftfn.models import signatures
from peftfn.models import transformers_names as hf

_TURNS = "apply_rotary_position_embeddings"
_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
_COUNT = "get_rope_index"
_RUNNING = ("current_pos", "st_idx")
"""Names, in the functions that count positions in space, of the position at which the next part of a row begins."""

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


def counts_by_mask(model: nn.Module) -> bool:
    """Whether the positions of a model are those of the places that its mask leaves, as OPT's are."""
    return any(
        isinstance(table, nn.Embedding) and signatures.takes(table, hf.MASK) and "cumsum" in hf.names_in(type(owner))
        for owner in model.modules()
        for table in owner.children()
    )


def first_position(config: Any) -> int:
    """The position of a row's first token in a model that counts masked places too: in PaliGemma it is 1."""
    return 1 if getattr(config, "model_type", None) == "paligemma" else 0


def counted_from_pictures(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """The argument by which a model with rotary positions in space counts those of its tokens, if there is one.

    It finds a picture's place in the ids, of which a prompt has none, and only while its cache is empty. `generate`
    counts them before.
    """
    if hf.POSITIONS in given or not any(hasattr(module, _COUNT) for module in model.modules()):
        return None
    found = (*pictures(given), *(name for name in given if name.endswith("_thw") or name == "mm_encoder_outputs"))
    return next(iter(found), None)


def counts_on(model: nn.Module) -> bool:
    """Whether positions in space, of pictures too, go on from what is before them, so that words before move them all.

    HunYuan-VL's do not: on some axes they begin anew in each picture, on another they number the pictures.
    """
    kinds = dict.fromkeys(type(module) for module in model.modules())
    count: Any = next((getattr(kind, _COUNT) for kind in kinds if hasattr(kind, _COUNT)), None)
    names: tuple[str, ...] = getattr(getattr(inspect.unwrap(count or id), "__code__", None), "co_varnames", ())
    return any(name in names for name in _RUNNING)


def mask_with_pictures(model: nn.Module, given: Mapping[str, Any]) -> str | None:
    """The argument by which a model's mask has other places than tokens have, if there is one.

    Token types of pictures (Gemma 3, PaliGemma) count from the text's start, GIT puts its pictures before the mask.
    """
    found = next(iter(pictures(given)), None)
    is_other = hf.TOKEN_TYPES in given or getattr(getattr(model, "config", None), "model_type", None) == "git"
    return found if is_other else None


def pictures(given: Mapping[str, Any]) -> list[str]:
    """The names of pictures and sounds in a call."""
    numbers = [name for name, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return [name for name in numbers if name != hf.EMBEDS and not name.startswith(hf.OTHER_HALF)]


def position_table(model: nn.Module, *, rotary: bool = False) -> str | None:
    """The class of the module that adds positions to a model's tokens; `None` where only distances count.

    Args:
        model: any.
        rotary: whether rotary ones are meant too: they make distances of all but a prefix, whose keys are not turned.
    """
    find: Any = getattr(model, "get_decoder", None)
    inner: Any = cast("Any", find)() if callable(find) else None
    part: Any = inner if isinstance(inner, nn.Module) else model
    classes = "PositionalEmbedding|Rotary" if rotary else "PositionalEmbedding"
    named: list[tuple[str, nn.Module]] = list(part.named_modules())
    # RoFormer's is a table of angles, whatever its name
    is_rotary = any(hasattr(type(module), _TURNS) for _, module in named)
    for path, module in named:
        if path.rpartition(".")[2] in _TABLES or re.search(classes, type(module).__name__):
            return type(module).__name__ if rotary or not is_rotary else None
    return None


def reads_masked(config: Any) -> str | None:
    """The field of a config that says that its model mixes tokens whatever their mask says; `None` if none does."""
    return next((name for name in _MIXING if getattr(config, name, None)), None)


def sees_whole_text(model: nn.Module) -> bool:
    """Whether token types say which tokens see what comes after them, while the cache is empty, as in PaliGemma.

    With a prefix in it the model takes the first call for a later one, unless there are pictures in it.
    """
    takers = (type(module) for module in model.modules() if signatures.takes(module, hf.TOKEN_TYPES))
    return any("is_initialized" in hf.names_in(kind) for kind in dict.fromkeys(takers))
