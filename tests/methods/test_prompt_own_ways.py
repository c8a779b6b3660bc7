"""Prompts in models that read a row in a way of their own: Longformer, RoFormer, Reformer."""

from __future__ import annotations

from typing import Any

import decoding
import oracle
import pytest
import torch
import transformers
from oracle import distance
from torch import Tensor
from torch.func import grad

import peftfn as pf

# The same sums in another order, in float64, relative to the largest value.
ROUNDING = 1e-9
# The same where another place has other angles, whose sines RoFormer keeps in float32.
ANGLES = 1e-6
SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "initializer_range": 0.3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [3, 4, 3, 4, 9]])
INDEX = (1, -1, 0)


def longformer() -> Any:
    config = transformers.LongformerConfig(**SMALL, attention_window=4, max_position_embeddings=40, sep_token_id=2)
    return transformers.LongformerForSequenceClassification(config).double().eval()


def roformer() -> Any:
    config = transformers.RoFormerConfig(**SMALL, is_decoder=True, max_position_embeddings=20)
    return transformers.RoFormerForCausalLM(config).double().eval()


def reformer() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2}
    sizes |= {"feed_forward_size": 24, "attn_layers": ["local", "lsh"], "num_hashes": 1, "hash_seed": 0}
    sizes |= {"axial_pos_embds": False, "max_position_embeddings": 64, "initializer_range": 0.3, "is_decoder": True}
    return transformers.ReformerModelWithLMHead(transformers.ReformerConfig(**sizes)).double().eval()


def prompt_of(model: Any, tokens: int) -> pf.Adapter:
    made = pf.init(model, pf.PromptTuningConfig(num_virtual_tokens=tokens))
    return oracle.randomised(made, tokens, size=1.0)


def of_longformer(model: Any, prompt: Tensor | None, row: Tensor) -> Tensor:
    """What its classifier says of a row, whose first token sees all and is seen by all."""
    words = model.get_input_embeddings()(row)
    whole = words if prompt is None else torch.cat([prompt.expand(len(row), -1, -1), words], 1)
    ones = torch.ones(whole.shape[:2], dtype=torch.long)
    seen = torch.zeros_like(ones)
    seen[:, 0] = 1
    return model(inputs_embeds=whole, attention_mask=ones, global_attention_mask=seen).logits


def test_the_first_token_of_a_prompt_is_seen_by_all_in_longformer() -> None:
    model = longformer()
    adapter = prompt_of(model, 3)
    prompt = decoding.prompt_of(adapter)

    def loss(prompt: Tensor) -> Tensor:
        made = adapter.replace(params={"": {"prompt_embeddings": prompt}})
        return pf.apply(model, made, {"input_ids": IDS}).logits.sin().sum()

    with torch.no_grad():
        bare = of_longformer(model, None, IDS)
        assert distance(model(IDS).logits, bare) < ROUNDING, "the hand does what the model does"
        expected = of_longformer(model, prompt, IDS)
        assert distance(pf.apply(model, adapter, {"input_ids": IDS}).logits, expected) < ROUNDING
        assert distance(expected, bare) > 0.01
    alone = grad(lambda prompt: of_longformer(model, prompt, IDS).sin().sum())(prompt)
    assert distance(grad(loss)(prompt), alone) < ROUNDING


def test_rows_of_longformer_have_prompts_of_unlike_length() -> None:
    model = longformer()
    adapters = [prompt_of(model, tokens) for tokens in (2, 3)]
    with torch.no_grad():
        found = pf.apply(model, pf.stack(adapters), {"input_ids": IDS}, index=INDEX).logits
        for row, number in enumerate(INDEX):
            prompt = decoding.prompt_of(adapters[number]) if number >= 0 else None
            assert distance(found[row], of_longformer(model, prompt, IDS[row : row + 1])[0]) < ROUNDING, f"row {row}"


def test_a_mask_of_ones_own_for_longformer_is_one_clear_error() -> None:
    model = longformer()
    batch = {"input_ids": IDS, "global_attention_mask": (IDS == 9).long()}
    with pytest.raises(ValueError, match=r"the batch has global_attention_mask of shape \(3, 5\), one for each token"):
        pf.apply(model, prompt_of(model, 3), batch)


@pytest.mark.parametrize("padding", [0, 2])
def test_angles_of_roformer_are_no_places_so_that_rows_have_prompts_of_unlike_length(padding: int) -> None:
    model = roformer()
    adapters = [prompt_of(model, tokens) for tokens in (2, 3)]
    ids = torch.cat([torch.ones(3, padding, dtype=torch.long), IDS], 1)
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long()}
    with torch.no_grad():
        found = pf.apply(model, pf.stack(adapters), batch, index=INDEX).logits
        for row, number in enumerate(INDEX):
            alone = IDS[row : row + 1]
            expected = model(alone).logits if number < 0 else embedded(model, adapters[number], alone)
            assert distance(found[row, -5:], expected[0, -5:]) < ANGLES, f"row {row}"


def embedded(model: Any, adapter: pf.Adapter, ids: Tensor) -> Tensor:
    """The logits with the prompt before the embedded input."""
    prompt = decoding.prompt_of(adapter).expand(len(ids), -1, -1)
    return model(inputs_embeds=torch.cat([prompt, model.get_input_embeddings()(ids)], 1)).logits


def test_prefixes_of_unlike_length_by_row_are_each_the_row_alone_where_angles_are_those_of_places() -> None:
    model = roformer()
    drawn = [pf.init(model, pf.PrefixTuningConfig(num_virtual_tokens=tokens)) for tokens in (2, 3)]
    prefixes = [oracle.randomised(one, seed) for seed, one in enumerate(drawn)]
    with torch.no_grad():
        found = pf.apply(model, pf.stack(prefixes), {"input_ids": IDS}, index=INDEX).logits
        for row, number in enumerate(INDEX):
            alone = () if number < 0 else prefixes[number]
            expected = pf.apply(model, alone, {"input_ids": IDS[row : row + 1]}).logits
            assert distance(found[row], expected[0]) < ANGLES, f"row {row}"


def test_reformer_says_by_its_hashes_what_it_says_by_hand() -> None:
    model = reformer()
    adapter = prompt_of(model, 3)
    with torch.no_grad():
        found = pf.apply(model, adapter, {"input_ids": IDS}).logits
        assert distance(found, embedded(model, adapter, IDS)) < ROUNDING
        assert distance(found[:, -5:], model(IDS).logits) > 0.01
    made = pf.bind(model, adapter).generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=39
    )
    for row, tokens in enumerate(made):
        expected = decoding.greedy(decoding.by_hand(model, adapter, IDS), IDS[row : row + 1], 4, end=39)[0]
        assert tokens[5:][: len(expected)].equal(expected), f"row {row}"


def test_reformer_keeps_no_keys_for_a_prefix() -> None:
    with pytest.raises(ValueError, match=r"ReformerModel\.forward has no argument for a cache of keys and values"):
        pf.init(reformer(), pf.PrefixTuningConfig(num_virtual_tokens=3))
