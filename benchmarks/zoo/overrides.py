"""What the rules of sizes.py cannot know: fields of single models that have to fit each other, by model type or class name.

An entry under a model type is put over the rules' values. An entry under a class name is given to the configuration
before the rules see it, or is a function that makes the whole configuration.
"""

from __future__ import annotations

from typing import Any


def _dbrx_attention(config: Any) -> Any:
    """Its model reads a rotary base that its configuration has no field for."""
    given = type(config.attn_config)(kv_n_heads=2)
    given.rope_theta = 10000.0
    return given


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}

OVERRIDES: dict[str, Any] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2, "n_mamba_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dory": {
        "n_input_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "n_recurrent_layers": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "reformer": {
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (8, 24),
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
    },
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "xlstm": {"head_dim": None, "num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        }
    },
    "gemma3n_text": {
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0],
    },
    "gemma4_text": {"global_head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "dbrx": lambda config: {
        "attn_config": _dbrx_attention(config),
        "ffn_config": type(config.ffn_config)(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=32),
    },
    "esm": {"vocab_size": 128},
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 64, 64, 64], "num_groups": 4, "layer_type": "bottleneck"},
    "convnext": {"hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1]},
    "perceiver": {
        "d_latents": 32,
        "d_model": 32,
        "num_latents": 6,
        "max_position_embeddings": 64,
        "qk_channels": None,
        "v_channels": None,
    },
    "funnel": {"d_model": 32, "d_head": 8, "n_head": 4, "d_inner": 48, "block_sizes": (2, 2)},
    "ctrl": {"dff": 48},
    "xlnet": {"d_inner": 48, "n_layer": 2},
    "gemma3n": {},
    "gemma3": {"mm_tokens_per_image": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "t5gemma2": {},
    "longcat_flash": {
        "expert_ffn_hidden_size": 48,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "num_layers": 1,
        "num_hidden_layers": 2,
    },
    "layoutlmv3": {
        "coordinate_size": 4,
        "shape_size": 8,
        "max_2d_position_embeddings": 64,
        "input_size": 32,
        "patch_size": 8,
    },
    "lilt": {"hidden_size": 48, "num_attention_heads": 4, "max_2d_position_embeddings": 64},
    "vibevoice_asr": {},
    "canine": {"num_hash_functions": 4, "num_hash_buckets": 64},
    "ReformerModelWithLMHead": {"is_decoder": True},
}
