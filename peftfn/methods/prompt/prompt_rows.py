"""Prompts of unlike length: in one stack, padded with zeros, and in one batch, a different one for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.unlike_rows import UnlikeRowsError
from peftfn.methods import slots
from peftfn.methods.prompt import prompt_config
from peftfn.methods.prompt.insert_tokens import LENGTH
from peftfn.methods.prompt.model_call import Added, Call
from peftfn.methods.prompt.places import Place, ones
from peftfn.methods.prompt.prompt_config import Config
from peftfn.methods.traits import Stacking
from peftfn.models import signatures
from peftfn.models import transformers_names as hf
from peftfn.models import transformers_positions as counted

_CPT = ("delta_embedding", "cpt_token_ids", "cpt_tokens_type_mask", "cpt_radius")
_PADDED = {"prompt_embeddings": 0, "embedding": 0, "prefix_task_cols": 1, **dict.fromkeys(_CPT, 0)}
"""The tensors that have something for each token -> the axis along which they have it."""


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
            **{name: slots.sized(tensor, _PADDED.get(name), max(rows)) for name, tensor in leaf.items()},
            LENGTH: torch.tensor(own, device=next(iter(leaf.values())).device),
        }
        for leaf, own in zip(found, rows, strict=True)
    ]


def trim(leaf: Leaf, rows: int) -> Leaf:
    """The leaf with `rows` rows again, the inverse of `pad`."""
    own = {name: tensor for name, tensor in leaf.items() if name != LENGTH}
    return {name: slots.sized(tensor, _PADDED.get(name), rows) for name, tensor in own.items()}


def trimmed(config: Config, configs: Sequence[Config], path: str, leaf: Leaf) -> Leaf:
    """The leaf of one adapter of a stack, with as many rows as its config says."""
    return trim(leaf, config.rows) if LENGTH in leaf else leaf


def _rows(leaf: Leaf) -> int:
    return next(leaf[name].shape[0] for name in _PADDED if name in leaf)


def shared(configs: Sequence[Config]) -> Config:
    """The config of the adapter with the most tokens, which has the places that every row needs."""
    longest = configs[0]
    for config in configs:  # not max(): Dynamo does not compare them
        if (config.num_virtual_tokens or 0) > (longest.num_virtual_tokens or 0):
            longest = config
    return longest


def disabled(leaf: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The leaf of each row, of no tokens where `keep` is false, and of zeros, for a masked NaN is one all the same."""
    prompt = leaf["prompt_embeddings"]  # (rows, tokens, width)
    held = {name: leaf[name] for name in _PADDED if name in leaf}
    zeros = {name: torch.where(keep.view(-1, *(1,) * (one.dim() - 1)), one, 0) for name, one in held.items()}
    count = leaf.get(LENGTH, torch.tensor(prompt.shape[-2], device=keep.device))
    return {**leaf, **zeros, LENGTH: torch.where(keep, count, 0)}


def added(
    model: nn.Module, count: int, leaf: Mapping[str, Tensor], *, at_end: bool = False, in_cache: bool = False
) -> Added:
    """What a prompt of `count` tokens, of which each row may have fewer, adds to a call of the model.

    Args:
        model: the model, or the part of it that is given the prompt.
        count: how many places there are in a row.
        leaf: the prompt, and of how many tokens, if they differ.
        at_end: whether places that a row does not use come after its text.
        in_cache: whether they are a prefix's keys and values.

    Raises:
        UnlikeRowsError: rows have unlike ones, and the model does not ignore the places that are not used.
    """
    own = leaf.get(LENGTH)
    if own is None:
        return Added(count)
    _refuse_unlike(model, at_end, in_cache)
    copies = leaf["prompt_embeddings"].shape[-2] // count  # PEFT's, of which the first is used
    return Added(count, (own // copies).reshape(-1), at_end, first_position(model))


def _refuse_unlike(model: nn.Module, at_end: bool, in_cache: bool) -> None:
    """Refuse prompts of unlike length on a model that does not ignore the masked places of a row."""
    why = None
    if not signatures.takes(model, hf.MASK):
        why = f"takes no {hf.MASK}"
    elif (field := counted.reads_masked(getattr(model, "config", None))) is not None:
        why = f"reads them all the same (its config has {field})"
    elif not at_end and not _can_be_told(model) and not counted.counts_by_mask(model):
        table = counted.position_table(model, rotary=in_cache)
        why = None if table is None else f"counts them in its positions ({table}), which it cannot be told"
    if why is not None:
        raise UnlikeRowsError(
            "prompts or prefixes of unlike length, or none (index -1), for the rows of one batch: places that a row "
            f"does not use are masked, and {type(model).__name__} {why}. Use ones of one length, or apply them apart."
        )


def reads_last(model: nn.Module) -> bool:
    """Whether the model's heads read a row's end, as a decoder's do, and not its start, as an encoder's do."""
    if prompt_config.is_encoder_decoder(model):
        return False
    config: Any = getattr(model, "config", None)
    if prompt_config.writes(model) or hasattr(model, "score") or getattr(config, "summary_type", None) == "last":
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def first_position(model: nn.Module) -> int | None:
    """The position of a row's first token in a model that counts masked places too, and can be told others."""
    if not _can_be_told(model) or counted.counts_by_mask(model):
        return None
    padding = padding_counted(model)
    return counted.first_position(getattr(model, "config", None)) if padding is None else padding + 1


def _can_be_told(model: nn.Module) -> bool:
    """Whether the model takes the position of each token."""
    if prompt_config.is_encoder_decoder(model):
        return False
    return any(signatures.takes(one, hf.POSITIONS) for one in (model, prompt_config.without_head(model)))


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


_STARTS = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "init_weights",
)

STACKING = Stacking(pad=pad, trim=trimmed, shared=shared, varies=("num_virtual_tokens", "modules_to_save", *_STARTS))
