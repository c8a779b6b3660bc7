"""Where peft itself is wrong: the mathematics, from the tensors in its file and the base in float64.

LoRA on `nn.MultiheadAttention`: peft adds what belongs to `out_proj` twice. Here W + s·B·A is put into the base's
weights one by one, and the base is run.

A prompt in `generate`, where a row has a masked token inside: peft counts it as a position, the base's own `generate`
does not. Here each token is decoded from the whole row, with no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def greedy(base: nn.Module, prompt: Tensor, inputs: Mapping[str, Tensor], like: Tensor) -> list[list[int]]:
    """The rows of `inputs` with greedy tokens until they are as long as `like`; positions count what is not masked."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    while ids.shape[1] < like.shape[1]:
        seen = torch.cat([torch.ones(len(ids), len(prompt), dtype=mask.dtype), mask], 1)
        places = (seen.cumsum(1) - 1).masked_fill(seen == 0, 1)
        rows = torch.cat([prompt.expand(len(ids), -1, -1), base.get_input_embeddings()(ids)], 1)
        with torch.no_grad():
            scores = base(inputs_embeds=rows, attention_mask=seen, position_ids=places, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids.tolist()
