"""The call of a model as a value, which prompt methods change (`peftfn.inserted` has the changes)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn import transforms

Step = Callable[["Call"], "Call"]


class Added(NamedTuple):
    """Tokens that an adapter adds to each row.

    Attributes:
        places: how many they have in a row.
        own: (rows,), how many of these each row really has, or `None` where every row has all of them. The places of
            the others are masked: before everything else in the row, or after it.
        at_end: whether they are after it.
        counted: whether the model counts positions itself, so that it has to be told them where rows have unlike ones.
    """

    places: int
    own: Tensor | None = None
    at_end: bool = False
    counted: bool = False


class Call(NamedTuple):
    """One call of a model.

    Attributes:
        given: its arguments, by name.
        first: whether nothing is cached yet. Later calls of a generation bring new tokens only, and a cache that
            begins with the prompt.
        prompts: what is cached of prompts, and the arguments do not know of; `peftfn.inserted.settled` tells them.
        prefixes: the same of prefixes, which are in the cache before everything else.
        guessed: whether the position ids are ours: those that the model would have counted in each row alone.
    """

    given: Mapping[str, Any]
    first: bool
    prompts: tuple[Added, ...] = ()
    prefixes: tuple[Added, ...] = ()
    guessed: bool = False

    def having(self, **changes: Any) -> Call:
        """This call with other arguments; `None` leaves one out."""
        given = {name: value for name, value in {**self.given, **changes}.items() if value is not None}
        return self._replace(given=given)


def run(
    forward: Callable[..., Any],
    names: Sequence[str],
    steps: Sequence[Step],
    settle: Step,
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
        settle: what is done to the call after all of them.
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
    output = forward(**settle(call).given)
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


@transforms.constant_result
def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of a class's positional arguments in `forward`, in order."""
    return _argument_names(cls)


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward, or one that it may pass its arguments on to, names this argument."""
    return _takes(type(module), name)


@transforms.constant_result
def _takes(cls: type[nn.Module], name: str) -> bool:
    return any(name in _argument_names(one) for one in cls.__mro__ if "forward" in vars(one))


@functools.cache
def _argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind in positional)


def tokens_of(call: Call) -> Tensor | None:
    """The call's token ids (rows, length), or its embedded tokens (rows, length, dim); `None` if it has neither."""
    ids = call.given.get("input_ids")
    return call.given.get("inputs_embeds") if ids is None else ids
