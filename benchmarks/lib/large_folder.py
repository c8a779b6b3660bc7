"""A large model's folder of random weights, and an adapter for it: what merges are measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from lib.setting import LINEAR

SHARD = 1 << 30  # bytes


class Sizes(NamedTuple):
    """A Llama."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 32_000

    @staticmethod
    def of(gigabytes: float) -> Sizes:
        """One whose weights in bfloat16 take about that much."""
        hidden, intermediate, vocabulary = (4096, 11_008, 32_000) if gigabytes > 5 else (2048, 5632, 32_000)
        if gigabytes < 1:
            hidden, intermediate, vocabulary = 512, 1408, 4000
        each = 2 * (4 * hidden**2 + 3 * hidden * intermediate)
        return Sizes(hidden, intermediate, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / each), vocabulary)


def make_folder(folder: Path, sizes: Sizes) -> int:
    """Write a model of random weights, file by file; its bytes."""
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        vocab_size=sizes.vocabulary,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shards: list[dict[str, torch.Size]] = [{}]
    held = 0
    for name, parameter in model.named_parameters():
        size = 2 * parameter.numel()
        if shards[-1] and held + size > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = parameter.shape
        held += size
    where: dict[str, str] = {}
    numbers = 0.02 * torch.randn(1 << 22).bfloat16()  # the same ones again and again: quick, and as good here
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        made = {name: _filled(shape, numbers) for name, shape in shard.items()}
        save_file(made, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _filled(shape: torch.Size, numbers: torch.Tensor) -> torch.Tensor:
    return numbers.repeat(-(-shape.numel() // len(numbers)))[: shape.numel()].clone().view(shape)


def make_adapter(folder: Path, base: Path, r: int) -> None:
    """Write a LoRA adapter for all linear layers of the folder, none of whose factors is zero."""
    import transformers

    import peftfn as pf

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(base))
    config = pf.LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=list(LINEAR), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    pf.save(pf.init(model, config), folder)
