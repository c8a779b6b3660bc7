"""What the tests of `bind` share: bases of every kind with what is adapted there, and what a module gives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from bases import BASES, EXPERTS_ARE_PARAMETERS, WORDS, Base, ids, randn, text
from oracle import called, config_of, outputs, randomised
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf

LLAMA = BASES["llama"]
EXPERTS: dict[str, Any] = (
    {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    if EXPERTS_ARE_PARAMETERS
    else {"target_modules": ["w1", "w2"]}
)
ATTENTION: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


class Recurrent(nn.Module):
    """An embedding that renormalises, an LSTM that reads its weights from a list, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 6, padding_idx=0, max_norm=1.0)
        self.memory = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, 3)."""
        return self.head(self.memory(self.table(ids))[0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def albert() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": WORDS, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 3}
    return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**sizes))


class Row(NamedTuple):
    """A base and what is adapted there."""

    base: Base
    options: dict[str, Any]


ROWS: dict[str, Row] = {
    "mlp": Row(BASES["mlp"], {"target_modules": ["0", "3"], "modules_to_save": ["5"]}),
    "convnet": Row(BASES["convnet"], {"target_modules": ["4", "8"], "bias": "lora_only"}),
    "conv1d": Row(BASES["words"], {"target_modules": ["0", "1", "3"], "lora_dropout": 0.1}),
    "lstm": Row(Base(Recurrent, lambda: ids(3, 5)), {"target_modules": ["table"], "modules_to_save": ["memory"]}),
    "encoder": Row(Base(encoder, randn(3, 4, 8)), {"target_modules": ["self_attn", "linear1"]}),
    "llama": Row(LLAMA, ATTENTION | {"modules_to_save": ["norm"]}),
    "llama tied": Row(BASES["llama tied"], {"target_modules": ["q_proj", "embed_tokens"]}),
    "bert": Row(BASES["bert"], {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "t5": Row(BASES["t5"], {"target_modules": ["q", "lm_head"]}),
    "vit": Row(BASES["vit"], {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "mixtral": Row(BASES["mixtral"], EXPERTS),
    "albert": Row(Base(albert, text), {"target_modules": ["query", "value"], "bias": "all"}),
    "ia3 bert": Row(BASES["bert"], {"kind": "IA3Config", "task_type": "SEQ_CLS"}),
    "ia3 gpt2": Row(BASES["gpt2"], {"kind": "IA3Config"}),
    "adalora gpt2": Row(BASES["gpt2"], {"kind": "AdaLoraConfig", "lora_dropout": 0.1, "bias": "lora_only"}),
}


def adapter_for(model: nn.Module, options: dict[str, Any], seed: int = 0) -> pf.Adapter:
    """An adapter, of rank 2 where it is LoRA's, with random values everywhere."""
    given: dict[str, Any] = options if "kind" in options else {"r": 2, **options}
    return randomised(pf.init(model, config_of(pf, given)), seed)


def names_of(model: nn.Module, adapter: pf.Adapter) -> list[str]:
    """What a single adapter's trained tensors are called in a bound module, in the order of `pf.leaves`."""
    modules = dict(model.named_modules())
    joined = {path: f"{path}." if path in modules else f"{path}_" for path in adapter.params}
    return [joined[path] + name for path, leaf in adapter.params.items() for name in leaf]


def trained_names(module: nn.Module) -> set[str]:
    """The parameters that require grad."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def output(model: nn.Module, batch: Any) -> Tensor:
    """What the module gives, with the same dropout each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return outputs(called(model, batch))


def applied(model: nn.Module, adapter: Any, batch: Any) -> Tensor:
    """What `apply` gives, with the same dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return outputs(pf.apply(model, adapter, batch))


def flat(adapter: pf.Adapter) -> list[Tensor]:
    """The trained tensors, in the order of `pf.leaves`."""
    return [tensor for leaf in adapter.params.values() for tensor in leaf.values()]


def check_bound(model: nn.Module, adapter: pf.Adapter, x: Tensor) -> None:
    """A bound module computes what `apply` does, trains, and leaves the base as it is."""
    before = snapshot(model)
    expected = pf.apply(model, adapter, x)
    bound = pf.bind(model, adapter)
    assert bound(x).equal(expected)
    optimizer = torch.optim.SGD([p for p in bound.parameters() if p.requires_grad], lr=0.1)
    bound.train()(x).square().mean().backward()
    optimizer.step()
    assert not bound.eval()(x).equal(expected)
    assert snapshot(model) == before
