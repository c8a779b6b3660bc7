"""Tokens before the input of a call, and what goes along: masks, labels, positions.

A prompt goes directly before a row's first real token, after any padding on its left. So what the base computes for
`[pad, pad, prompt, text]` is what it computes for `[prompt, text]` wherever the base itself treats left padding right,
whatever its position encoding. Without left padding this is the prompt first, as PEFT has it in every case.

Rows may have prompts of unlike length, or none. Each row then has as many places as the longest prompt needs, and the
places that it does not use are masked: before everything else where the model reads a row's last token, as decoders do,
after everything else where it reads the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn import transformers_names as hf
from peftfn.calls import Added, Call, tokens_of

LENGTH = "tokens"
"""The buffer of a stack's leaf that says how many rows each adapter's prompt has, where they have unlike numbers."""

IGNORED = -100
"""The label that torch's cross entropy leaves out."""

_TOKEN_TASKS = ("CAUSAL_LM", "TOKEN_CLS")
_KNOWN = (hf.IDS, hf.EMBEDS, hf.MASK, hf.TOKEN_TYPES, hf.LABELS, hf.POSITIONS, hf.CACHE_POSITIONS)


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
        call = call.having(**{hf.MASK: _ones(embeds, embeds.shape[1])})
    place = _Place.of(call.given.get(hf.MASK), embeds, added)
    _refuse_unknown(call.given, embeds.shape[:2])
    beside = _beside(call, place, embeds, task)
    changes = {hf.IDS: None, hf.EMBEDS: place.put(tokens.to(embeds.dtype), embeds), **beside}
    is_guess = hf.POSITIONS in beside and call.given.get(hf.POSITIONS) is None
    return call.having(**changes)._replace(guessed=call.guessed or is_guess)


def _beside(call: Call, place: _Place, embeds: Tensor, task: str | None) -> dict[str, Any]:
    """What the other arguments become: masks, labels, positions."""
    added = place.added
    changes: dict[str, Any] = {hf.CACHE_POSITIONS: None}  # the model counts them itself
    for name, fill in ((hf.MASK, 1), (hf.TOKEN_TYPES, 0)):
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
    elif added.counted and added.own is not None:
        changes[hf.POSITIONS] = place.default_positions(embeds.shape[1])
    for name in hf.ANSWERS:
        if (given := call.given.get(name)) is not None:
            changes[name] = given + place.moved()  # the answer's tokens have moved
    return changes


def settled(call: Call) -> Call:
    """The call whose arguments know of everything that is in its cache."""
    every = (*call.prompts, *call.prefixes)
    if any(added.own is not None for added in every):
        call = _explicit(call, every)
    for added in call.prompts:
        call = _with_cached(call, added, front=False)
    for added in reversed(call.prefixes):
        call = _with_cached(call, added, front=True)
    size = hf.capacity(call.cache)
    return call if size is None else _fitted(call, size)


def _fitted(call: Call, size: int) -> Call:
    """The call with a static cache of this size, which it must not write past.

    Raises:
        ValueError: it would.
    """
    tokens, left = tokens_of(call), size - (hf.length(call.cache) or 0)
    if tokens is not None and tokens.shape[1] > left:
        raise ValueError(
            f"the call has {tokens.shape[1]} tokens, those of prompts included, and its static cache has room for "
            f"{left} more. Make the cache longer by the prompts' tokens, or leave it out."
        )
    mask = call.given.get(hf.MASK)
    if mask is None or not call.takes.whole_mask:
        return call
    return call.having(**{hf.MASK: F.pad(mask, (0, size - mask.shape[1]))})


def _explicit(call: Call, added: Sequence[Added]) -> Call:
    """The call with the mask and the positions that leaving them out means, for all but what was added to its cache."""
    tokens = tokens_of(call)
    if tokens is None:
        return call
    held = hf.length(call.cache)
    if held is None:
        return call  # states of a model that knows neither masks nor positions of what it has seen
    past = held - sum(one.places for one in added)
    changes: dict[str, Any] = {}
    if call.given.get(hf.MASK) is None:
        changes[hf.MASK] = _ones(tokens, past + tokens.shape[1])
    if call.given.get(hf.POSITIONS) is None and any(one.counted for one in added):
        at = past + torch.arange(tokens.shape[1], device=tokens.device)
        changes[hf.POSITIONS] = at.expand(tokens.shape[0], -1)
    return call.having(**changes)


def _ones(tokens: Tensor, length: int) -> Tensor:
    return torch.ones(tokens.shape[0], length, dtype=torch.long, device=tokens.device)


def _with_cached(call: Call, added: Added, *, front: bool) -> Call:
    """The call with more tokens in its cache than its arguments know of.

    Args:
        call: its attention mask covers the text alone.
        added: how many.
        front: whether they are before any left padding, as a prefix is, or after it.
    """
    changes: dict[str, Any] = {}
    mask = call.given.get(hf.MASK)
    if mask is not None:
        _check_mask(mask)
        changes[hf.MASK] = _Place.of(None if front else mask, mask, added).fill(1, mask)
    positions = call.given.get(hf.POSITIONS)
    if positions is not None:
        changes[hf.POSITIONS] = positions + (added.places if added.own is None else added.own.view(-1, 1))
    if (given := call.given.get(hf.CACHE_POSITIONS)) is not None:
        changes[hf.CACHE_POSITIONS] = given + added.places
    return call.having(**changes)


