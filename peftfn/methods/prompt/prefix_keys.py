"""Which models take a prefix, where, and what keys and values it has there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from peftfn.methods.prompt import prompt_config
from peftfn.models import signatures
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.models.key_shapes import Shape, key_shapes

Config = TypeVar("Config", bound=Any)


def resolve(model: nn.Module, config: Config) -> Config:
    """The config with the model's sizes; `token_dim` is the width of the keys of all heads that have keys.

    Raises:
        ValueError: the layers' keys are of unlike shapes, or the model keeps no cache.
    """
    refuse_without_keys(model)
    found: Any = prompt_config.text_config(model)
    if any(found.to_dict().get(name) for name in ("per_layer_config", "global_head_dim")):
        raise ValueError(f"{type(model).__name__} has layers with keys of unlike shapes; one prefix does not fit them.")
    config = prompt_config.resolve(model, config)
    heads, width = key_sizes(found, config.num_attention_heads or 1, config.token_dim or 0)
    _refuse_other_keys(model, config.num_layers or 0, Shape(heads, width, width))
    return dataclasses.replace(config, num_attention_heads=heads, token_dim=heads * width)


def refuse_without_keys(model: nn.Module) -> None:
    """Refuse a model that has no cache of keys and values, or has it in some of its layers only."""
    home = model.get_submodule(call_sites(model)[0])
    name = type(home).__name__
    if not hf.keeps_keys(home):
        raise ValueError(
            f"{name}.forward has no argument for a cache of keys and values, into which a prefix goes; use prompt "
            "tuning or P-tuning."
        )
    prompt_config.refuse_many_vocabularies(home)
    if hf.reads_one_by_one(home):
        raise ValueError(
            f"{name} goes on from a cache a token at a time, or by lengths of its own, and a prefix is in its cache "
            "from the start; use prompt tuning, or a method that changes layers."
        )
    if hf.keeps_two_caches(home):
        raise ValueError(
            f"{name} has a cache of two halves, for layers at both of its ends, and a prefix is of one kind; use a "
            "method that changes layers."
        )
    others = caches.layers_without_keys(getattr(home, "config", None))
    if others:
        raise ValueError(
            f"{len(others)} layers of {name} keep something else than keys and values (the first is layer "
            f"{others[0]}), and a prefix is keys and values for each layer; use prompt tuning or P-tuning."
        )


def _refuse_other_keys(model: nn.Module, count: int, shape: Shape) -> None:
    """Refuse a model whose layers keep other keys and values than PEFT's format has: as many of one shape as layers."""
    home = model if prompt_config.is_encoder_decoder(model) else model.get_submodule(call_sites(model)[0])
    found = key_shapes(home, count)
    if found is not None and found != [shape] * count:
        kept = ", ".join(f"{found.count(one)} of {one}" for one in dict.fromkeys(found))
        raise ValueError(
            f"layers of {type(home).__name__} keep keys of {kept} (heads x width), and a prefix has those of {shape} "
            f"for each of {count} layers; use prompt tuning or P-tuning."
        )


def key_sizes(config: Any, heads: int, dim: int) -> tuple[int, int]:
    """The number of heads that have keys, and the width of one, by a model's config."""
    own = getattr(config, "num_key_value_heads", None)
    if getattr(config, "new_decoder_architecture", None) is False and getattr(config, "multi_query", False):
        own = 1  # Falcon
    if own is not None:
        return own, getattr(config, "head_dim", None) or dim // heads
    return heads, getattr(config, "d_kv", None) or dim // heads  # T5 and its kin: heads * d_kv need not be d_model


def call_sites(model: nn.Module) -> Sequence[str]:
    """The path of the module that takes the cache: the model, the one inside its head, or its decoder."""
    if prompt_config.is_encoder_decoder(model):
        return (prompt_config.path_of(model, prompt_config.decoder_of(model)),)
    inner = prompt_config.without_head(model)
    # a classifier's forward may drop positions that the model inside takes, as Falcon's does
    drops = not prompt_config.writes(model) and signatures.takes(inner, hf.POSITIONS)
    is_whole = hf.keeps_keys(model) and (signatures.takes(model, hf.POSITIONS) or not drops)
    return ("",) if inner is model or is_whole else (prompt_config.path_of(model, inner),)
