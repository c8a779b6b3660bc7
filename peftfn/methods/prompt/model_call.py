"""The call of a model as a value, which the methods of this folder change."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn.methods.prompt.own_arguments import OwnArguments
from peftfn.models import signatures
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf

Step = Callable[["Call"], "Call"]


class Added(NamedTuple):
    """Tokens that an adapter adds to each row.

    Attributes:
        places: how many they have in a row.
        own: (rows,), how many of these each row really has, or `None` where every row has all of them. The places of
            the others are masked: before everything else in the row, or after it.
        at_end: whether they are after it.
        start: the position of a row's first token in a model that counts positions itself, so that it has to be told
            them where rows have unlike ones; `None` in one that cannot be told.
    """

    places: int
    own: Tensor | None = None
    at_end: bool = False
    start: int | None = None


class Takes(NamedTuple):
    """What the forward of a model takes.

    Attributes:
        arguments: the names of its positional arguments.
        required: those of them that have to be given, if only as `None`.
        cache: the one of them that holds what earlier calls left, if it has one.
        whole_mask: whether its mask has a number for each place of a static cache.
        window: how many tokens back some of its layers see, whatever its cache says.
        shows_first: whether it lets all tokens see a row's first one, and needs token ids for that.
    """

    arguments: tuple[str, ...]
    required: tuple[str, ...]
    cache: str | None
    whole_mask: bool
    window: int | None
    shows_first: bool

    @classmethod
    def of(cls, module: nn.Module) -> Takes:
        """What this module's takes."""
        kind = type(module)
        whole, window = hf.wants_whole_mask(kind), hf.local_window(module)
        names = signatures.argument_names(kind), signatures.required_names(kind)
        return cls(*names, hf.cache_argument(module), whole, window, hf.shows_first(kind))

    def cache_in(self, given: Mapping[str, Any]) -> Any:
        """What of the arguments is the model's cache, or `None`."""
        return caches.cache_in(given, self.cache, self.arguments)


class Call(NamedTuple):
    """One call of a model.

    Attributes:
        given: its arguments, by name.
        takes: what the model's forward takes.
        first: whether nothing is cached yet. Later calls of a generation bring new tokens only, and a cache that
            begins with the prompt.
        prompts: prompts that are in the cache and not yet in the mask and positions (`cached_calls.settled`).
        prefixes: the same of prefixes, which are in the cache before everything else.
        guessed: whether the position ids were made here: those that the model would have counted in each row alone.
        whole_mask: whether the mask has a number for each place of a static cache, also the empty ones.
        beside: what a method keeps of each token, (rows, tokens), by name, beside the arguments; tokens that are put
            before get 0.
        finishes: `(the call as the model was given it, its output) -> output`, what is done to the output.
    """

    given: Mapping[str, Any]
    takes: Takes
    first: bool
    prompts: tuple[Added, ...] = ()
    prefixes: tuple[Added, ...] = ()
    guessed: bool = False
    whole_mask: bool = False
    beside: Mapping[str, Tensor] = types.MappingProxyType({})
    finishes: tuple[Callable[[Call, Any], Any], ...] = ()

    @property
    def cache(self) -> Any:
        """What earlier calls left, or what a prefix was put into; `None` if there is nothing."""
        return self.takes.cache_in(self.given)

    def with_cache(self, cache: Any) -> Call:
        """This call with another cache."""
        assert self.takes.cache is not None
        return self._replace(given=caches.with_cache(self.given, self.takes.cache, cache))

    def having(self, **changes: Any) -> Call:
        """This call with other arguments; `None` leaves one out."""
        given = {name: value for name, value in {**self.given, **changes}.items() if value is not None}
        return self._replace(given=given)


