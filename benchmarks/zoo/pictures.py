"""Pictures as a model takes them, and their tokens among the words."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

TOKENS = 8  # words of a row
QUERIES = 6  # of a picture that a model reads by as many queries
GRID = 4  # patches on a side, where a picture is given as its patches


def images(model: Any, names: set[str], number: int, dtype: torch.dtype, ids: Tensor | None) -> dict[str, Tensor]:
    """The image arguments of one row; with words, their tokens are put before them."""
    generator = torch.Generator().manual_seed(2000 + number)
    if "flattened_patches" in names:  # two of the numbers of a patch say where it is
        patches = torch.randn((1, 16, model.config.vision_config.patch_embed_hidden_size + 2), generator=generator)
        patches[..., 0], patches[..., 1] = torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1
        return {"flattened_patches": patches.to(dtype)}
    if model.main_input_name == "pixel_values_videos":
        size = number_of(model.config, "image_size", default=32)
        return {"pixel_values_videos": torch.randn((1, 2, 3, size, size), generator=generator).to(dtype)}
    if "pixel_values" not in names:
        return {}
    given = pixels(model, names, generator, dtype)
    return given if ids is None else given | among_words(model, names, given, ids)


def vision(config: Any) -> Any:
    """The configuration of what sees."""
    for name in ("vision_config", "encoder", "backbone_config", "vision_tower_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def number_of(config: Any, *names: str, default: int) -> int:
    """The first of these fields that is a number, or a pair of equal ones."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return default


def pixels(model: Any, names: set[str], generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """One picture, in the layout that the model's arguments tell."""
    config = vision(model.config)
    channels = number_of(config, "num_channels", "in_channels", default=3)
    patch = number_of(config, "patch_size", default=8)
    size = number_of(config, "image_size", "img_size", default=32)
    size = size if size >= 8 else 32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if "image_grid_thw" in names:
        return _grid(model, random, channels, patch, config)
    if "spatial_shapes" in names:
        mask = torch.ones(1, GRID * GRID, dtype=torch.long)
        values = random(1, GRID * GRID, channels * patch * patch)
        return {"pixel_values": values, "spatial_shapes": torch.tensor([[GRID, GRID]]), "pixel_attention_mask": mask}
    kind = model.config.model_type
    if kind == "fuyu":
        return {"pixel_values": random(1, GRID, channels * patch * patch)}
    if kind in TILED:
        return {"pixel_values": random(1, 1, channels, size, size)} | _beside(names, random, size, 0)
    if kind in PINPOINTS:
        tiles = {"pixel_values": random(1, 3, channels, size, size), "image_sizes": torch.tensor([[size, 2 * size]])}
        return tiles | ({"batch_num_images": torch.tensor([1])} if kind == "llava_onevision" else {})
    given = {"pixel_values": random(1, channels, size, size)}
    if "image_sizes" in names:
        given["image_sizes"] = torch.tensor([[size, size]])
    if "pixel_mask" in names:
        given["pixel_mask"] = torch.ones(1, size, size, dtype=torch.long)
    return given | _beside(names, random, size, getattr(model.config, "task_seq_len", 0))


# Several pictures a row, or one cut into tiles with a whole one before them.
TILED = {
    "idefics",
    "idefics2",
    "idefics3",
    "smolvlm",
    "modernvbert",
    "ultravbert",
    "granite_docling",
    "instructblipvideo",
}
PINPOINTS = {"llava_next", "llava_next_video", "llava_onevision", "granite4_vision"}
# Their patches are pictures themselves.
SQUARE_PATCHES = {"paddleocr_vl", "kimi_k25"}


def _grid(model: Any, random: Any, channels: int, patch: int, config: Any) -> dict[str, Tensor]:
    kind = model.config.model_type
    count = GRID * GRID
    depth = number_of(config, "temporal_patch_size", "patch_temporal", default=1)
    if kind in SQUARE_PATCHES:
        values = random(count, channels, patch, patch)
    elif kind in {"inkling2", "inkling2_loop"}:
        values = random(count, channels * patch * patch)
    else:
        values = random(count, channels * depth * patch * patch)
    given = {"pixel_values": values, "image_grid_thw": torch.tensor([[1, GRID, GRID]])}
    if kind == "video_llama_3":
        given["image_merge_sizes"] = torch.tensor([2])
    return given


def _beside(names: set[str], random: Any, size: int, length: int) -> dict[str, Tensor]:
    """What single models want beside the picture."""
    if "high_res_pixel_values" in names:
        return {"high_res_pixel_values": random(1, 3, size, size)}
    if "task_inputs" in names:
        return {"task_inputs": torch.arange(5, 5 + length)[None]}
    if "image_embeds_position_mask" in names:
        return {"image_embeds_position_mask": (torch.arange(TOKENS) < QUERIES).long()[None]}
    if "image_attention_mask" in names:
        return {"image_attention_mask": torch.ones(1, TOKENS, 1, dtype=torch.long)}
    if "qformer_input_ids" in names:
        ids = torch.arange(5, 9)[None]
        return {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    return {}


def image_token(config: Any) -> int | None:
    """The number of the token that stands for a part of an image."""
    for name in ("image_token_id", "image_token_index", "img_context_token_id", "image_token"):
        if type(getattr(config, name, None)) is int:
            return getattr(config, name)
    return None


def among_words(model: Any, names: set[str], given: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Words with as many image tokens before them as the image has features."""
    token = image_token(model.config)
    if token is None:
        return {}
    start = getattr(model.config, "vision_start_token_id", None)
    front = torch.full((1, features(model, given)), token)
    ids = torch.cat([*([torch.full((1, 1), start)] if isinstance(start, int) else []), front, ids], 1)
    more = {"input_ids": ids}
    if "attention_mask" in names:
        more["attention_mask"] = torch.ones_like(ids)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if name in names:
            more[name] = (ids == token).long()
    return more


def features(model: Any, given: dict[str, Tensor]) -> int:
    """How many features the model makes of these pictures."""
    core = model if hasattr(model, "get_image_features") else model.model
    taken = inspect.signature(inspect.unwrap(type(core).get_image_features)).parameters
    with torch.no_grad():
        found = core.get_image_features(**{name: value for name, value in given.items() if name in taken})
    pooled = getattr(found, "pooler_output", None)
    found = (
        found if not hasattr(found, "last_hidden_state") else pooled if pooled is not None else found.last_hidden_state
    )
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)
