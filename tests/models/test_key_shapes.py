"""The keys that a model's layers keep are found without its weights, as far as its empty copy comes."""

from __future__ import annotations

from typing import Any

import decoding
import pytest
import torch
import transformers

from peftfn.models import transformers_caches as caches
from peftfn.models.key_shapes import Shape, key_shapes

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LATENT: dict[str, Any] = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 6, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
LATENT |= {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 6, "decoder_sparse_step": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Llama", SMALL),
    "experts": ("Mixtral", SMALL | {"num_local_experts": 4}),
    "experts beside heads of another width": ("Qwen3Moe", SMALL | QWEN),
    "experts after a dense layer, latent keys": ("DeepseekV3", SMALL | LATENT),
}


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_are_those_that_the_model_leaves_in_its_cache(kind: str) -> None:
    name, sizes = MODELS[kind]
    model: Any = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    cache = caches.new_cache(model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]), **{decoding.cache_name(type(model)): cache}, use_cache=True)
    kept = caches.layers_of(cache)
    assert kept is not None
    expected = [Shape(one.keys.shape[1], one.keys.shape[-1], one.values.shape[-1]) for one in kept]
    assert len(expected) == 3
    state = torch.get_rng_state()
    assert key_shapes(model, 3) == expected
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert key_shapes(type(model)(model.config), 3) == expected, "no weight is read"
