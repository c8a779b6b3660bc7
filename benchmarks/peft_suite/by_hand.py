"""Where peft itself is wrong: the mathematics, from the tensors in its file and the base in float64.

LoRA on `nn.MultiheadAttention`: peft adds what belongs to `out_proj` twice. Here W + s·B·A is put into the base's
weights one by one, and the base is run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_needed(model_id: str) -> bool:
    """Whether peft's output is known to be wrong for this base of its tests."""
    return model_id == "MHA"


def adapted(model: nn.Module, config: Any, file: dict[str, Tensor]) -> nn.Module:
    """The base, in float64, with LoRA's W + s·B·A added to its weights in place."""
    scale = config.lora_alpha / config.r
    weights = dict(model.named_parameters())
    for key, a in file.items():
        path, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if not found:
            continue
        b = file[key.replace("lora_A", "lora_B")]
        with torch.no_grad():
            weights[_weight(path, weights)].add_(scale * b.double() @ a.double())
    return model


def _weight(path: str, weights: dict[str, nn.Parameter]) -> str:
    path = path.replace(".base_layer", "")
    return f"{path}.in_proj_weight" if f"{path}.in_proj_weight" in weights else f"{path}.weight"
