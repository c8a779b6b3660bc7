"""What the rules of sizes.py cannot know: fields of single models that have to fit each other, by model type or class name.

An entry under a model type is put over the rules' values. An entry under a class name is given to the configuration
before the rules see it, or is a function that makes the whole configuration.
"""

from __future__ import annotations

from typing import Any

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}

OVERRIDES: dict[str, Any] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "ReformerModelWithLMHead": {"is_decoder": True},
}
