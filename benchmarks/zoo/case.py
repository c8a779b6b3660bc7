"""One class of the zoo while its checks run: the model, its batches, and what it puts out bare."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import peftfn as pf
from zoo.classes import Entry
from zoo.outputs import tensors
from zoo.tiny import batch_of, model_and_batch


def called(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call: with the same random numbers each time, and no gradient."""
    return output_of(lambda: model(**batch))


def output_of(run: Callable[[], Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # some models draw numbers in evaluation too
    with torch.no_grad():
        return tensors(run())


def filled(adapter: pf.Adapter, seed: int = 0, size: float = 0.3) -> pf.Adapter:
    """The adapter with random tensors, so that nothing is at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    return adapter.replace(
        params={
            path: {name: _filled(name, tensor, generator, size) for name, tensor in leaf.items()}
            for path, leaf in adapter.params.items()
        }
    )


def _filled(name: str, tensor: Tensor, generator: torch.Generator, size: float) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    if name.startswith(("lora_A", "lora_embedding_A")):
        return noise * tensor[0].numel() ** -0.5
    if name.startswith(("lora_B", "lora_embedding_B")):
        return noise * size
    if name.startswith("prompt_embeddings"):
        return noise
    return tensor + size * noise * (1.0 if tensor.ndim < 2 else tensor[0].numel() ** -0.5)


class Case:
    """A class's model and what all checks share."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.model, self.batch = model_and_batch(entry.model_class)
        self.exact = next(p for p in self.model.parameters() if p.is_floating_point()).dtype == torch.float64
        self.text_only = self.batch.keys() <= {"input_ids", "attention_mask", "decoder_input_ids", "token_type_ids"}

    @functools.cached_property
    def base(self) -> dict[str, Tensor]:
        """What the model puts out without an adapter."""
        return called(self.model, self.batch)

    def rows(self, *numbers: int) -> dict[str, Tensor]:
        """A batch of these rows."""
        return batch_of(self.model, numbers)

    @functools.cached_property
    def lora(self) -> pf.Adapter:
        """A LoRA on every linear layer, filled with random numbers."""
        return self.lora_of(0)

    def lora_of(self, seed: int) -> pf.Adapter:
        """Another one like it."""
        config = pf.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type=self.entry.layer_task)
        return filled(pf.init(self.model, config), seed)
