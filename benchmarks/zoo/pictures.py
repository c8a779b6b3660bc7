"""Pictures as a model takes them, and their tokens among the words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def images(model: Any, names: set[str], number: int, dtype: torch.dtype, ids: Tensor | None) -> dict[str, Tensor]:
    """The image arguments of one row; with words, their tokens are put before them."""
    if "pixel_values" not in names:
        return {}
    given = pixels(model, names, number, dtype)
    if ids is None:
        return given
    return given | among_words(model, names, given, ids)


def vision(config: Any) -> Any:
    """The configuration of what sees."""
    for name in ("vision_config", "encoder", "backbone_config", "vision_tower_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def side(config: Any) -> tuple[int, int]:
    """Height and width."""
    size = getattr(config, "image_size", None) or getattr(config, "img_size", None) or 32
    return tuple(size[:2]) if isinstance(size, (list, tuple)) else (size, size)


def pixels(model: Any, names: set[str], number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    config = vision(model.config)
    generator = torch.Generator().manual_seed(2000 + number)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    if "image_grid_thw" in names:
        patch = config.patch_size
        flat = channels * getattr(config, "temporal_patch_size", 1) * patch * patch
        values = torch.randn((16, flat), generator=generator).to(dtype)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    height, width = side(config)
    given = {"pixel_values": torch.randn((1, channels, height, width), generator=generator).to(dtype)}
    if "pixel_mask" in names:
        given["pixel_mask"] = torch.ones(1, height, width, dtype=torch.long)
    return given


def image_token(config: Any) -> int | None:
    """The number of the token that stands for a part of an image."""
    for name in ("image_token_id", "image_token_index", "img_context_token_id", "image_token"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def among_words(model: Any, names: set[str], given: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Words with as many image tokens before them as the image has features."""
    token = image_token(model.config)
    if token is None:
        return {}
    ids = torch.cat([torch.full((1, features(model, given)), token), ids], 1)
    more = {"input_ids": ids}
    if "attention_mask" in names:
        more["attention_mask"] = torch.ones_like(ids)
    if "mm_token_type_ids" in names:
        more["mm_token_type_ids"] = (ids == token).long()
    if "token_type_ids" in names:
        more["token_type_ids"] = (ids == token).long()
    return more


def features(model: Any, given: dict[str, Tensor]) -> int:
    """How many features the model makes of these pictures."""
    core = model if hasattr(model, "get_image_features") else model.model
    with torch.no_grad():
        found = core.get_image_features(**given)
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)
