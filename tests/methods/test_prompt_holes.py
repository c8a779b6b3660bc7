"""A token that is masked inside a row, of models that count positions by the mask, and of those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import peftfn as pf

# Float64 rounding of one more or fewer place in an attention's sums.
EXACT = 1e-12
SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def opt() -> Any:
    sizes = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "init_std": 0.2}
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes)).eval().double()


def biogpt() -> Any:
    sizes = {**SIZES, "intermediate_size": 24, "max_position_embeddings": 32, "initializer_range": 0.2}
    torch.manual_seed(0)
    return transformers.BioGptForCausalLM(transformers.BioGptConfig(**sizes)).eval().double()


IDS = torch.tensor([[5, 6, 7, 8, 9]])
MASKS = ([1, 0, 1, 1, 1], [0, 1, 0, 1, 1])


def adapters(model: Any) -> list[pf.Adapter]:
    draws = [torch.Generator().manual_seed(count) for count in (4, 2)]
    configs = [pf.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count) for count in (4, 2)]
    return [pf.init(model, one, draw, dtype=torch.float64) for one, draw in zip(configs, draws, strict=True)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_behind_a_prefix_opt_gives_a_masked_token_no_position(mask: list[int]) -> None:
    model, keep = opt(), torch.tensor(mask).bool()
    adapter = adapters(model)[0]
    found = pf.apply(model, adapter, {"input_ids": IDS, "attention_mask": torch.tensor([mask])}).logits[:, keep]
    expected = pf.apply(model, adapter, {"input_ids": IDS[:, keep]}).logits
    assert (found - expected).abs().max() <= EXACT


@pytest.mark.parametrize("make", [opt, biogpt])
def test_rows_with_prefixes_of_unlike_length_are_those_rows_alone(make: Any) -> None:
    model = make()
    both = adapters(model)
    masks = torch.tensor([*MASKS, MASKS[0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": IDS.expand(4, -1), "attention_mask": masks}
    found = pf.apply(model, pf.stack(both), batch, index=[0, -1, 1, 1]).logits
    for row, adapter in enumerate((both[0], (), both[1], both[1])):
        alone = {"input_ids": IDS, "attention_mask": masks[row : row + 1]}
        apart = (found[row] - pf.apply(model, adapter, alone).logits[0])[masks[row].bool()]
        assert apart.abs().max() <= EXACT
