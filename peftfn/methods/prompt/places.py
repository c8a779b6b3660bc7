"""Where new tokens go in each row of a call: after its left padding, before its first real token.

Rows may have fewer of them than there are places, or none. The places that a row does not use are masked: before
everything else in the row, or after it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn.methods.prompt.model_call import Added

IGNORED = -100
"""The label that torch's cross entropy leaves out."""


def ones(tokens: Tensor, length: int) -> Tensor:
    """A mask, (rows, length), for as many rows as `tokens` has, in which every token counts."""
    return torch.ones(tokens.shape[0], length, dtype=torch.long, device=tokens.device)


def rightmost(tokens: Tensor, added: Added) -> Tensor:
    """(rows, n, ...): each row's own tokens after the places that it does not use, as `Place` masks them."""
    if added.own is None:
        return tokens
    return tokens.take_along_dim(_front(added).view(*added.own.shape, -1, *(1 for _ in tokens.shape[2:])), 1)


def _front(added: Added) -> Tensor:
    """(rows, n): the number of the token in each place before a row's text, where no padding is between."""
    assert added.own is not None
    at, own = torch.arange(added.places, device=added.own.device), added.own.view(-1, 1)
    return torch.where(at < added.places - own, at + own, at - (added.places - own))


def left_padding(mask: Tensor) -> Tensor:
    """How many tokens of each row are padding before its first real one, (rows, 1), by its mask (rows, length)."""
    return (mask.cumsum(1) == 0).sum(1, keepdim=True)


class Place(NamedTuple):
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
    def of(cls, mask: Any, tokens: Tensor, added: Added) -> Place:
        """The places of new tokens before these, (rows, length, ...), which have this mask, or none."""
        rows, length = tokens.shape[:2]
        if mask is None and added.own is None:
            return cls(added, rows, None, None)
        if mask is None:
            lead = torch.zeros(rows, 1, dtype=torch.long, device=tokens.device)
        else:
            check_mask(mask)
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
        if added.own is not None:  # unused places hold the new tokens that their row does not use
            order = torch.where(at < 0, at + added.places, torch.where(at >= own + length, at - length, order))
        return cls(added, rows, lead, order)

    def put(self, new: Tensor, old: Tensor) -> Tensor:
        """(rows, n + length, ...) of new (n, ...) or (rows, n, ...) and old (rows, length, ...) ones."""
        joined = torch.cat([new.expand(self.rows, *new.shape[new.dim() - old.dim() + 1 :]), old], 1)
        if self.order is None:
            return joined
        return joined.take_along_dim(self.order.view(*self.order.shape, *(1 for _ in old.shape[2:])), 1)

    def fill(self, value: int | Tensor, old: Tensor, missing: int = 0) -> Tensor:
        """(rows, n + length): `value` for new tokens, `missing` for places that are not used, and the old values.

        A value may be one for each of them, (n,), or (rows, n).
        """
        new = value if isinstance(value, Tensor) else torch.full((self.added.places,), value, device=old.device)
        new = new.to(old)
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
        """Position ids in which each row's prompt starts where its text started, and the text follows.

        Those in space, (3 or 4, rows, length), go on along each axis as they do for words.
        """
        if old.dim() == 3 and old.shape[1] == self.rows:
            return torch.stack([self.positions(axis) for axis in old])
        if old.dim() > 2:
            raise ValueError(
                f"position_ids has shape {tuple(old.shape)}; expected (rows, length), or that for each axis of space: "
                "a prompt's tokens have no place in another form."
            )
        old = old.expand(self.rows, old.shape[-1])
        first = old[:, :1] if self.lead is None else old.gather(1, self.lead.clamp(max=old.shape[1] - 1))
        steps = torch.arange(self.added.places, device=old.device)
        own = self.added.places if self.added.own is None else self.added.own.view(-1, 1)
        if self.added.own is not None:
            steps = steps * self._is_used()  # a masked place has a position that the model knows
        joined = torch.cat([first + steps, old + own], 1)
        return joined if self.order is None else joined.gather(1, self.order)

    def default_positions(self, length: int, start: int) -> Tensor:
        """Position ids as a model counts them in the row alone: from its first one, padding included."""
        assert self.lead is not None
        return start + _inside(self.added, length, self.lead.device).clamp(min=0).expand(self.rows, -1)

    def moved(self) -> Tensor | int:
        """How many places a row's text has moved."""
        return self.added.own if self.added.own is not None and self.added.at_end else self.added.places


def _inside(added: Added, length: int, device: torch.device) -> Tensor:
    """(rows or 1, n + length): the place in the row's own sequence, negative for those that it has not at its front."""
    at = torch.arange(added.places + length, device=device)
    if added.own is None or added.at_end:
        return at
    return at - (added.places - added.own.view(-1, 1))


def check_mask(mask: Any) -> None:
    """Refuse a mask that has no number for each token."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(
            f"attention_mask has {given}, in which a prompt's tokens have no place; expected (rows, length), one "
            "number for each token. Leave it out, or give that."
        )
