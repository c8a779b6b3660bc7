"""One class of the zoo while its checks run: the model, its batches, and what it puts out bare."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from zoo import by_hand
from zoo.classes import WRITES, Entry
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

    def rounded(self) -> Case:
        """The same in float32."""
        made = object.__new__(Case)
        made.entry, made.model, made.exact = self.entry, copy.deepcopy(self.model).float(), False
        made.batch = batch_of(made.model)
        return made

    @property
    def task(self) -> str | None:
        """PEFT's name for what the model does; None where it has none."""
        if self.entry.family == "classification":
            return "SEQ_CLS"
        if self.entry.family not in WRITES:
            return None
        return "SEQ_2_SEQ_LM" if self.model.config.is_encoder_decoder else "CAUSAL_LM"

    @property
    def layer_task(self) -> str | None:
        """The same for adapters of layers; peft's wrapper of sequence tasks takes no sound and no picture."""
        return self.task if self.entry.family in ("causal", "seq2seq", "classification") and self.is_text else None

    @property
    def is_text(self) -> bool:
        """Whether words go in."""
        return "input_ids" in self.batch

    @functools.cached_property
    def targets(self) -> Any:
        """Every linear layer; where there is none, every ungrouped convolution."""
        if any(isinstance(layer, (nn.Linear, Conv1D)) for layer in self.model.modules()):
            return "all-linear"
        return self.convolutions

    @functools.cached_property
    def convolutions(self) -> list[str]:
        """The paths of all ungrouped convolutions."""
        named = self.model.named_modules()
        return sorted(path for path, one in named if isinstance(one, (nn.Conv1d, nn.Conv2d)) and one.groups == 1)

    @functools.cached_property
    def base(self) -> dict[str, Tensor]:
        """What the model puts out without an adapter."""
        return called(self.model, self.batch)

    def rows(self, *numbers: int) -> dict[str, Tensor]:
        """A batch of these rows."""
        return batch_of(self.model, numbers)

    @functools.cached_property
    def loras(self) -> list[pf.Adapter]:
        """Two LoRAs on every linear layer, filled with random numbers."""
        config = pf.LoraConfig(r=4, lora_alpha=6, target_modules=self.targets, task_type=self.layer_task)
        fresh = pf.init(self.model, config)
        return [filled(fresh, seed) for seed in range(2)]

    @property
    def lora(self) -> pf.Adapter:
        """The first of them."""
        return self.loras[0]

    @functools.cached_property
    def hands(self) -> list[Any]:
        """The models with their weights put in by hand. Nobody writes to them."""
        return [by_hand.adapted(self.model, one) for one in self.loras]

    @functools.cached_property
    def wanted(self) -> list[dict[str, Tensor]]:
        """What those put out."""
        return [called(one, self.batch) for one in self.hands]

    @functools.cached_property
    def peft_config(self) -> peft.LoraConfig:
        """The same LoRA's config in peft."""
        return peft.LoraConfig(r=4, lora_alpha=6, target_modules=self.targets, task_type=self.layer_task)
