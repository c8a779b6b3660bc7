"""Prompts of unlike length: in one stack, padded with zeros, and in one batch, a different one for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn import signatures
from peftfn import transformers_names as hf
from peftfn.adapter import Leaf
from peftfn.calls import Added, Call
from peftfn.inserted import LENGTH
from peftfn.methods import prompt_config
from peftfn.methods.method import Stacking
from peftfn.methods.prompt_config import Config
from peftfn.places import Place, ones

_PADDED = ("prompt_embeddings", "embedding")
"""The tensors that have one row per token."""


def pad(configs: Sequence[Config], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves with as many rows as the longest has; where they had unlike numbers, with how many rows they have."""
    found = [leaf for leaf in leaves if leaf is not None]  # every adapter has the one site
    rows = [_rows(leaf) for leaf in found]
    if len(set(rows)) == 1:
        return found
    copies = {rows / (config.num_virtual_tokens or 1) for rows, config in zip(rows, configs, strict=True)}
    if len(copies) > 1:
        raise ValueError(
            f"stack: prompts of {rows} rows, whose configs say {[config.num_virtual_tokens for config in configs]} "
            "tokens; expected as many copies of each token in all of them."
        )
    return [
        {
            **{name: _longer(name, tensor, max(rows)) for name, tensor in leaf.items()},
            LENGTH: torch.tensor(own, device=next(iter(leaf.values())).device),
        }
        for leaf, own in zip(found, rows, strict=True)
    ]


def trim(leaf: Leaf, rows: int) -> Leaf:
    """The leaf with `rows` rows again, the inverse of `pad`."""
    own = {name: tensor for name, tensor in leaf.items() if name != LENGTH}
    return {name: tensor[:rows] if name in _PADDED else tensor for name, tensor in own.items()}


def trimmed(config: Config, configs: Sequence[Config], path: str, leaf: Leaf) -> Leaf:
    """The leaf of one adapter of a stack, with as many rows as its config says."""
    return trim(leaf, config.rows) if LENGTH in leaf else leaf


def _rows(leaf: Leaf) -> int:
    return next(leaf[name].shape[0] for name in _PADDED if name in leaf)


def _longer(name: str, tensor: Tensor, rows: int) -> Tensor:
    return F.pad(tensor, (0, 0, 0, rows - tensor.shape[0])) if name in _PADDED else tensor


def shared(configs: Sequence[Config]) -> Config:
    """The config of the adapter with the most tokens: all places that rows need are there."""
    longest = configs[0]
    for config in configs:  # not max(): Dynamo does not compare them
        if (config.num_virtual_tokens or 0) > (longest.num_virtual_tokens or 0):
            longest = config
    return longest


def silence(leaf: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The leaf of each row, of no tokens where `keep` is false."""
    prompt = leaf["prompt_embeddings"]  # (rows, tokens, width)
    return {**leaf, LENGTH: torch.where(keep, leaf.get(LENGTH, torch.tensor(prompt.shape[-2], device=keep.device)), 0)}


def added(model: nn.Module, count: int, leaf: Mapping[str, Tensor]) -> Added:
    """What a prompt of `count` tokens, of which each row may have fewer, adds to a call of the model."""
    own = leaf.get(LENGTH)
    if own is None:
        return Added(count)
    copies = leaf["prompt_embeddings"].shape[-2] // count  # PEFT's, of which the first is used
    return Added(count, (own // copies).reshape(-1), at_end=not reads_last(model), start=first_position(model))


def reads_last(model: nn.Module) -> bool:
    """Whether a row's end is what the model's heads look at, as a decoder's do; an encoder's look at its start."""
    if prompt_config.is_encoder_decoder(model):
        return False
    if prompt_config.writes(model) or hasattr(model, "score"):
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def first_position(model: nn.Module) -> int | None:
    """The position of a row's first token in a model that counts masked places too, and can be told others."""
    if not _can_be_told(model):
        return None
    # OPT and its kin count the places that the mask leaves
    if any(signatures.takes(module, hf.MASK) for module in model.modules() if isinstance(module, nn.Embedding)):
        return None
    padding = padding_counted(model)
    return 0 if padding is None else padding + 1


def _can_be_told(model: nn.Module) -> bool:
    """Whether the model takes the position of each token."""
    if prompt_config.is_encoder_decoder(model):
        return False
    return signatures.takes(prompt_config.without_head(model), hf.POSITIONS)


def padding_counted(model: nn.Module) -> int | None:
    """The padding token of a model whose positions start after it and leave it out, as RoBERTa's do; else `None`.

    Of one that can be told others.
    """
    for module in model.modules() if _can_be_told(model) else ():
        if hasattr(module, "create_position_ids_from_inputs_embeds"):
            return getattr(module, "padding_idx", None)
    return None


def with_positions(model: nn.Module, before: Call, after: Call, added: Added) -> Call:
    """The call with prompts before its input, told the positions that RoBERTa and its kin count.

    They find padding in the token ids and leave it out, and count it where they are given embedded tokens.

    Args:
        model: any; another one counts by itself.
        before: the call without the prompts.
        after: the call with them.
        added: the prompts.
    """
    padding, text = padding_counted(model), before.given.get(hf.IDS)
    if padding is None or text is None or not before.first or before.given.get(hf.POSITIONS) is not None:
        return after
    mask = ones(text, text.shape[1]) if before.given.get(hf.MASK) is None else before.given[hf.MASK]
    is_counted = Place.of(mask, text, added).fill(1, (text != padding).long())
    return after.having(**{hf.POSITIONS: is_counted.cumsum(1) * is_counted + padding})._replace(guessed=True)


STACKING = Stacking(pad=pad, trim=trimmed, shared=shared)
