"""`generate()` of a bound module with prompts and prefixes is decoding by hand, without a cache and a row at a time.

peft is no oracle here: with transformers 5.24 it puts a prompt in again at each step (peft 0.21.2).
"""

from __future__ import annotations

from typing import Any

import decoding
import oracle
import pytest
import torch
import transformers
from prompts import CASES, WRITERS, Case
from torch import Tensor

import peftfn as pf
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf

GENERATING = [case for case in CASES if case.base in ("llama", "gpt2", "bloom", "mistral", "t5")]
IN_FRONT = [case for case in GENERATING if case.method != "adaption prompt"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
ENDLESS: dict[str, Any] = {**GREEDY, "min_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
LEFT = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 7, 9], [0, 9, 8, 7, 6, 5]])
PADDED: dict[str, Tensor] = {"input_ids": LEFT, "attention_mask": (LEFT != 0).long()}

# Of the largest logit: `generate` gives them in float32, and Bloom computes in it.
ROUNDING = 1e-5

every_case = pytest.mark.parametrize("case", GENERATING, ids=str)
every_case_in_front = pytest.mark.parametrize("case", IN_FRONT, ids=str)


def pair(case: Case) -> tuple[Any, pf.Adapter]:
    """A base in float64, and an adapter that is felt. Bloom's padded rows are NaN in float64, of the base as well."""
    base, task = WRITERS[case.base]
    model: Any = base.make()
    model = model if case.base == "bloom" else model.double()
    if case.base == "t5":
        model.lm_head.weight.data *= 0.1  # else every token is certain, and no score says anything
    config = case.config(pf)
    assert config.task_type == task
    return model, oracle.randomised(pf.init(model, config), size=1.0)


def generated(model: Any, **options: Any) -> Any:
    return model.generate(**{**GREEDY, **options})


def rows_of(model: Any, adapters: Any) -> list[tuple[decoding.Logits, Tensor]]:
    """What each row of `PADDED` says next alone, and what its new tokens come after."""
    alone = [row[row != 0][None] for row in LEFT]
    starts = [torch.zeros(1, 1, dtype=torch.long) if model.config.is_encoder_decoder else row for row in alone]
    return [(decoding.by_hand(model, adapters, row), start) for row, start in zip(alone, starts, strict=True)]


def new_tokens(model: Any, sequences: Tensor) -> Tensor:
    """The tokens that `generate` adds to those it was given."""
    return sequences[:, 1:] if model.config.is_encoder_decoder else sequences[:, LEFT.shape[1] :]


def assert_said_by_hand(model: Any, adapters: Any, found: Any) -> None:
    """Every step's logits are those by hand after the tokens so far."""
    tokens = new_tokens(model, found.sequences)
    for number, (logits, start) in enumerate(rows_of(model, adapters)):
        for step, said in enumerate(found.logits):
            expected = logits(torch.cat([start, tokens[number : number + 1, :step]], 1))[0]
            assert oracle.distance(said[number], expected) < ROUNDING, f"row {number}, step {step}"


@every_case_in_front
@pytest.mark.parametrize("cache", [None, "static"])
def test_each_row_of_a_padded_batch_says_what_it_says_by_hand(case: Case, cache: str | None) -> None:
    model, adapter = pair(case)
    found = generated(pf.bind(model, adapter), **PADDED, cache_implementation=cache)
    bare = generated(model, **PADDED)
    assert bare.shape != found.shape or not bare.equal(found)
    for row, (logits, start) in zip(new_tokens(model, found), rows_of(model, adapter), strict=True):
        expected = decoding.greedy(logits, start, steps=6, end=39)[0]
        assert row[: len(expected)].equal(expected)


@every_case_in_front
def test_logits_of_sampled_tokens_are_those_by_hand(case: Case) -> None:
    model, adapter = pair(case)
    found = generated(pf.bind(model, adapter), **PADDED, **ENDLESS | {"do_sample": True})
    assert_said_by_hand(model, adapter, found)


@every_case_in_front
@pytest.mark.parametrize("cache", [None, "static"])
def test_beams_have_the_score_that_they_have_by_hand(case: Case, cache: str | None) -> None:
    model, adapter = pair(case)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    found = generated(pf.bind(model, adapter), **PADDED, **ENDLESS, **options, cache_implementation=cache)
    tokens = new_tokens(model, found.sequences)
    for number, (logits, start) in enumerate(rows_of(model, adapter)):
        for beam in (2 * number, 2 * number + 1):
            expected = decoding.score(logits, start, tokens[beam : beam + 1])
            torch.testing.assert_close(found.sequences_scores[beam], expected.float(), rtol=ROUNDING, atol=0.0)


@pytest.mark.parametrize("case", [case for case in IN_FRONT if case.base in ("llama", "gpt2")], ids=str)
@pytest.mark.parametrize("assistant", ["the prompt's own words", "the base", "the bound module"])
def test_assisted_generation_says_what_it_says_by_hand(case: Case, assistant: str) -> None:
    model, adapter = pair(case)
    bound = pf.bind(model, adapter)
    assistants = {"the base": model, "the bound module": pf.bind(model, adapter)}
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    if assistant in assistants:
        options = {"assistant_model": assistants[assistant], "num_assistant_tokens": 3}
    row = torch.tensor([[5, 6, 7, 5, 6]])
    options |= {"input_ids": row, "attention_mask": torch.ones_like(row)}
    if transformers.__version__.startswith("4."):  # it cuts a cache to the text's length: the prompt's tokens too many
        with pytest.raises(ValueError, match="the cache was cut to the length of the text"):
            generated(bound, **options)
        return
    found = generated(bound, **options)
    expected = decoding.greedy(decoding.by_hand(model, adapter, row), row, steps=6, end=39)
    assert found[:, row.shape[1] :].equal(expected)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix"])
