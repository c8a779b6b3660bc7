"""Masks and positions of a call that has prompts in its cache, or in its encoder's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core import transforms
from peftfn.methods.prompt.model_call import Added, Call, tokens_of, without_empty_places
from peftfn.methods.prompt.places import Place, check_mask, left_padding, ones
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf


def settled(call: Call) -> Call:
    """The call, its mask and positions extended by the prompts and prefixes that are in its cache."""
    every = (*call.prompts, *call.prefixes)
    places = sum(added.places for added in every)
    if not call.first and (held := caches.length(call.cache)) is not None:
        call = without_empty_places(call, held - places)
    if every:
        _refuse_cut_cache(call, places)
    if call.prefixes:
        _refuse_far_prefix(call)
    if any(added.own is not None for added in every):
        call = _explicit(call, every)
    for added in call.prompts:
        call = _with_cached(call, added, front=False)
    for added in reversed(call.prefixes):
        call = _with_cached(call, added, front=True)
    size = caches.capacity(call.cache)
    return call if size is None else _fitted(call, size)


def _fitted(call: Call, size: int) -> Call:
    """The call with a static cache of this size, which it must not write past.

    Raises:
        ValueError: it would.
    """
    tokens, left = tokens_of(call), size - (caches.length(call.cache) or 0)
    if tokens is not None and tokens.shape[1] > left:
        raise ValueError(
            f"the call has {tokens.shape[1]} tokens, those of prompts included, and its static cache has room for "
            f"{left} more. Make the cache longer by the prompts' tokens, or leave it out."
        )
    mask = call.given.get(hf.MASK)
    if mask is None or not call.whole_mask:
        return call
    return call.having(**{hf.MASK: F.pad(mask, (0, size - mask.shape[1]))})


def _refuse_cut_cache(call: Call, places: int) -> None:
    """Refuse a call whose mask is not as long as its cache and its input together, without the prompts."""
    tokens, mask, held = tokens_of(call), call.given.get(hf.MASK), caches.length(call.cache)
    is_decoder = hf.DECODER_IDS not in call.given
    if tokens is None or held is None or not isinstance(mask, Tensor) or mask.dim() != 2 or not is_decoder:
        return
    if mask.shape[1] != held - places + tokens.shape[1]:
        raise ValueError(
            f"attention_mask has a number for each of {mask.shape[1]} tokens; expected {tokens.shape[1]} for the input "
            f"and {held - places} for the cache, which holds {held} with the {places} of prompts and prefixes. If the "
            "cache was cut to the length of the text, as assisted generation of transformers 4 does, tokens are "
            "lost; generate without an assistant, or with transformers 5."
        )


def _explicit(call: Call, added: Sequence[Added]) -> Call:
    """The call with the default mask and positions written out, for the text alone."""
    tokens = tokens_of(call)
    if tokens is None:
        return call
    held = caches.length(call.cache)
    if held is None:
        return call  # recurrent states: such a model has neither masks nor positions of earlier tokens
    past = held - sum(one.places for one in added)
    changes: dict[str, Any] = {}
    if call.given.get(hf.MASK) is None:
        changes[hf.MASK] = ones(tokens, past + tokens.shape[1])
    start = next((one.start for one in added if one.start is not None), None)
    if call.given.get(hf.POSITIONS) is None and start is not None:
        at = start + past + torch.arange(tokens.shape[1], device=tokens.device)
        changes[hf.POSITIONS] = at.expand(tokens.shape[0], -1)
    return call.having(**changes)


def _refuse_far_prefix(call: Call) -> None:
    """Refuse a prefix of which a row's left padding would push a part out of the layers' window."""
    tokens, mask = tokens_of(call), call.given.get(hf.MASK)
    windows = [one for one in (caches.window(call.cache), call.takes.window) if one is not None]
    if tokens is None or not windows or not isinstance(mask, Tensor):
        return
    window = min(windows)
    if (caches.length(call.cache) or 0) + tokens.shape[1] <= window:
        return
    is_asked = torch.compiler.is_compiling() or transforms.is_mapped(mask)  # the mask's values cannot be read
    if is_asked or bool((left_padding(mask) > 0).any()):
        raise ValueError(
            f"layers of the model see {window} tokens, and padding on the left is between a row and its prefix: the "
            "row would see less of the prefix than it sees alone. Give rows of one length and no mask, pad on the "
            "right, or use prompt tuning."
        )


def _with_cached(call: Call, added: Added, *, front: bool) -> Call:
    """The call, its mask and positions extended by tokens that were added to its cache.

    Args:
        call: its attention mask covers the text alone.
        added: how many.
        front: whether they are before any left padding, as a prefix is, or after it.
    """
    changes: dict[str, Any] = {}
    mask = call.given.get(hf.MASK)
    if mask is not None:
        check_mask(mask)
        changes[hf.MASK] = Place.of(None if front else mask, mask, added).fill(1, mask)
    positions = call.given.get(hf.POSITIONS)
    if positions is not None:
        changes[hf.POSITIONS] = positions + (added.places if added.own is None else added.own.view(-1, 1))
    if (given := call.given.get(hf.CACHE_POSITIONS)) is not None:
        changes[hf.CACHE_POSITIONS] = given + added.places
    return call.having(**changes)


def with_encoded(call: Call, added: Added) -> Call:
    """A decoder's call, its mask of the encoder's output extended by the prompt that the encoder was given."""
    hidden, mask = call.given[hf.ENCODED], call.given.get(hf.ENCODED_MASK)
    if mask is None and added.own is not None:
        mask = ones(hidden, hidden.shape[1] - added.places)
    if mask is None or mask.shape[1] == hidden.shape[1]:
        return call
    return call.having(**{hf.ENCODED_MASK: Place.of(mask, mask, added).fill(1, mask)})
