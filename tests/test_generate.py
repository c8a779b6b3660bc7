"""`generate()` of a bound module with every method: greedy tokens are peft's; padding changes nothing."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from oracle import quiet_peft
from prompts import CASES, Case, ours
from torch import Tensor

import peftfn as pf

GENERATING = [case for case in CASES if case.base in ("llama", "gpt2", "bloom", "mistral", "t5")]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
LEFT = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 7, 9], [0, 9, 8, 7, 6, 5]])

every_case = pytest.mark.parametrize("case", GENERATING, ids=str)


def pair(case: Case) -> tuple[Any, Any]:
    """The peft model, and ours bound to a base of its own."""
    theirs = case.theirs(size=1.0, writes=True)
    return theirs, pf.bind(case.model(writes=True), ours(theirs, case))


def generated(model: Any, **options: Any) -> Tensor:
    with quiet_peft():
        return model.generate(**{**GREEDY, **options})


@every_case
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_pefts(case: Case, beams: int) -> None:
    theirs, bound = pair(case)
    batch = {"input_ids": LEFT[:, 2:], "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    found = generated(bound, **batch, num_beams=beams)
    assert found.equal(generated(theirs, **batch, num_beams=beams))
    bare = generated(case.model(writes=True), **batch, num_beams=beams)
    assert bare.shape != found.shape or not bare.equal(found)


@every_case
def test_the_cache_changes_nothing(case: Case) -> None:
    # peft loses a prefix where use_cache is False: after the first token (T5), or with an error (Llama).
    _, bound = pair(case)
    batch = {"input_ids": LEFT, "attention_mask": (LEFT != 0).long()}
    assert generated(bound, **batch, use_cache=False).equal(generated(bound, **batch))


@every_case
def test_left_padding_changes_nothing(case: Case) -> None:
    # peft puts the prompt before the padding, where rotary and relative positions see it further away.
    _, bound = pair(case)
    mask = (LEFT != 0).long()
    together = generated(bound, input_ids=LEFT, attention_mask=mask)
    start = 0 if case.base == "t5" else LEFT.shape[1]
    for number, row in enumerate(LEFT):
        alone = generated(bound, input_ids=row[mask[number] == 1][None])[0]
        alone = alone[0 if case.base == "t5" else int(mask[number].sum()) :]
        assert together[number, start:][: len(alone)].equal(alone)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["lora", "two prompts", "prompt and prefix"])
def test_combinations_generate_the_same_with_and_without_cache(name: str, kind: str) -> None:
    model = Case(name, "prefix").model(writes=True)
    methods = {"two prompts": ("prompt tuning", "p-tuning"), "prompt and prefix": ("prefix", "prompt tuning")}
    configs = [Case(name, method).config(pf) for method in methods.get(kind, ())] or [pf.LoraConfig(r=2)]
    adapters = tuple(oracle.randomised(pf.init(model, config), size=0.5) for config in configs)
    bound = pf.bind(model, adapters)
    batch = {"input_ids": LEFT[:, 1:], "attention_mask": (LEFT[:, 1:] != 0).long(), "max_new_tokens": 5}
    found = generated(bound, **batch)
    assert found.equal(generated(bound, **batch, use_cache=False))
    assert not found.equal(generated(model, **batch))


def test_a_static_cache_is_one_clear_error() -> None:
    _, bound = pair(Case("llama", "prompt tuning"))
    with pytest.raises(ValueError, match="generate with the default, dynamic cache"):
        generated(bound, input_ids=LEFT, attention_mask=(LEFT != 0).long(), cache_implementation="static")
