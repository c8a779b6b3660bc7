"""Decoding by hand, without a cache and without peftfn: what `generate()` of a bound module has to say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import peftfn as pf
from peftfn.checkpoints import keys

Logits = Callable[[Tensor], Tensor]
"""(1, length) of one row without padding -> (1, words): what comes next."""


def by_hand(model: Any, adapters: pf.Adapter | tuple[pf.Adapter, ...], source: Tensor) -> Logits:
    """What the model says next with a prompt before its embedded input, and a prefix before its keys and values.

    Args:
        model: the base.
        adapters: of prompt tuning, P-tuning and prefix tuning: at most one prefix; the first prompt comes first.
        source: (1, length), the input; of an encoder-decoder the encoder's, and of a decoder not used.
    """
    adapters = adapters if isinstance(adapters, tuple) else (adapters,)
    is_pair = model.config.is_encoder_decoder
    prompts = [prompt_of(one) for one in adapters if not isinstance(one.config, pf.PrefixTuningConfig)]
    prefixes = [one for one in adapters if isinstance(one.config, pf.PrefixTuningConfig)]

    def embedded(ids: Tensor) -> Tensor:
        return torch.cat([*(one[None] for one in prompts), model.get_input_embeddings()(ids)], 1)

    def logits(tokens: Tensor) -> Tensor:
        given: dict[str, Any] = {"use_cache": False}
        if prefixes:
            given = {"use_cache": True, cache_name(type(model)): filled(model, prefixes[0])}
        text = source if is_pair else tokens
        given |= {"inputs_embeds": embedded(text)} if prompts else {"input_ids": text}
        given |= {"decoder_input_ids": tokens} if is_pair else {}
        with torch.no_grad():
            return model(**given).logits[:, -1]

    return logits


def prompt_of(adapter: pf.Adapter) -> Tensor:
    """(tokens, width): what a file of the adapter holds."""
    return keys.to_keys(adapter)["prompt_embeddings"][: adapter.config.num_virtual_tokens]


def cache_name(kind: type[nn.Module]) -> str:
    """`past_key_values`, or from transformers 5.24 on `cache`."""
    names = inspect.signature(inspect.unwrap(kind.forward)).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in names)


def filled(model: Any, adapter: pf.Adapter) -> Any:
    """A new cache with the prefix in it, laid out as PEFT lays it out."""
    config: Any = adapter.config
    count, copies = config.num_layers, config.num_transformer_submodules
    pieces = prompt_of(adapter).view(config.num_virtual_tokens, 2 * count, config.num_attention_heads, -1)
    pieces = pieces.permute(1, 2, 0, 3)[:, None].repeat(
        copies, 1, 1, 1, 1
    )  # (copies * 2 * layers, 1, heads, tokens, width)
    cache = transformers.DynamicCache(config=model.config)
    for layer, both in enumerate(pieces.split(2 * copies)):  # of an encoder-decoder the first two are the decoder's own
        cache.update(both[0], both[1], layer)
    if model.config.is_encoder_decoder:
        return transformers.EncoderDecoderCache(cache, transformers.DynamicCache(config=model.config))
    return cache


def greedy(logits: Logits, start: Tensor, steps: int, end: int | None = None) -> Tensor:
    """(1, length): the tokens after the start, each the likeliest; none after the end."""
    tokens = start
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(tokens).argmax(-1, keepdim=True)], 1)
        if tokens[0, -1] == end:
            break
    return tokens[:, start.shape[1] :]


def score(logits: Logits, start: Tensor, tokens: Tensor) -> Tensor:
    """The mean log probability of the tokens (1, length) after the start: what a beam search ranks by."""
    whole = torch.cat([start, tokens], 1)
    steps = range(start.shape[1], whole.shape[1])
    return torch.stack([logits(whole[:, :at]).log_softmax(-1)[0, whole[0, at]] for at in steps]).mean()
