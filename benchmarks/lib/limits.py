"""Where torch or transformers themselves stop: what fails, and what works in its place. `transforms.py` runs both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftfn as pf


class Limit(NamedTuple):
    """One limit; `fails` raises, `works` does not."""

    what: str
    fails: Callable[[], Any]
    instead: str
    works: Callable[[], Any]


def _llama() -> nn.Module:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=20)).eval()


def _bert(dropout: float = 0.0) -> nn.Module:
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0, "vocab_size": 20}
    return transformers.BertModel(transformers.BertConfig(**sizes)).eval()


def _bloom() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config).eval()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


IDS = torch.arange(12).view(2, 6) % 20


def _value(model: nn.Module, config: pf.PeftConfig, given: Any) -> tuple[Callable[[Any], Tensor], Any]:
    """A scalar as a function of an adapter's parameters, and parameters."""
    adapter = pf.init(model, config)

    def value(params: Any) -> Tensor:
        output = pf.apply(model, adapter.replace(params=params), given)
        return (output if isinstance(output, Tensor) else output[0]).square().mean()

    return value, adapter.params


def _slope(model: nn.Module, config: pf.PeftConfig, given: Any) -> None:
    value, params = _value(model, config, given)
    jvp(value, (params,), (params,))


def _fused() -> None:
    _slope(_llama(), pf.LoraConfig(), {"input_ids": IDS})


def _math() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        _fused()


def _fast_path() -> None:
    _slope(_Attention().eval(), pf.LoraConfig(target_modules=["attention"]), torch.ones(2, 3, 8))


def _slow_path() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            _fast_path()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _bloom_gradient() -> None:
    value, params = _value(_bloom(), pf.LoraConfig(), {"input_ids": IDS})
    grad(value)(params)


def _backward(model: nn.Module) -> None:
    value, params = _value(model, pf.LoraConfig(), {"input_ids": IDS})
    value({path: {name: t.requires_grad_() for name, t in leaf.items()} for path, leaf in params.items()}).backward()


def _checkpointed() -> nn.Module:
    model: Any = _llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _checkpointed_gradient() -> None:
    value, params = _value(_checkpointed(), pf.LoraConfig(), {"input_ids": IDS})
    grad(value)(params)


def _traced(loss_type: str | None) -> None:
    sizes: Any = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    model.loss_type = loss_type
    adapter = pf.init(model, pf.LoraConfig())
    torch.compiler.reset()
    given = {"input_ids": IDS, "labels": IDS}
    torch.compile(lambda one: pf.apply(model, one, given).loss, fullgraph=True, backend="eager")(adapter)


def _dropout(**kwargs: Any) -> None:
    model = _bert(dropout=0.5).train()
    stacked = pf.stack([pf.init(model, pf.LoraConfig())] * 2)
    with sdpa_kernel(SDPBackend.MATH):
        vmap(lambda adapter: pf.apply(model, adapter, {"input_ids": IDS})[0], **kwargs)(stacked)


LIMITS = (
    Limit("`jvp` through fused attention", _fused, "`sdpa_kernel(SDPBackend.MATH)`", _math),
    Limit(
        "`jvp` through `nn.MultiheadAttention` in evaluation",
        _fast_path,
        "`torch.backends.mha.set_fastpath_enabled(False)` and `sdpa_kernel(SDPBackend.MATH)`",
        _slow_path,
    ),
    Limit(
        "`grad` of Bloom, whose GELU is an autograd function of the old form",
        _bloom_gradient,
        "`loss.backward()`",
        lambda: _backward(_bloom()),
    ),
    Limit(
        "`grad` through activation checkpointing",
        _checkpointed_gradient,
        "`loss.backward()`",
        lambda: _backward(_checkpointed()),
    ),
    Limit(
        "`compile(fullgraph=True)` of GPT-2 with labels, which logs that `loss_type` is not set",
        lambda: _traced(None),
        '`model.loss_type = "ForCausalLM"`',
        lambda: _traced("ForCausalLM"),
    ),
    Limit(
        "`vmap` of a model with dropout in training",
        _dropout,
        '`vmap(..., randomness="different")` or `"same"`',
        lambda: _dropout(randomness="different"),
    ),
)