def run(
    forward: Callable[..., Any],
    takes: Takes,
    steps: Sequence[Step],
    settle: Step,
    noted: list[int],
    own: OwnArguments,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the model returns for the call that the steps make of this one.

    Args:
        forward: the model's own.
        takes: what it takes.
        steps: what each active adapter does to the call, in the adapters' order; the last one acts first, so that the
            first one's tokens come first.
        settle: what is done to the call after all of them.
        noted: a counter, which each call increases: by it `expecting` sees whether there was one.
        own: the arguments that are for the adapters alone.
        *args: the call's.
        **kwargs: the call's.
    """
    if not torch.compiler.is_compiling():
        noted[0] += 1
    named = {**own.held(), **dict(zip(takes.arguments, args, strict=False)), **kwargs}
    given = {name: value for name, value in named.items() if value is not None}
    cache = takes.cache_in(given)
    call = Call(given, takes, caches.is_empty(cache), whole_mask=takes.whole_mask)
    if call.first:
        call = without_empty_places(call, held=0)
    for step in reversed(steps):
        call = step(call)
    required = {name: None for name in takes.required if name in named}  # of BLIP-2 the ids, beside embedded tokens
    call = _with_first_shown(settle(call))
    output = forward(**{**required, **{name: one for name, one in call.given.items() if name not in own.names}})
    for finish in call.finishes:
        output = finish(call, output)
    # Without use_cache, `generate` would go on from a cache that the caller did not ask for.
    return caches.without_caches(output) if given.get(hf.USE_CACHE) is False and cache is None else output


def _with_first_shown(call: Call) -> Call:
    """The call with a mask by which all tokens see a row's first one, where the model would make it of token ids."""
    embeds = call.given.get(hf.EMBEDS)
    if not call.takes.shows_first or embeds is None or hf.GLOBAL_MASK in call.given:
        return call
    is_first = torch.arange(embeds.shape[1], device=embeds.device) == 0
    return call.having(**{hf.GLOBAL_MASK: is_first.long().expand(embeds.shape[0], -1)})


def expecting(
    forward: Callable[..., Any], call_sites: Sequence[str], noted: list[int], *args: Any, **kwargs: Any
) -> Any:
    """What the model returns, unless it ran past the modules inside it whose call an adapter changes."""
    before = noted[0]
    output = forward(*args, **kwargs)
    if noted[0] == before:
        raise NotImplementedError(
            f"the model did not call {' or '.join(call_sites)}, where this adapter changes what is given: it would "
            "be lost. Its forward goes another way than those of transformers; use a method that changes layers."
        )
    return output


def generating(model: nn.Module, noted: list[int], *args: Any, **kwargs: Any) -> Any:
    """What a bound module's own `generate` returns, unless it ran past the module's forward, which an adapter changes.

    That of BLIP-2 calls `generate` of the language model inside.
    """
    before, kind = noted[0], type(model)
    output = cast("Any", kind).generate(model, *args, **kwargs)
    is_ours = isinstance(model.__dict__["forward"], functools.partial) and model._compiled_call_impl is None  # noqa: SLF001
    if noted[0] == before and is_ours:
        raise NotImplementedError(
            f"generate() of {kind.__name__} ran a part of the model past the model's forward, where this adapter "
            "changes what is given: it would be lost. Call the module itself, or use a method that changes layers."
        )
    return output


def without_empty_places(call: Call, held: int) -> Call:
    """The call whose mask has no number for the places of a static cache that nothing was put into.

    `generate` of transformers 4 makes such a mask for Bloom; prompts go between the text and those places.

    Args:
        call: a call with a static cache, or any other, which stays as it is.
        held: how many tokens of the text are in the cache.
    """
    tokens, mask = tokens_of(call), call.given.get(hf.MASK)
    if tokens is None or not isinstance(mask, Tensor) or mask.dim() != 2 or caches.capacity(call.cache) is None:
        return call
    text = held + tokens.shape[1]
    return call.having(**{hf.MASK: mask[:, :text]})._replace(whole_mask=True) if mask.shape[1] > text else call


def tokens_of(call: Call) -> Tensor | None:
    """The call's token ids (rows, length), or its embedded tokens (rows, length, dim); `None` if it has neither."""
    ids = call.given.get(hf.IDS)
    return call.given.get(hf.EMBEDS) if ids is None else ids
