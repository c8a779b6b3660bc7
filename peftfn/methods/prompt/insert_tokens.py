"""Tokens before the input of a call, and what goes along: masks, labels, positions.

A prompt goes directly before a row's first real token, after any padding on its left. So what the base computes for
`[pad, pad, prompt, text]` is what it computes for `[prompt, text]` wherever the base itself treats left padding right,
whatever its position encoding. Without left padding this is the prompt first, as PEFT has it in every case.

Rows may have prompts of unlike length, or none. Each row then has as many places as the longest prompt needs, and the
places that it does not use are masked: before everything else where the model reads a row's last token, as decoders do,
after everything else where it reads the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.methods.prompt.model_call import Added, Call
from peftfn.methods.prompt.places import IGNORED, Place, ones
from peftfn.models import transformers_names as hf

LENGTH = "tokens"
"""The buffer of a stack's leaf with the number of rows of each adapter's prompt, where these differ."""

_TOKEN_TASKS = ("CAUSAL_LM", "TOKEN_CLS")
_KNOWN = (hf.IDS, hf.EMBEDS, hf.MASK, hf.TOKEN_TYPES, hf.TOKEN_KINDS, hf.LABELS, hf.POSITIONS, hf.CACHE_POSITIONS)


def with_tokens(
    call: Call,
    tokens: Tensor,
    added: Added,
    embed: Callable[[Tensor], Tensor],
    task: str | None,
) -> Call:
    """The call with embedded tokens before its input.

    Args:
        call: it has `input_ids` or `inputs_embeds`.
        tokens: (n, dim), the same for each row, or (rows, n, dim).
        added: how many of them each row has.
        embed: the model's own input embedding.
        task: the config's task type: it says whether labels are one per token.

    Raises:
        ValueError: the call has no input, or an argument of which it is not known how it goes along with the input.
    """
    if not call.first:
        return call._replace(prompts=(*call.prompts, added))
    embeds = call.given.get(hf.EMBEDS)
    if embeds is None:
        ids = call.given.get(hf.IDS)
        if ids is None:
            raise ValueError(
                f"the batch has {sorted(call.given)}; expected input_ids or inputs_embeds, to put the prompt before."
            )
        embeds = embed(ids)  # (rows, length, dim)
    if added.own is not None and call.given.get(hf.MASK) is None:
        call = call.having(**{hf.MASK: ones(embeds, embeds.shape[1])})
    place = Place.of(call.given.get(hf.MASK), embeds, added)
    _refuse_unknown(call.given, embeds.shape[:2])
    beside = _beside(call, place, embeds, task)
    changes = {hf.IDS: None, hf.EMBEDS: place.put(tokens.to(embeds.dtype), embeds), **beside}
    is_guess = hf.POSITIONS in beside and call.given.get(hf.POSITIONS) is None
    kept = {name: place.fill(0, one) for name, one in call.beside.items()}
    return call.having(**changes)._replace(guessed=call.guessed or is_guess, beside=kept)


def _beside(call: Call, place: Place, embeds: Tensor, task: str | None) -> dict[str, Any]:
    """What the other arguments become: masks, labels, positions."""
    added = place.added
    # The model counts them itself; those of states say whether this is the first call.
    changes: dict[str, Any] = {} if hf.holds_states(call.takes.cache) else {hf.CACHE_POSITIONS: None}
    for name, fill in ((hf.MASK, 1), (hf.TOKEN_TYPES, 0), (hf.TOKEN_KINDS, 0)):
        if (given := call.given.get(name)) is not None:
            changes[name] = place.fill(fill, given)
    labels = call.given.get(hf.LABELS)
    if labels is not None and _per_token(labels, embeds, task):
        changes[hf.LABELS] = place.fill(IGNORED, labels, missing=IGNORED)
        if task != "TOKEN_CLS":  # there is no shift
            changes[hf.LABELS] = place.first_ignored(changes[hf.LABELS])
    positions = call.given.get(hf.POSITIONS)
    if positions is not None:
        changes[hf.POSITIONS] = place.positions(positions)
    elif added.start is not None and added.own is not None:
        changes[hf.POSITIONS] = place.default_positions(embeds.shape[1], added.start)
    changes |= _kept(call.given.get(hf.LAST), added, hf.LABELS in changes)
    for name in hf.ANSWERS:
        if (given := call.given.get(name)) is not None:
            changes[name] = given + place.moved()  # the answer's tokens have moved
    return changes


def _kept(kept: Any, added: Added, has_labels: bool) -> dict[str, Any]:
    """The places for which the model is to give logits, of the text as before, or the last ones."""
    if isinstance(kept, Tensor):
        return {hf.LAST: torch.where(kept < 0, kept, kept + added.places)}  # negative ones count from its end
    return {hf.LAST: kept + added.places} if kept and has_labels else {}  # as many as there are labels


def _per_token(labels: Tensor, embeds: Tensor, task: str | None) -> bool:
    if task is not None:
        return task in _TOKEN_TASKS
    return not labels.is_floating_point() and labels.shape == embeds.shape[:2]


def _refuse_unknown(given: Mapping[str, Any], shape: torch.Size) -> None:
    for name, value in given.items():
        if name in _KNOWN or name.startswith(hf.OTHER_HALF) or not isinstance(value, Tensor):
            continue
        if value.dim() > 1 and value.shape[:2] == shape:
            raise ValueError(
                f"the batch has {name} of shape {tuple(value.shape)}, one for each token, and it is not known what a "
                "prompt's tokens get there. Leave it out, or use a method that adds no tokens."
            )
