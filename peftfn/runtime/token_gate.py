"""Adapters that act on some tokens of a call: which ones is seen in its ids, and every site of the adapter is told.

The model's own forward is wrapped: it looks at the ids, and says on how many tokens of each row, counted from the end,
an adapter acts. What earlier calls said is kept with the cache that they filled, by row: a row that was invoked stays
so. A site then takes the adapted output for those tokens, and what it would compute without the adapter for the others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.core.transforms import is_traced
from peftfn.methods import alora
from peftfn.methods.prompt.model_call import Takes
from peftfn.models import layers
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.runtime import seen_tokens
from peftfn.runtime.routing import row_index
from peftfn.runtime.routing.row_index import Rows
from peftfn.runtime.seen_tokens import Invocations, Seen

OFFSETS = "alora_offsets"

KINDS = (layers.LINEAR, layers.TRANSPOSED, layers.EMBEDDING)
"""The kinds of layer that put out something for each token."""


class Gate(NamedTuple):
    """Where one adapter acts."""

    invocations: Invocations
    rows: Rows | None


class Call(NamedTuple):
    """What the call in progress says.

    Attributes:
        counts: by the adapter's number, (rows,): on how many tokens, from the end, it acts.
        length: how many tokens there are.
        last: how many of them the output layer is given, where that was asked for.
    """

    counts: Mapping[int, Tensor]
    length: int
    last: int | None


class Noted:
    """The call that is in progress in this thread, or the one that a checkpointed block runs again for.

    Args:
        lasts: whether the module is called more than once, as a bound one is.
    """

    def __init__(self, lasts: bool) -> None:
        self.lasts = lasts
        self._active = threading.local() if lasts else None
        self._last: Call | None = None
        self._open = 0
        self._again = False

    def begin(self, call: Call) -> None:
        """A call begins."""
        self._last = call
        if self._active is not None:
            self._active.call = call
            if torch.is_grad_enabled():
                self._open = 1 if self._again else self._open + 1
                self._again = False

    def end(self) -> None:
        """It has ended."""
        if self._active is not None:
            self._active.call = None

    def now(self, path: str) -> Call:
        """The call that a site runs in."""
        found: Call | None = self._last if self._active is None else getattr(self._active, "call", None)
        if found is None and self._last is not None and self._open and transforms.is_backward():
            if self._open > 1:
                raise RuntimeError(
                    f"{path}: a checkpointed block runs again, and the model was called {self._open} times since the "
                    "last backward pass, so nothing says which tokens the adapter acts on. Go backward after each "
                    "call, use peftfn.apply, or turn activation checkpointing off."
                )
            self._again, found = True, self._last
        if found is None:
            raise RuntimeError(
                f"{path}: an adapter with alora_invocation_tokens acts on some tokens of the model's input_ids, and "
                "this layer runs outside of a call of the whole model; call the model itself."
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"lasts": self.lasts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["lasts"])


# --- the model's call -------------------------------------------------------------------------------------------------


def noting(gates: Mapping[int, Gate], noted: Noted, layer: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, which says beforehand where adapters act."""
    return functools.partial(_noting, gates, noted, Takes.of(layer), _is_decoder(layer), run)


def _is_decoder(layer: nn.Module) -> bool:
    return not getattr(getattr(layer, "config", None), "is_encoder_decoder", False)


