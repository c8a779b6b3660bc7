"""The call of a model as a value, which prompt methods change: tokens before the input, and what goes along.

A prompt goes directly before a row's first real token, after any padding on its left. So what the base computes for
`[pad, pad, prompt, text]` is what it computes for `[prompt, text]` wherever the base itself treats left padding right,
whatever its position encoding. Without left padding this is the prompt first, as PEFT has it in every case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn import tracing

IGNORED = -100
"""The label that torch's cross entropy leaves out."""

_TOKEN_TASKS = ("CAUSAL_LM", "TOKEN_CLS")
_OTHERS = ("decoder_", "encoder_", "cross_")  # arguments about the other half of an encoder-decoder
_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "labels", "position_ids", "cache_position")

Step = Callable[["Call"], "Call"]


class Call(NamedTuple):
    """One call of a model.

    Attributes:
        given: its arguments, by name.
        first: whether nothing is cached yet. Later calls of a generation bring new tokens only, and a cache that
            begins with the prompt.
        past: how many tokens prefixes have in the cache, before everything else; `run` tells the arguments of them.
    """

    given: Mapping[str, Any]
    first: bool
    past: int = 0

    def having(self, **changes: Any) -> Call:
        """This call with other arguments; `None` leaves one out."""
        given = {name: value for name, value in {**self.given, **changes}.items() if value is not None}
        return self._replace(given=given)


