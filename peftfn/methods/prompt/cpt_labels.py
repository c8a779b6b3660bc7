"""The labels of context-aware prompt tuning: those of answers, in the prompt and in the text, and what each counts."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.methods.prompt.model_call import Added, Call, tokens_of
from peftfn.methods.prompt.places import IGNORED, Place
from peftfn.models import transformers_names as hf

TYPES = "input_type_mask"
"""The argument of a call with the types of its own tokens."""

_ANSWER = 4  # the types of an example's tokens are 1 to 4 more than those of the one before
_COUNT = "num_items_in_batch"


class Answers(NamedTuple):
    """Labels and types of the prompt's tokens and the text's, (rows, n + tokens)."""

    labels: Tensor
    types: Tensor


def of(call: Call, given: Any, ids: Tensor, prompt_types: Tensor, added: Added) -> Answers:
    """The labels that count, and the types by which they do.

    Args:
        call: the first one, with labels, and nothing before its input yet.
        given: the types of its tokens, or `None`: all are of an answer.
        ids: the prompt's tokens, (n,), or (rows, n).
        prompt_types: their types.
        added: how many of them each row has.

    Raises:
        ValueError: there is not one type for each label.
    """
    labels: Tensor = call.given[hf.LABELS]
    types = torch.full_like(labels, _ANSWER) if given is None else torch.as_tensor(given, device=labels.device).long()
    if types.shape != labels.shape or types.dim() != 2:
        raise ValueError(
            f"{TYPES} has shape {tuple(types.shape)} and labels {tuple(labels.shape)}; expected (rows, tokens), the "
            "type of each token of the text."
        )
    # The text's examples come after those of the prompt. PEFT adds the prompt's largest type, whatever it is, which is
    # the same where the prompt ends with an answer, and else makes no token one of an answer.
    last = (prompt_types.amax(-1, keepdim=True) + _ANSWER - 1).div(_ANSWER, rounding_mode="floor") * _ANSWER
    types = torch.where(types > 0, types + last, 0)
    kept = labels.masked_fill(~_is_answer(types), IGNORED)
    if added.own is not None:  # a row without a prompt is the base's
        is_bare = added.own.view(-1, 1) == 0
        kept, types = torch.where(is_bare, labels, kept), torch.where(is_bare, 0, types)
    tokens = tokens_of(call)
    assert tokens is not None, "with_tokens refuses such a call"
    place = Place.of(call.given.get(hf.MASK), tokens, added)
    own = torch.where(_is_answer(prompt_types), ids, IGNORED)
    return Answers(
        place.first_ignored(place.fill(own, kept, missing=IGNORED)),
        place.fill(prompt_types, types),
    )


def _is_answer(types: Tensor) -> Tensor:
    return (types > 0) & (types % _ANSWER == 0)


def weighted(factor: float, call: Call, output: Any) -> Any:
    """The model's output with a loss in which answers count less, the further their example is from the row's last.

    Raises:
        ValueError: the model gives no logits for each token.
    """
    labels, types = call.given[hf.LABELS][:, 1:], call.beside[TYPES][:, 1:]
    others = cast("tuple[Tensor, ...]", output[1:] if isinstance(output, tuple) else (output.logits,))
    logits = others[0]
    if logits.shape[:-1] != call.given[hf.LABELS].shape:
        raise ValueError(
            f"the model gives logits of shape {tuple(logits.shape)} for labels of shape "
            f"{tuple(call.given[hf.LABELS].shape)}, and opt_weighted_loss_type='decay' needs those of each token."
        )
    wide = logits[:, :-1].float() if logits.dtype in (torch.float16, torch.bfloat16) else logits[:, :-1]
    losses = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    total = (losses.view(labels.shape) * factor ** _after(types)).sum()
    given = call.given.get(_COUNT)
    loss = total / ((labels != IGNORED).sum() if given is None else given)
    if isinstance(output, tuple):
        return (loss, *others)
    output.loss = loss
    return output


def _after(types: Tensor) -> Tensor:
    """(rows, tokens): how many other examples with an answer in the row come after each token's."""
    ordered, order = torch.where(_is_answer(types), types, 0).sort(1)
    steps = (ordered[:, 1:] != ordered[:, :-1]).long()
    number = F.pad(steps.cumsum(1), (1, 0))  # of the example, from the first on
    after = number[:, -1:] - number
    return after.gather(1, order.argsort(1)).float()
