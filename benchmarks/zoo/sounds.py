"""Sounds as a model takes them: samples, or features of frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SAMPLES = 2000


def sounds(model: Any, names: set[str], number: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The audio arguments of one row; none for a model without a main input of sound."""
    generator = torch.Generator().manual_seed(1000 + number)
    main, config = model.main_input_name, model.config
    if main == "inputs" and "input_values" in names:
        return {"input_values": torch.randn((1, SAMPLES), generator=generator).to(dtype)}
    if main == "input_values" and "input_values" in names:
        shape: tuple[int, ...] = (1, SAMPLES)
        if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):  # AST: a spectrogram as one picture
            shape = (1, config.max_length, config.num_mel_bins)
        if config.model_type == "omniasr_ctc":
            shape = (1, 1, SAMPLES)
        return {"input_values": torch.randn(shape, generator=generator).to(dtype)}
    if main == "input_features" and "input_features" in names:
        return {"input_features": torch.randn(_features(config), generator=generator).to(dtype)}
    return {}


def _features(config: Any) -> tuple[int, ...]:
    encoder = getattr(config, "encoder_config", None) or config
    if config.model_type == "granite_speech5_ctc":  # it takes four frames as one
        return (1, 64, 4 * encoder.num_mel_bins)
    if (
        hasattr(config, "max_source_positions")
        and not hasattr(config, "input_feat_per_channel")
        and hasattr(config, "num_mel_bins")
    ):
        return (1, config.num_mel_bins, 2 * config.max_source_positions)
    for name in ("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "input_dim", "feature_size"):
        for one in (config, encoder):
            if isinstance(getattr(one, name, None), int):
                return (1, 64, getattr(one, name))
    return (1, 64, 80)