def run(
    forward: Callable[..., Any],
    names: Sequence[str],
    steps: Sequence[Step],
    noted: list[int],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the model returns for the call that the steps make of this one.

    Args:
        forward: the model's own.
        names: those of its positional arguments.
        steps: what each active adapter does to the call, in the adapters' order; the last one acts first, so that the
            first one's tokens come first.
        noted: its number grows, for `expecting`.
        *args: the call's.
        **kwargs: the call's.
    """
    if not torch.compiler.is_compiling():
        noted[0] += 1
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    given = {name: value for name, value in named.items() if value is not None}
    call = Call(given, cached(given.get("past_key_values")) == 0)
    for step in reversed(steps):
        call = step(call)
    if call.past:
        call = _with_cached(call, call.past, front=True)
    output = forward(**call.given)
    unasked = given.get("use_cache") is False and given.get("past_key_values") is None
    return _without_cache(output) if unasked else output


def expecting(forward: Callable[..., Any], homes: Sequence[str], noted: list[int], *args: Any, **kwargs: Any) -> Any:
    """What the model returns, unless it ran past the modules inside it whose call an adapter changes."""
    before = noted[0]
    output = forward(*args, **kwargs)
    if noted[0] == before:
        raise RuntimeError(
            f"the model did not call {' or '.join(homes)}, where this adapter changes what is given: it would be lost. "
            "Its forward goes another way than those of transformers; use a method that changes layers."
        )
    return output


def _without_cache(output: Any) -> Any:
    """The output without a cache that nobody asked for: a generation without one would go on from it."""
    kind = cast("Callable[..., Any]", type(output))
    if not hasattr(output, "items") or "past_key_values" not in output:
        return output
    return kind(**{name: value for name, value in output.items() if name != "past_key_values"})


def cached(cache: Any) -> int:
    """How many tokens a cache holds: any class of transformers, or tuples of tensors as it had before."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):
        return int(cast("Any", cache)[0][0].shape[-2]) if cache else 0
    return int(cache.get_seq_length())


@tracing.constant_result
def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of a class's positional arguments in `forward`, in order."""
    return _argument_names(cls)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward, or one that it may pass its arguments on to, names this argument."""
    return _takes(type(module), name)


@tracing.constant_result
def _takes(cls: type[nn.Module], name: str) -> bool:
    return any(name in _argument_names(one) for one in cls.__mro__ if "forward" in vars(one))


@functools.cache
def _argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind in positional)


def with_tokens(call: Call, tokens: Tensor, embed: Callable[[Tensor], Tensor], task: str | None) -> Call:
    """The call with embedded tokens before its input.

    Args:
        call: it has `input_ids` or `inputs_embeds`.
        tokens: (n, dim), the same for each row.
        embed: the model's own input embedding.
        task: the config's task type: it says whether labels are one per token.

    Raises:
        ValueError: the call has no input, or an argument of which it is not known how it goes along with the input.
    """
    if not call.first:
        return _with_cached(call, tokens.shape[0], front=False)
    embeds = call.given.get("inputs_embeds")
    ids = call.given.get("input_ids")
    if embeds is None:
        if ids is None:
            raise ValueError(
                f"the batch has {sorted(call.given)}; expected input_ids or inputs_embeds, to put the prompt before."
            )
        embeds = embed(ids)  # (rows, length, dim)
    place = _Place.of(call.given.get("attention_mask"), embeds, tokens.shape[0])
    _refuse_unknown(call.given, embeds.shape[:2])
    changes: dict[str, Any] = {"input_ids": None, "inputs_embeds": place.put(tokens.to(embeds.dtype), embeds)}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
        if (given := call.given.get(name)) is not None:
            changes[name] = place.fill(fill, given)
    labels = call.given.get("labels")
    if labels is not None and _per_token(labels, embeds, task):
        changes["labels"] = place.fill(IGNORED, labels)
    positions = call.given.get("position_ids")
    if positions is not None:
        changes["position_ids"] = place.positions(positions)
    for name in ("start_positions", "end_positions"):
        if (given := call.given.get(name)) is not None:
            changes[name] = given + place.added  # the answer's tokens have moved
    changes["cache_position"] = None  # the model counts them itself
    return call.having(**changes)


def _with_cached(call: Call, count: int, *, front: bool) -> Call:
    """The call with `count` tokens more in its cache than its arguments know of.

    Args:
        call: its attention mask covers the text alone.
        count: how many.
        front: whether they are before any left padding, as a prefix is, or after it.
    """
    changes: dict[str, Any] = {}
    mask = call.given.get("attention_mask")
    if mask is not None:
        _check_mask(mask)
        place = _Place.of(None if front else mask, mask, count)
        changes["attention_mask"] = place.fill(1, mask)
    for name in ("position_ids", "cache_position"):
        if (given := call.given.get(name)) is not None:
            changes[name] = given + count
    return call.having(**changes)


def with_encoded(call: Call, count: int) -> Call:
    """A decoder's call, whose encoder has seen `count` tokens more than the mask knows of."""
    hidden, mask = call.given["encoder_hidden_states"], call.given.get("encoder_attention_mask")
    if mask is None or mask.shape[1] == hidden.shape[1]:
        return call
    return call.having(encoder_attention_mask=_Place.of(mask, mask, count).fill(1, mask))


def left_padding(mask: Tensor) -> Tensor:
    """How many tokens of each row are padding before its first real one, (rows, 1), by its mask (rows, length)."""
    return (mask.cumsum(1) == 0).sum(1, keepdim=True)


class _Place(NamedTuple):
    """Where new tokens go in each row: after its left padding, if there is a mask that tells."""

    added: int
    rows: int
    lead: Tensor | None = None  # (rows, 1)
    order: Tensor | None = None  # (rows, count + length), into the new tokens followed by the old ones

    @classmethod
    def of(cls, mask: Any, tokens: Tensor, count: int) -> _Place:
        rows, length = tokens.shape[:2]
        if mask is None:
            return cls(count, rows)
        _check_mask(mask)
        if mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} and the input {rows} rows of {length} tokens; expected "
                "one number per token."
            )
        lead = left_padding(mask)
        at = torch.arange(count + length, device=mask.device)
        order = torch.where(at < lead, at + count, torch.where(at < lead + count, at - lead, at))
        return cls(count, rows, lead, order)

    def put(self, new: Tensor, old: Tensor) -> Tensor:
        """(rows, count + length, ...) of new (count, ...) and old (rows, length, ...) ones."""
        joined = torch.cat([new.expand(self.rows, *new.shape), old], 1)
        if self.order is None:
            return joined
        return joined.take_along_dim(self.order.view(*self.order.shape, *(1 for _ in old.shape[2:])), 1)

    def fill(self, value: int, old: Tensor) -> Tensor:
        """The same with one value for all new tokens."""
        return self.put(torch.full((self.added,), value, dtype=old.dtype, device=old.device), old)

    def positions(self, old: Tensor) -> Tensor:
        """Position ids in which each row's prompt starts where its text started, and the text follows."""
        if old.dim() > 2:
            raise ValueError(
                f"position_ids has shape {tuple(old.shape)}; expected (rows, length): a prompt's tokens have no place "
                "in another form."
            )
        old = old.expand(self.rows, old.shape[-1])
        first = old[:, :1] if self.lead is None else old.gather(1, self.lead.clamp(max=old.shape[1] - 1))
        new = first + torch.arange(self.added, device=old.device)  # (rows, count)
        joined = torch.cat([new, old + self.added], 1)
        return joined if self.order is None else joined.gather(1, self.order)


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(
            f"attention_mask has {given}, in which a prompt's tokens have no place; expected (rows, length). A static "
            "cache makes such masks: generate with the default, dynamic cache."
        )


def _per_token(labels: Tensor, embeds: Tensor, task: str | None) -> bool:
    if task is not None:
        return task in _TOKEN_TASKS
    return not labels.is_floating_point() and labels.shape == embeds.shape[:2]


def _refuse_unknown(given: Mapping[str, Any], shape: torch.Size) -> None:
    for name, value in given.items():
        if name in _KNOWN or name.startswith(_OTHERS) or not isinstance(value, Tensor):
            continue
        if value.dim() > 1 and value.shape[:2] == shape:
            raise ValueError(
                f"the batch has {name} of shape {tuple(value.shape)}, one for each token, and it is not known what a "
                "prompt's tokens get there. Leave it out, or use a method that adds no tokens."
            )
