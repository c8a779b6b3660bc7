"""What is timed: a Llama of random weights, a batch, and one LoRA adapter in both libraries."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import peft
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf
from peftfn.methods.low_rank import dropout

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 2048  # small: the layers are what adapters act on


class Sizes(NamedTuple):
    """A model and a batch."""

    layers: int
    hidden: int
    intermediate: int
    rows: int
    tokens: int
    r: int = 16


FULL = Sizes(layers=4, hidden=640, intermediate=1708, rows=8, tokens=128)
QUICK = Sizes(layers=4, hidden=384, intermediate=1024, rows=4, tokens=64)
DEEP = Sizes(layers=16, hidden=384, intermediate=1024, rows=1, tokens=1)  # 112 sites


class Setting(NamedTuple):
    """One adapter on one base, in both libraries."""

    base: Any
    theirs: Any
    adapter: pf.Adapter
    batch: dict[str, Tensor]

    def on(self, device: torch.device | str) -> Setting:
        """The same on a device. Everything is made on the CPU first: the same numbers wherever it runs."""
        return Setting(*(moved(one, device) for one in self))


def moved(what: Any, device: torch.device | str) -> Any:
    """A module, or the tensors in a pytree, on the device."""
    if isinstance(what, nn.Module):
        return what.to(device)
    return torch_pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), what)


def llama(sizes: Sizes, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def trained(base: nn.Module, config: pf.PeftConfig, noise: torch.Generator) -> pf.Adapter:
    """An adapter as it is after some training: no tensor is zero."""
    adapter = pf.init(base, config, noise)
    for leaf in adapter.params.values():
        leaf["lora_B"].normal_(0, 0.02, generator=noise)
    return adapter


def in_peft(model: nn.Module, adapters: Sequence[pf.Adapter], *, trainable: bool = False) -> Any:
    """The same adapters in peft, on a copy of the model; their names there are 0, 1, 2, ...."""
    theirs: Any = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 with transformers 5.23: about names inside it
        for number, adapter in enumerate(adapters):
            place = str(pf.save(adapter, Path(folder) / str(number)))
            if theirs is None:
                copied = copy.deepcopy(model)
                theirs = peft.PeftModel.from_pretrained(copied, place, str(number), is_trainable=trainable)
            else:
                theirs.load_adapter(place, str(number), is_trainable=trainable)
    return theirs


def build(
    sizes: Sizes,
    p: float,
    *,
    training: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Setting:
    """A base in training or evaluation mode, and an adapter for all its linear layers."""
    base = llama(sizes, dtype).train(training)
    noise = torch.Generator().manual_seed(1)
    config = pf.LoraConfig(r=sizes.r, target_modules=LINEAR, lora_dropout=p, task_type="CAUSAL_LM")
    adapter = trained(base, config, noise)
    theirs = in_peft(base, [adapter], trainable=True)
    ids = torch.randint(0, VOCABULARY, (sizes.rows, sizes.tokens), generator=noise)
    return Setting(base, theirs.train(training), adapter, {"input_ids": ids, "labels": ids}).on(device)


@contextlib.contextmanager
def our_dropout(theirs: Any) -> Iterator[None]:
    """Let peft's model drop what peftfn drops from the same random state: torch draws its own masks another way."""
    modules = [
        module for path, module in theirs.named_modules() if ".lora_dropout." in path and isinstance(module, nn.Dropout)
    ]
    for module in modules:
        module.forward = dropped(module.p)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def dropped(p: float) -> Any:
    """Dropout as the mathematics has it, with peftfn's mask."""

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        kept = dropout.draw(*rows.shape, p, x.device)
        return x * dropout.mask(kept.bits, x.shape) * kept.scale

    return forward
