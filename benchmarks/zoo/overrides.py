"""What the rules of sizes.py cannot know: fields of single models that have to fit each other, by model type or class.

An entry under a model type is put over the rules' values. An entry under a class name is given to the configuration
before the rules see it, or is a function that makes the whole configuration.
"""

from __future__ import annotations

from typing import Any


def _dbrx_attention(config: Any) -> Any:
    """Its model reads a rotary base that its configuration has no field for."""
    given = type(config.attn_config)(kv_n_heads=2, clip_qkv=8.0)
    given.rope_theta = 10000.0
    return given


def _resnet(config: Any, every: bool = False) -> dict[str, Any]:
    """transformers' own backbone in the place of timm's."""
    from transformers import ResNetConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    stages = stages if every else stages[1:] if "num_feature_levels" in vars(config) else stages[3:]
    backbone = ResNetConfig(**BACKBONE, out_features=stages)
    return {"backbone_config": backbone, "use_timm_backbone": False, "use_pretrained_backbone": False}


def _upernet(_: Any) -> dict[str, Any]:
    from transformers import ConvNextConfig

    backbone = ConvNextConfig(**STAGES, image_size=64, out_features=["stage1", "stage2", "stage3", "stage4"])
    return {"backbone_config": backbone, "auxiliary_in_channels": 32, "pool_scales": [1, 2]}


BACKBONE = {"embedding_size": 16, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
RESNET = _resnet
RTDETR = {
    "num_queries": 6,
    "encoder_in_channels": [16, 24, 32],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
}
DPT = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 24, 32]}
STAGES = {"hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1]}
BLOCKS = STAGES | {"num_encoder_blocks": 4}
SWIN = {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "image_size": 64}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
PINPOINTS = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32}
VIBEVOICE = {"num_filters": 2, "depths": [1, 1, 1, 1, 1, 1, 1]}  # doubled at each of six stages
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}

OVERRIDES: dict[str, Any] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2, "n_mamba_heads": 4},
    "ovis2": {"visual_indicator_token_ids": [91, 92, 93, 94, 95]},
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
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "head_dim": None,
        "num_heads": 4,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 1.0,
    },
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
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 64, 64, 64], "num_groups": 4},
    "cvt": {"embed_dim": [16, 24, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.1]},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "levit": {
        "patch_size": 16,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 4],
        "key_dim": [8, 8, 8],
        "depths": [1, 1, 1],
        "image_size": 64,
    },
    "efficientnet": {"image_size": 64, "hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.3},
    "hgnet_v2": {
        "embedding_size": 8,
        "hidden_sizes": [16, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 24],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 24, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "poolformer": BLOCKS | {"hidden_sizes": [16, 24, 32, 32], "patch_size": 16},
    "pvt": BLOCKS | {"image_size": 64, "num_attention_heads": [1, 2, 2, 2], "sequence_reduction_ratios": [2, 2, 1, 1]},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "maskformer-swin": SWIN,
    "mobilevitv2": {
        "image_size": 128,
        "base_attn_unit_dims": [16, 24, 32],
        "n_attn_blocks": [1, 1, 1],
        "width_multiplier": 0.25,
    },
    "mobilevit": {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32]},
    "textnet": {"hidden_sizes": [16, 16, 16, 24, 32], "stem_out_channels": 16},
    "segformer": BLOCKS
    | {"hidden_sizes": [16, 24, 32, 32], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 32},
    "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64, "hidden_sizes": [16, 32, 64, 128]},
    "hiera": {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "image_size": [64, 64],
        "initial_layers": 1,
    },
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "perceiver": {
        "d_latents": 32,
        "d_model": 32,
        "num_latents": 6,
        "max_position_embeddings": 64,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1,
    },
    "funnel": {"d_model": 32, "d_head": 8, "n_head": 4, "d_inner": 48, "block_sizes": (2, 2)},
    "ctrl": {"dff": 48},
    "xlnet": {"d_inner": 48, "n_layer": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 5, "no_token_index": 6},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
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
    "canine": {"num_hash_functions": 4, "num_hash_buckets": 64},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "dense"], "num_hidden_layers": 2},
    "wav2vec2-bert": {"vocab_size": 128},
    "wav2vec2-conformer": {"vocab_size": 128},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "glm4v_text": MROPE,
    "glm4v_moe_text": MROPE | {"head_dim": 16},
    "glm_ocr_text": MROPE,
    "glm46v_text": MROPE,
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}},
    "cosmos3_edge_text": MROPE,
    "hunyuan_vl_text": MROPE,
    "llava_next": PINPOINTS,
    "llava_next_video": PINPOINTS,
    "llava_onevision": PINPOINTS,
    "qwen2_5_vl_vision": WINDOWS,
    "exaone4_5_vision": WINDOWS,
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "musicgen_decoder": {"num_codebooks": 4},
    "llama4_vision_model": {
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "intermediate_size": 128,
        "vision_output_dim": 32,
    },
    "d_fine": RTDETR,
    "rt_detr": RTDETR,
    "rt_detr_v2": RTDETR,
    "deimv2": RTDETR,
    "pp_doclayout_v2": RTDETR,
    "pp_doclayout_v3": RTDETR,
    "pp_doclayout_v4": RTDETR,
    "dpt": DPT,
    "tipsv2_dpt": DPT,
    "upernet": _upernet,
    "lw_detr": {"image_size": 64},
    "beit": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "data2vec-vision": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    **{f"vibevoice_acoustic_tokenizer{part}": VIBEVOICE for part in ("", "_encoder", "_decoder")},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 6400},
    "fun_asr_nano": lambda config: {
        "adaptor_config": type(config.adaptor_config)(
            hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4
        )
    },
    "step3p5": {"sliding_window": 8},
    "mimi": {"upsample_groups": 32, "num_filters": 8, "vector_quantization_hidden_dimension": 32, "codebook_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "granite4_vision": PINPOINTS | {"deepstack_layer_map": [[0, 0]]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "radio": {"video_temporal_patch_size": 2},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "blt": {"num_hidden_layers": 2},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "rt_detr_resnet": BACKBONE,
    "lw_detr_vit": {"num_windows": 4, "image_size": 64, "out_indices": [1, 2], "window_block_indices": [0]},
    "detr": lambda config: _resnet(config, every=True) | {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "blip-2": {"image_token_index": 120},
    "instructblip": {"image_token_index": 120},
    "instructblipvideo": {"video_token_index": 120},
    "chameleon": {"vocabulary_map": {"<image>": 120}},
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121}},
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni_vision_encoder": WINDOWS,
    "qwen2_5_omni_text": MROPE,
    "qwen3_omni_moe_text": MROPE,
    "hy_v4_vl_text": MROPE,
    "conditional_detr": RESNET,
    "dab-detr": RESNET,
    "deformable_detr": RESNET,
    "table-transformer": RESNET,
    "resnet": BACKBONE,
    "ReformerModelWithLMHead": {"is_decoder": True},
}
