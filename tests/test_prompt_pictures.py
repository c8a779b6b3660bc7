"""Prompts and prefixes beside pictures: what the model computes by hand, or a refusal where it counts by its pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import decoding
import oracle
import pytest
import torch
import transformers
from oracle import distance
from torch import Tensor

import peftfn as pf

# The same sums in another order, relative to the largest value, in float64.
ROUNDING = 1e-9
TOKENS = 3
PICTURE = 38
"""The number that stands for a part of a picture."""

WORDS: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
WORDS |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIGHT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6], [2, 3, 9, 4]])


def paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        vision_config={**SIGHT, "model_type": "siglip_vision_model", "vision_use_head": False},
        text_config={**WORDS, "model_type": "gemma"},
        image_token_index=PICTURE,
        projection_dim=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config={**SIGHT, "model_type": "clip_vision_model"},
        text_config={**WORDS, "model_type": "llama", "num_key_value_heads": 2},
        image_token_index=PICTURE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def florence() -> Any:
    halves = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    wide = {f"{half}_ffn_dim": 24 for half in ("encoder", "decoder")}
    config = transformers.Florence2Config(
        vision_config={"depths": [1], "embed_dim": [8], "num_heads": [2], "num_groups": [2], "window_size": 4}
        | {"patch_size": [7], "patch_stride": [8], "patch_padding": [3], "patch_prenorm": [False]}
        | {"projection_dim": 16, "max_position_embeddings": 4, "max_temporal_embeddings": 2},
        text_config={"model_type": "bart", "vocab_size": 40, "d_model": 16, **halves, **wide, "pad_token_id": 0},
        image_token_id=PICTURE,
    )
    return transformers.Florence2ForConditionalGeneration(config)


def qwen() -> Any:
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8},
        text_config={**WORDS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        image_token_id=PICTURE,
        video_token_id=37,
        vision_start_token_id=36,
        vision_end_token_id=35,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {"paligemma": paligemma, "llava": llava, "florence": florence, "qwen": qwen}


def made(name: str) -> Any:
    """The model with weights in float64 that let a token be felt."""
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def batch_of(name: str) -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    return {"pixel_values": pixels}