def with_encoded(call: Call, added: Added) -> Call:
    """A decoder's call, whose encoder has seen more tokens than the mask knows of."""
    hidden, mask = call.given[hf.ENCODED], call.given.get(hf.ENCODED_MASK)
    if mask is None and added.own is not None:
        mask = _ones(hidden, hidden.shape[1] - added.places)
    if mask is None or mask.shape[1] == hidden.shape[1]:
        return call
    return call.having(**{hf.ENCODED_MASK: _Place.of(mask, mask, added).fill(1, mask)})


def rightmost(tokens: Tensor, added: Added) -> Tensor:
    """(rows, n, ...): each row's own tokens after the places that it does not use, as `_Place` masks them."""
    if added.own is None:
        return tokens
    return tokens.take_along_dim(_front(added).view(*added.own.shape, -1, *(1 for _ in tokens.shape[2:])), 1)


def _front(added: Added) -> Tensor:
    """(rows, n): which token is in each of the places before a row's text, where no padding is between."""
    assert added.own is not None
    at, own = torch.arange(added.places, device=added.own.device), added.own.view(-1, 1)
    return torch.where(at < added.places - own, at + own, at - (added.places - own))


def left_padding(mask: Tensor) -> Tensor:
    """How many tokens of each row are padding before its first real one, (rows, 1), by its mask (rows, length)."""
    return (mask.cumsum(1) == 0).sum(1, keepdim=True)


class _Place(NamedTuple):
    """Where new tokens go in each row: after its left padding, if there is a mask that tells.

    Attributes:
        added: how many there are.
        rows: how many rows.
        lead: (rows, 1), the length of each row's left padding, if that is known.
        order: (rows, n + length), into the new tokens followed by the old ones.
    """

    added: Added
    rows: int
    lead: Tensor | None
    order: Tensor | None

    @classmethod
    def of(cls, mask: Any, tokens: Tensor, added: Added) -> _Place:
        rows, length = tokens.shape[:2]
        if mask is None and added.own is None:
            return cls(added, rows, None, None)
        if mask is None:
            lead = torch.zeros(rows, 1, dtype=torch.long, device=tokens.device)
        else:
            _check_mask(mask)
            if mask.shape[1] != length:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)} and the input {rows} rows of {length} tokens; "
                    "expected one number per token."
                )
            lead = left_padding(mask)
        own = added.places if added.own is None else added.own.view(-1, 1)
        at = _inside(added, length, lead.device)  # in the row's own sequence: [padding, prompt, text]
        order = torch.where(
            at < lead, at + added.places, torch.where(at < lead + own, at - lead, at + added.places - own)
        )
        if added.own is not None:  # the places that are not used get the new tokens that are left over
            order = torch.where(at < 0, at + added.places, torch.where(at >= own + length, at - length, order))
        return cls(added, rows, lead, order)

    def put(self, new: Tensor, old: Tensor) -> Tensor:
        """(rows, n + length, ...) of new (n, ...) or (rows, n, ...) and old (rows, length, ...) ones."""
        joined = torch.cat([new.expand(self.rows, *new.shape[new.dim() - old.dim() + 1 :]), old], 1)
        if self.order is None:
            return joined
        return joined.take_along_dim(self.order.view(*self.order.shape, *(1 for _ in old.shape[2:])), 1)

    def fill(self, value: int, old: Tensor, missing: int = 0) -> Tensor:
        """The same with one value for all new tokens, and one for the places that are not used."""
        new = torch.full((self.added.places,), value, dtype=old.dtype, device=old.device)
        if self.added.own is not None:
            new = torch.where(self._is_used(), new, missing)
        return self.put(new, old)

    def _is_used(self) -> Tensor:
        assert self.added.own is not None
        return torch.arange(self.added.places, device=self.added.own.device) < self.added.own.view(-1, 1)

    def first_ignored(self, labels: Tensor) -> Tensor:
        """The labels of a model that shifts them, in which no row without new tokens has its first token predicted."""
        own = self.added.own
        if own is None or self.added.at_end:
            return labels
        at = _inside(self.added, labels.shape[1] - self.added.places, labels.device)
        return labels.masked_fill((at == 0) & (own.view(-1, 1) == 0), IGNORED)

    def positions(self, old: Tensor) -> Tensor:
        """Position ids in which each row's prompt starts where its text started, and the text follows."""
        if old.dim() > 2:
            raise ValueError(
                f"position_ids has shape {tuple(old.shape)}; expected (rows, length): a prompt's tokens have no place "
                "in another form."
            )
        old = old.expand(self.rows, old.shape[-1])
        first = old[:, :1] if self.lead is None else old.gather(1, self.lead.clamp(max=old.shape[1] - 1))
        steps = torch.arange(self.added.places, device=old.device)
        own = self.added.places if self.added.own is None else self.added.own.view(-1, 1)
        if self.added.own is not None:
            steps = steps * self._is_used()  # a masked place has a position that the model knows
        joined = torch.cat([first + steps, old + own], 1)
        return joined if self.order is None else joined.gather(1, self.order)

    def default_positions(self, length: int) -> Tensor:
        """Position ids as a model counts them in the row alone: from 0, padding included."""
        assert self.lead is not None
        return _inside(self.added, length, self.lead.device).clamp(min=0).expand(self.rows, -1)

    def moved(self) -> Tensor | int:
        """By how much a row's text has moved."""
        return self.added.own if self.added.own is not None and self.added.at_end else self.added.places


def _inside(added: Added, length: int, device: torch.device) -> Tensor:
    """(rows or 1, n + length): the place in the row's own sequence, negative for those that it has not at its front."""
    at = torch.arange(added.places + length, device=device)
    if added.own is None or added.at_end:
        return at
    return at - (added.places - added.own.view(-1, 1))


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(
            f"attention_mask has {given}, in which a prompt's tokens have no place; expected (rows, length), one "
            "number for each token. Leave it out, or give that."
        )


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
