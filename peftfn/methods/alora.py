"""Activated LoRA: LoRA that acts on the tokens from its invocation on (https://arxiv.org/abs/2504.12397).

An invocation is a sequence of token ids, `alora_invocation_tokens`. In each row the deltas act on the tokens from the
beginning of its last occurrence on; before it, and in rows without one, the layers compute what the base computes, bit
for bit, so that keys and values of those tokens are the base's and can be shared with it. There is no weight that would
do that: it cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EVERY_TOKEN = 2**31 - 1
"""The number of tokens from the end of a row that stands for all of them."""


def check(config: Any) -> None:
    """A `ValueError` if a config's `alora_invocation_tokens` are no token ids, or do not go with its other fields."""
    tokens: Sequence[int] = config.alora_invocation_tokens
    if not tokens or any(one < 0 for one in tokens):
        raise ValueError(f"alora_invocation_tokens={list(tokens)}; expected the ids of at least one token.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"alora_invocation_tokens with task_type={config.task_type!r}; expected 'CAUSAL_LM': tokens after the "
            "invocation must not change those before it."
        )
    if config.use_dora:
        raise ValueError("alora_invocation_tokens with use_dora=True; expected one of them, as in PEFT.")


def acted_on(ids: Tensor, before: Tensor, tokens: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """On how many tokens of each row, counted from its end, the deltas act, (rows,); and in which a row is invoked.

    Args:
        ids: (rows, length), the tokens of this call.
        before: (rows, n - 1), the tokens before them; -1 where there are none.
        tokens: the invocation, n tokens; `None` is all.
    """
    rows, length = ids.shape
    if tokens is None:
        return ids.new_full((rows,), EVERY_TOKEN), ids.new_ones(rows, dtype=torch.bool)
    whole = torch.cat([before.to(ids), ids], 1)
    ends = [whole[:, number : number + length] == one for number, one in enumerate(tokens)]
    is_end = torch.stack(ends).all(0)  # (rows, length): whether the invocation ends with this token
    places = torch.arange(length, device=ids.device)
    last = torch.where(is_end, places, -1).max(1).values if length else ids.new_full((rows,), -1)
    start = last - (len(tokens) - 1)
    return torch.where(last < 0, 0, length - start), last >= 0