def test_a_cache_that_was_cut_to_the_text_is_refused(method: str) -> None:
    model, adapter = pair(Case("llama", method))
    row = torch.tensor([[5, 6, 7, 5, 6]])
    kept = caches.new_cache(model.config)
    name = hf.cache_argument(model)
    assert name is not None
    pf.apply(model, adapter, {"input_ids": row, "attention_mask": torch.ones_like(row), name: kept})
    kept.crop(-adapter.config.num_virtual_tokens)  # as many too many
    after = {"input_ids": row[:, :1], "attention_mask": torch.ones(1, row.shape[1] + 1, dtype=torch.long), name: kept}
    with pytest.raises(ValueError, match="attention_mask has a number for each of 6 tokens; expected 1 for the input"):
        pf.apply(model, adapter, after)


@every_case
def test_the_cache_changes_nothing(case: Case) -> None:
    # peft loses a prefix where use_cache is False: after the first token (T5), or with an error (Llama).
    model, adapter = pair(case)
    bound = pf.bind(model, adapter)
    assert generated(bound, **PADDED, use_cache=False).equal(generated(bound, **PADDED))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["two prompts", "prompt and prefix"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_combinations_say_what_they_say_by_hand(name: str, kind: str, cache: str | None) -> None:
    methods = {"two prompts": ("prompt tuning", "p-tuning"), "prompt and prefix": ("prefix", "prompt tuning")}[kind]
    pairs = [pair(Case(name, method)) for method in methods]
    model, adapters = pairs[0][0], tuple(adapter for _, adapter in pairs)
    short = {**ENDLESS, "max_new_tokens": 4, "min_new_tokens": 4}  # GPT-2 here has 16 positions
    found = generated(pf.bind(model, adapters), **PADDED, **short, cache_implementation=cache)
    assert_said_by_hand(model, adapters, found)


def test_lora_says_what_merged_weights_say() -> None:
    model, _ = pair(Case("llama", "prefix"))
    adapter = oracle.randomised(pf.init(model, pf.LoraConfig(r=2)), size=0.5)
    merged, _ = pair(Case("llama", "prefix"))
    merged.load_state_dict(pf.merge(dict(model.state_dict()), adapter))
    found = generated(pf.bind(model, adapter), **PADDED)
    assert found.equal(generated(merged, **PADDED))
    assert not found.equal(generated(model, **PADDED))


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_model_that_keeps_states_says_what_it_says_by_hand(cache: str | None) -> None:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "head_dim": 8, "num_heads": 4, "state_size": 8}
    config = transformers.Mamba2Config(**sizes, n_groups=1, num_hidden_layers=2, initializer_range=0.5)
    torch.manual_seed(1)
    model = transformers.Mamba2ForCausalLM(config).double().eval()
    adapter = oracle.randomised(pf.init(model, pf.PromptTuningConfig(num_virtual_tokens=3)), size=1.0)
    found = generated(pf.bind(model, adapter), **PADDED, **ENDLESS, cache_implementation=cache)
    assert_said_by_hand(model, adapter, found)


def test_a_prefix_behind_padding_and_a_window_is_right_or_refused() -> None:
    # Alone a row sees the whole prefix; behind padding, the window would end before it.
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    for window, said in ((12, ""), (11, "layers of the model see 11 tokens, and padding on the left is between")):
        torch.manual_seed(1)
        model = (
            transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=window)).double().eval()
        )
        adapter = oracle.randomised(pf.init(model, pf.PrefixTuningConfig(num_virtual_tokens=3)), size=1.0)
        short = {**ENDLESS, "max_new_tokens": 4, "min_new_tokens": 4}
        if said:
            with pytest.raises(ValueError, match=said):
                generated(pf.bind(model, adapter), **PADDED, **short)
        else:
            assert_said_by_hand(model, adapter, generated(pf.bind(model, adapter), **PADDED, **short))
        row = LEFT[1:2]
        alone = generated(pf.bind(model, adapter), input_ids=row, attention_mask=torch.ones_like(row), **short)
        logits = decoding.by_hand(model, adapter, row)
        expected = logits(alone.sequences[:, :-1])[0]
        assert oracle.distance(alone.logits[-1][0], expected) < ROUNDING


@pytest.mark.parametrize("method", ["prompt tuning", "prefix"])
def test_a_static_cache_of_ones_own_grows_by_the_prompt_or_says_that_it_is_full(method: str) -> None:
    model, adapter = pair(Case("llama", method))
    bound, expected = pf.bind(model, adapter), generated(pf.bind(model, adapter), **PADDED)
    name = decoding.cache_name(type(model))
    cache = transformers.StaticCache(config=model.config, max_cache_len=LEFT.shape[1] + 5)
    assert generated(bound, **PADDED, **{name: cache}).equal(expected)
    cache = transformers.StaticCache(config=model.config, max_cache_len=LEFT.shape[1] + 2)
    with pytest.raises(ValueError, match=r"its static cache has room for 0 more"):
        generated(bound, **PADDED, **{name: cache})


@pytest.mark.parametrize("method", ["prompt tuning", "prefix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_generates(method: str, dtype: torch.dtype) -> None:
    model, adapter = pair(Case("llama", method))
    model = model.to(dtype)
    adapter = pf.init(model, adapter.config)
    found = generated(pf.bind(model, adapter), **PADDED)
    assert found.equal(generated(pf.bind(model, adapter), **PADDED, use_cache=False))
