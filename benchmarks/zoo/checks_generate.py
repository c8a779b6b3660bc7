"""`generate` on a bound model, against the model with the weights put in by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import peftfn as pf
from zoo.case import Case
from zoo.classes import WRITES
from zoo.verdicts import NotApplicable, Verdict, judged

NEW = 5


def prepared(case: Case) -> dict[str, Any]:
    """The batch of a generate, which gives its own decoder tokens.

    Raises:
        NotApplicable: the class does not generate.
    """
    if case.entry.family not in WRITES or not case.model.can_generate():
        raise NotApplicable("it does not generate")
    return {name: value for name, value in case.batch.items() if not name.startswith("decoder_")}


def decoded(model: Any, batch: Mapping[str, Any], **given: Any) -> dict[str, Tensor]:
    """Greedy tokens and the scores that led to them; the model's own stop tokens stop nothing."""
    torch.manual_seed(0)
    for stop in (
        "eos_token_id",
        "forced_eos_token_id",
        "forced_bos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
    ):
        setattr(model.generation_config, stop, None)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = 0
    with torch.no_grad():
        made = model.generate(
            **batch, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, **given
        )
    return found(torch.stack(list(made.logits), 1), made.sequences[:, -NEW:])


def found(scores: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Both as one output: a token that is another one is off by more than rounding, beside scores of a few units."""
    return {"scores": scores.double(), "tokens": tokens.double() / scores.shape[-1]}


def generate(case: Case) -> Verdict:
    batch = prepared(case)
    given: dict[str, Any] = {}
    hand = case.hands[0]
    try:
        want = decoded(hand, batch)
    except Exception as first:  # noqa: BLE001  # whatever it is, it is the model's own
        given = {"use_cache": False}
        try:
            want = decoded(hand, batch, **given)
        except Exception:  # noqa: BLE001
            raise NotApplicable(
                f"the bare model does not generate: {type(first).__name__}: {str(first)[:150]}"
            ) from first
    got = decoded(pf.bind(case.model, case.lora), batch, **given)
    return judged(got, want, None, case.exact)
