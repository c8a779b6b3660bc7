"""Which models take tokens before their input, where, and how they embed their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from peftfn.methods.prompt import prompt_config
from peftfn.models import signatures
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Site

Config = TypeVar("Config", bound=prompt_config.PromptLearningConfig)


def resolve(model: nn.Module, config: Config) -> Config:
    """The config with the model's sizes: in some models the input embedding is not as wide as the layers.

    Raises:
        ValueError: a prompt has no place in the model's input.
    """
    refuse(model)
    if config.token_dim is None:
        width = getattr(embedding(model), "embedding_dim", None)
        config = dataclasses.replace(config, token_dim=width)
    return prompt_config.resolve(model, config, needed=("token_dim",))


def refuse(model: nn.Module) -> None:
    """Refuse a model whose input is not the rows of one embedding, or that also reads token ids elsewhere."""
    _refuse_without_embeds(model)
    if prompt_config.is_encoder_decoder(model):
        decoder = prompt_config.decoder_of(model)
        if not signatures.takes(decoder, hf.ENCODED_MASK):
            raise ValueError(
                f"{type(decoder).__name__}.forward takes no {hf.ENCODED_MASK}, by which a decoder is told of a prompt "
                "before its encoder's input; use prefix tuning, or a method that changes layers."
            )
    field = hf.ids_in_embedding(getattr(model, "config", None))
    if field is not None:
        raise ValueError(
            f"{type(model).__name__} embeds a token by more than its row (its config has {field}), and a prompt is "
            "rows alone; use a method that changes layers."
        )
    if hf.seeks_question(type(model)):
        raise ValueError(
            f"{type(model).__name__} finds the question in its token ids, to let all tokens see it, and a prompt's "
            "tokens have none; use a method that changes layers."
        )
    prompt_config.refuse_many_vocabularies(model)
    embedding(model)
    reader = hf.layer_that_reads_ids(model)
    if reader is not None:
        raise ValueError(
            f"{reader} in {type(model).__name__} reads token ids beside what other layers give it, and a prompt's "
            "tokens have none; use prefix tuning, or a method that changes layers."
        )


def _refuse_without_embeds(model: nn.Module) -> None:
    first = model.get_submodule(call_sites(model)[0])
    inner = prompt_config.without_head(first)
    # Both are asked: a head may pass inputs_embeds on to a model that has none (ESM C), or name no arguments at all.
    is_lost = signatures.takes(inner, hf.IDS) and not signatures.takes(inner, hf.EMBEDS)
    if is_lost or not signatures.takes(first, hf.EMBEDS):
        part = f"{type(inner).__name__} in " if inner is not model and is_lost else ""
        raise ValueError(
            f"{part}{type(model).__name__} takes no inputs_embeds, which is how a prompt gets before its input; use a "
            "method that changes layers."
        )


def call_sites(model: nn.Module) -> Sequence[str]:
    """Where tokens are put before the input: in the model's call, or in its encoder's and decoder's."""
    if not prompt_config.is_encoder_decoder(model):
        return ("",)
    halves = (prompt_config.half(model, "encoder"), prompt_config.half(model, "decoder"))
    return [prompt_config.path_of(model, one) for one in halves]


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """(rows, length, dim), as the model itself embeds its tokens."""
    found = embedding(model)(ids)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the input embedding of {type(model).__name__} gives a {type(found).__name__}; expected a tensor, before "
            "which a prompt's tokens go. Use a method that changes layers."
        )
    return found


def embedding(model: nn.Module) -> nn.Module:
    """The model's input embedding.

    Raises:
        ValueError: it has none, or does not say which it is.
    """
    found = prompt_config.from_getter(model, "input_embeddings")
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings() that gives a module; a prompt goes before embedded "
            "tokens. Give the model that method, and a forward that takes inputs_embeds."
        )
    return found


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with the width of a leaf's tokens for this model, or `None`.

    Raises:
        ValueError: a prompt has no place in its input, whoever made this one.
    """
    refuse(site.layer)
    width = getattr(embedding(site.layer), "embedding_dim", None)
    name = "prompt_embeddings" if "prompt_embeddings" in leaf else "embedding"
    if name not in leaf:
        return f"has {sorted(leaf)}, expected prompt_embeddings"
    shape = tuple(leaf[name].shape)
    right = len(shape) == 2 and width in (None, shape[1])
    return None if right else f"has {name} {shape}, expected (tokens, {width})"
