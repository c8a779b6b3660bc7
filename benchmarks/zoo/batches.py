"""One row of a batch for any model: tokens, images, sounds, as its forward's arguments and its configuration ask."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from zoo.pictures import TOKENS, images
from zoo.sounds import sounds

FIRST, LAST = 5, 90  # ordinary tokens: no special one is among them


def signature(model: Any) -> set[str]:
    """The names of the arguments of a model's forward."""
    return set(inspect.signature(inspect.unwrap(type(model).forward)).parameters)


def dtype_of(model: Any) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def words(seed: int, length: int = TOKENS) -> Tensor:
    """A row of ordinary tokens."""
    return torch.randint(FIRST, LAST, (1, length), generator=torch.Generator().manual_seed(seed))


def text(names: set[str], ids: Tensor) -> dict[str, Tensor]:
    """Tokens and what a tokenizer gives beside them."""
    given = {"input_ids": ids}
    if "attention_mask" in names:
        given["attention_mask"] = torch.ones_like(ids)
    if "bbox" in names:
        left = torch.arange(ids.shape[1]).expand_as(ids)
        given["bbox"] = torch.stack([left, left, left + 5, left + 7], -1)
    return given


def row(model: Any, number: int, length: int = TOKENS, seen: bool = True) -> dict[str, Tensor]:
    """The arguments of one row, which its number seeds; not `seen` leaves the pictures beside words out."""
    names, main = signature(model), model.main_input_name
    given: dict[str, Tensor] = {}
    if "input_ids" in names and main not in ("input_features", "input_values", "flattened_patches"):
        given |= text(names, _ended(model, words(number, length)))
    given |= sounds(model, names, number, dtype_of(model))
    if seen or "input_ids" not in given:
        given |= images(model, names, number, dtype_of(model), given.get("input_ids"))
    if "decoder_input_ids" in names and _decodes(model):
        given["decoder_input_ids"] = torch.cat([torch.ones(1, 1, dtype=torch.long), words(number + 100, 5)], 1)
    books = getattr(model.config, "num_codebooks", None) if "musicgen" in model.config.model_type else None
    if books is not None:  # a row of each of its vocabularies
        given["input_ids"] = torch.cat([words(10 * number + book, length) for book in range(books)])
    if model.config.model_type == "dia":
        channels = model.config.decoder_config.num_channels
        given["decoder_input_ids"] = given["decoder_input_ids"][..., None].expand(-1, -1, channels)
    return given


def _ended(model: Any, ids: Tensor) -> Tensor:
    """The row with an end at its end where a classifier of an encoder and a decoder looks for it."""
    if not _decodes(model) and model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id
    return ids


def _decodes(model: Any) -> bool:
    """Whether decoder tokens have to be given: classifiers of sequences shift their input themselves."""
    return "SequenceClassification" not in type(model).__name__
