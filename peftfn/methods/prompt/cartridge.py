"""Cartridge: a prefix of keys and values that is trained itself (https://arxiv.org/abs/2506.06266).

It is meant to hold a text: `peftfn.cartridge` starts it from the cache that the text leaves, and joins several. Its
first tokens stay as they start: models attend to the first token of whatever they read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods import slots
from peftfn.methods.action import OnCall
from peftfn.methods.method import Method, like_weight
from peftfn.methods.prompt import insert_tokens, prefix_keys, prefix_tuning, prompt_config, prompt_rows
from peftfn.methods.prompt.model_call import Call
from peftfn.methods.prompt.prompt_config import PromptLearningConfig
from peftfn.methods.slots import Slot
from peftfn.methods.traits import Files, Targets
from peftfn.models.layers import Site

PROMPT, FROZEN, TRAINED = "prompt_embeddings", "frozen_embedding", "trainable_embedding"


@dataclasses.dataclass(frozen=True)
class CartridgeConfig(PromptLearningConfig):
    """Cartridge's config, with PEFT's fields and defaults.

    The prefix of each layer is [K₀; K], [V₀; V]: the keys and values of `num_frozen_tokens` tokens stay, those of the
    others are trained (Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266). A fresh one is random; `pf.cartridge`
    starts it from a text or a cache.

    Attributes:
        num_frozen_tokens: how many of the first tokens stay as they start.

    Raises:
        ValueError: more tokens stay than there are, or fewer than none.

    Example:
        >>> import peftfn as pf
        >>> pf.CartridgeConfig(num_virtual_tokens=64, task_type="CAUSAL_LM").num_frozen_tokens
        1
    """

    peft_type: ClassVar[str] = "CARTRIDGE"

    num_frozen_tokens: int = dataclasses.field(default=1, metadata={"help": "How many of the first tokens stay."})

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (most is not None and self.num_frozen_tokens > most):
            raise ValueError(
                f"CartridgeConfig(num_virtual_tokens={most}, num_frozen_tokens={self.num_frozen_tokens}): expected a "
                "number of frozen tokens from 0 to that of all."
            )


def init(config: CartridgeConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Random keys and values, (tokens, layers * 2 * dim), of the tokens that stay and of the others."""
    tokens, table = config.num_virtual_tokens or 0, prompt_config.table(site.layer)
    drawn = torch.randn(tokens, prefix_tuning.width(config), generator=generator)
    return {name: like_weight(one, table, dtype) for name, one in parted(config, {PROMPT: drawn}).items()}


def parted(config: CartridgeConfig, leaf: Leaf) -> Leaf:
    """The leaf of a whole prefix, in two."""
    count = config.num_frozen_tokens
    return {FROZEN: leaf[PROMPT][:count].clone(), TRAINED: leaf[PROMPT][count:].clone()}


def to_file(config: Any, leaf: Leaf) -> Leaf:
    """The leaf with one prompt, as PEFT's files have it."""
    return whole(leaf)


def whole(leaf: Mapping[str, Tensor]) -> Leaf:
    """The prefix in one: all that PEFT's files have."""
    return {PROMPT: torch.cat([leaf[FROZEN], leaf[TRAINED]])}


def encoded(config: CartridgeConfig, leaf: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    """The prefix in one, and how many tokens it has, if the leaf says so."""
    length = insert_tokens.LENGTH
    return {**whole(leaf), **({length: leaf[length]} if length in leaf else {})}


def forward(config: CartridgeConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """The call with the prefix in its cache."""
    return prefix_tuning.forward(config, leaf if PROMPT in leaf else encoded(config, leaf, site), site, call)


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with the leaf for this model, or `None`."""
    if FROZEN not in leaf or TRAINED not in leaf:
        return f"has {sorted(leaf)}, expected {FROZEN} and {TRAINED}"
    wrong = (prefix_tuning.check({PROMPT: leaf[name]}, site) for name in (FROZEN, TRAINED))
    return next((one for one in wrong if one is not None), None)


def pad(configs: Sequence[Any], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves with as many trained tokens as the longest has; where they had unlike numbers, with how many."""
    found = [leaf for leaf in leaves if leaf is not None]  # every adapter has the one site
    trained = [leaf[TRAINED].shape[0] for leaf in found]
    if len(set(trained)) == 1:
        return found
    lengths = [torch.tensor(one + leaf[FROZEN].shape[0]) for one, leaf in zip(trained, found, strict=True)]
    return [
        {
            **leaf,
            TRAINED: slots.sized(leaf[TRAINED], 0, max(trained)),
            insert_tokens.LENGTH: own.to(leaf[TRAINED].device),
        }
        for leaf, own in zip(found, lengths, strict=True)
    ]


def trim(config: CartridgeConfig, configs: Sequence[Any], path: str, leaf: Leaf) -> Leaf:
    """The leaf of one adapter of a stack, with its own tokens."""
    count = (config.num_virtual_tokens or 0) - config.num_frozen_tokens
    return {FROZEN: leaf[FROZEN], TRAINED: slots.sized(leaf[TRAINED], 0, count)}


METHOD = Method(
    config=CartridgeConfig,
    slots={
        **{name: Slot() for name in (PROMPT, TRAINED)},
        **{name: Slot(trained=False) for name in (FROZEN, insert_tokens.LENGTH)},
    },
    init=init,
    action=OnCall(forward, check, prompt_rows.disabled, prefix_keys.call_sites, encoded),
    targets=Targets(prefix_keys.resolve, prompt_config.sites),
    stacking=prompt_rows.STACKING._replace(pad=pad, trim=trim),
    files=Files(prompt_config.check_rows, write=to_file, read=parted),
)
