"""The bases that peft's tests fetch from a hub, built here: the same architecture, tiny, with seeded weights.

No hub is asked. The layers' names and kinds, which is what an adapter sees, are those of the architecture; the
sizes are these, and the weights are random numbers as the architecture draws them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 64
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 32}
# Above every token that peft's tests put in, so that no row is padding and none ends before its time.
TOKENS = {"bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 62}
GROUPED = TEXT | HEADS | TOKENS | {"num_key_value_heads": 2}
ENCODER = TEXT | HEADS | {"type_vocab_size": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}


def _opt() -> Any:
    return hf.OPTConfig(**TEXT, **TOKENS, num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=16)


def _gpt2() -> Any:
    return hf.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4, **TOKENS)


def _gptj() -> Any:
    return hf.GPTJConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4, rotary_dim=4, **TOKENS)


def _gemma3() -> Any:
    types = ["sliding_attention", "full_attention"]
    return hf.Gemma3TextConfig(**GROUPED, head_dim=4, sliding_window=8, layer_types=types, query_pre_attn_scalar=4)


def _llama4() -> Any:
    sizes = GROUPED | EXPERTS | {"head_dim": 4, "intermediate_size": 24, "intermediate_size_mlp": 24}
    return hf.Llama4TextConfig(**sizes, attention_chunk_size=32, moe_layers=[0, 1], no_rope_layers=[1, 0])


def _gpt_oss() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    # Its rotary scaling is made for a vocabulary of positions far larger than this one.
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return hf.GptOssConfig(**GROUPED | EXPERTS, head_dim=4, sliding_window=8, layer_types=kinds, rope_parameters=rope)


def _qwen3_moe() -> Any:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 4}
    return hf.Qwen3MoeConfig(**GROUPED | sizes)


def _bloom() -> Any:
    return hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=5, n_head=4, **TOKENS)


def _resnet() -> Any:
    return hf.ResNetConfig(embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3)


def _t5() -> Any:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return hf.T5Config(**sizes, decoder_start_token_id=62, pad_token_id=62, eos_token_id=61)


def _bart() -> Any:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _BART.items()}
    tokens = {"decoder_start_token_id": 61, "forced_eos_token_id": None}
    return hf.BartConfig(vocab_size=VOCABULARY, d_model=16, max_position_embeddings=64, **sides, **TOKENS, **tokens)


_BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}


def _deberta(kind: Any) -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 32}
    return kind(**ENCODER, position_biased_input=False, **relative)


# One line for each hub id: its tests say the class (`AutoModelForCausalLM`, ...), or it is said here.
CONFIGS: dict[str, Any] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/opt-125m": _opt,
    "facebook/opt-350m": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "peft-internal-testing/tiny-random-gpt2": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: hf.LlamaConfig(**GROUPED),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": lambda: hf.LlamaConfig(**GROUPED),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: hf.LlamaConfig(**GROUPED),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: hf.MistralConfig(**GROUPED, sliding_window=None),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": lambda: hf.Qwen3Config(**GROUPED, head_dim=4),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "trl-internal-testing/tiny-Llama4ForCausalLM": _llama4,
    "trl-internal-testing/tiny-GptOssForCausalLM": _gpt_oss,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-t5": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": lambda: hf.BertConfig(**ENCODER),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: hf.BertConfig(**ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: hf.RobertaConfig(**ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: hf.RobertaConfig(**ENCODER),
    "hf-internal-testing/tiny-random-BertModel": lambda: hf.BertConfig(**ENCODER),
    "bert-base-uncased": lambda: hf.BertConfig(**ENCODER),
    "gpt2": _gpt2,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": lambda: hf.LlamaConfig(**GROUPED),
    "peft-internal-testing/tiny-random-BloomForCausalLM": _bloom,
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": lambda: hf.GPTNeoXConfig(**TEXT, **HEADS, **TOKENS),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _t5,
    "google/flan-t5-small": _t5,
    "google/flan-t5-base": _t5,
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": _qwen3_moe,
    "hf-internal-testing/tiny-qwen3-moe": _qwen3_moe,
    "hf-internal-testing/Mixtral-tiny": lambda: hf.MixtralConfig(**GROUPED | EXPERTS),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": _resnet,
    "peft-internal-testing/tiny-random-DebertaModel": lambda: _deberta(hf.DebertaConfig),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: _deberta(hf.DebertaV2Config),
}


def is_known(model_id: str) -> bool:
    """Whether a base of this name can be built here."""
    return model_id in CONFIGS


def build(model_id: str, kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base of a hub id, of an auto class of transformers, in evaluation mode as `from_pretrained` gives it."""
    config = CONFIGS[model_id]()
    config._name_or_path = model_id
    config._experts_implementation = "eager"  # the grouped product of torch takes no float64
    torch.manual_seed(0)
    # A class of the tests' own, that does something beside, has the auto class that it is made from above it.
    auto = next(one for one in kind.__mro__ if one.__module__.startswith("transformers."))
    make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    return make(config).eval().to(dtype)