def _noting(
    gates: Mapping[int, Gate],
    noted: Noted,
    takes: Takes,
    is_decoder: bool,
    run: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    offsets = kwargs.pop(OFFSETS, None)
    given = {**dict(zip(takes.arguments, args, strict=False)), **kwargs}
    ids = given.get(hf.IDS, args[0] if args and not takes.arguments else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not is_decoder:
        raise ValueError(
            "alora_invocation_tokens are looked for in input_ids, (rows, tokens), of a decoder; the model was given "
            f"{', '.join(sorted(name for name, one in given.items() if one is not None)) or 'no names'}"
            f"{'' if is_decoder else ', and is an encoder-decoder'}."
        )
    cache = takes.cache_in(given)
    kept = seen_tokens.kept_with(cache)
    seen: dict[Invocations, Seen] = {}
    counts: dict[int, Tensor] = {}
    for number, gate in gates.items():
        if gate.invocations not in kept and not caches.is_empty(cache) and offsets is None:
            _refuse_half(gate.invocations, ids)
        counts[number], seen[gate.invocations] = _counts(gate, ids, offsets, kept.get(gate.invocations))
    last = given.get(hf.LAST)
    noted.begin(Call(counts, ids.shape[1], last if isinstance(last, int) and last else None))
    try:
        output = run(*args, **kwargs)
    finally:
        noted.end()
    seen_tokens.keep(cache if cache is not None else seen_tokens.cache_of(output), {**kept, **seen})
    return output


def _counts(gate: Gate, ids: Tensor, offsets: Any, seen: Seen | None) -> tuple[Tensor, Seen]:
    """On how many tokens of each row a gate's adapter acts, counted from the end; and what is to be kept."""
    if gate.rows is None and len({*gate.invocations}) > 1:
        raise ValueError(
            "torch.vmap maps over adapters of unlike alora_invocation_tokens, which are no tensors; expected one value "
            "for all of them, or a stack that is routed by index=."
        )
    size = max([len(one) for one in gate.invocations if one] or [1]) - 1
    tail = ids.new_full((ids.shape[0], size), -1) if seen is None else seen.tail.to(ids.device)
    if tail.shape[0] != ids.shape[0]:
        raise ValueError(
            f"the cache was filled with {tail.shape[0]} rows, and the call has {ids.shape[0]}: nothing says which rows "
            "the adapter was invoked in."
        )
    found = [_of_one(one, ids, tail[:, size - (len(one) - 1 if one else 0) :], offsets) for one in gate.invocations]
    counts, is_new = (torch.stack(both) for both in zip(*found, strict=True))  # (invocations, rows)
    if seen is not None:
        counts = torch.where(seen.is_invoked.to(ids.device), alora.EVERY_TOKEN, counts)
        is_new = is_new | seen.is_invoked.to(ids.device)
    kept = Seen(is_new, torch.cat([tail, ids], 1)[:, ids.shape[1] :])
    if gate.rows is None:
        return counts[0], kept
    which = row_index.of_input(ids, gate.rows, "the model")
    return counts.gather(0, which.numbers.to(ids.device).unsqueeze(0))[0], kept


def _refuse_half(invocations: Invocations, ids: Tensor) -> None:
    """Refuse ids that begin with the end of an invocation, after a cache of which nobody knows the ids."""
    for tokens in invocations if not is_traced(ids) else ():
        for count in range(1, min(len(tokens or ()), ids.shape[1] + 1)):
            end = torch.tensor(list(tokens or ())[-count:], device=ids.device)
            if bool((ids[:, :count] == end).all(1).any()):
                raise ValueError(
                    f"the call's ids begin with the end of the invocation {list(tokens or ())}, and its cache was "
                    "filled by the base, so nothing says whether the rest is in it; begin with the whole invocation."
                )


def _of_one(tokens: Sequence[int] | None, ids: Tensor, before: Tensor, offsets: Any) -> tuple[Tensor, Tensor]:
    if offsets is None or tokens is None:
        return alora.acted_on(ids, before, tokens)
    numbers = offsets if isinstance(offsets, Tensor) else torch.tensor([one or 0 for one in offsets])
    return numbers.to(ids.device), numbers.to(ids.device) > 0


def other_kind(path: str, kind: str) -> ValueError:
    """The error about a layer whose tokens cannot be told apart."""
    return ValueError(
        f"{path}: alora_invocation_tokens says on which tokens the adapter acts, and this {kind} has no output for "
        f"each token; expected {' or '.join(KINDS)}. Leave it out: exclude_modules=[{path!r}]."
    )


# --- a site -----------------------------------------------------------------------------------------------------------


def gated(
    noted: Noted,
    number: int,
    path: str,
    step: Callable[[Callable[..., Any]], Callable[..., Any]],
    run: Callable[..., Any],
) -> Callable[..., Any]:
    """A site's forward in which the adapter acts on the tokens of the call in progress that are its own.

    Args:
        noted: has that call.
        number: the adapter's.
        path: the site.
        step: `(what the site computes without the adapter) -> its forward with it`.
        run: what it computes without.
    """
    return functools.partial(_gated, noted, number, path, step, run)


def _gated(
    noted: Noted,
    number: int,
    path: str,
    step: Callable[[Callable[..., Any]], Callable[..., Any]],
    run: Callable[..., Any],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    call = noted.now(path)
    y: Tensor = run(x, *args, **kwargs)
    counts, length = call.counts[number], y.shape[1] if y.dim() == 3 else 0
    if length not in (call.length, call.last) or y.shape[0] != counts.shape[0]:
        raise ValueError(
            f"{path}: the call has {counts.shape[0]} rows of {call.length} tokens and the output here has shape "
            f"{tuple(y.shape)}; expected (rows, tokens, features), to act on the tokens from an invocation on. Leave "
            f"it out: exclude_modules=[{path!r}]."
        )
    adapted: Tensor = step(functools.partial(_known, x, y, run))(x, *args, **kwargs)
    places = torch.arange(length, device=y.device)
    is_acted_on = places >= (length - counts).unsqueeze(1)
    return torch.where(is_acted_on.unsqueeze(-1), adapted, y)


def _known(x: Tensor, y: Tensor, run: Callable[..., Any], given: Tensor, *args: Any, **kwargs: Any) -> Any:
    return y if given is x else run(given, *args, **kwargs)
