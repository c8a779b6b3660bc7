"""PEFT's default modules of (IA)³, by `config.model_type` (as of PEFT 0.21): all of them, and the feedforward ones."""

from __future__ import annotations

from collections.abc import Sequence

_KEY_VALUE_DOWN = ("k_proj", "v_proj", "down_proj")
_QUERY_VALUE_DOWN = ("q_proj", "v_proj", "down_proj")
_DOWN = ("down_proj",)
_H_TO_H = ("dense_4h_to_h",)

TARGETS: dict[str, Sequence[str] | str] = {
    "t5": ("k", "v", "wo"),
    "mt5": ("k", "v", "wi_1"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "mlp.c_proj")),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    **dict.fromkeys(("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), ("query_key_value", *_H_TO_H)),
    **dict.fromkeys(("bert", "roberta"), ("key", "value", "output.dense")),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    **dict.fromkeys(("bart", "phi"), ("q_proj", "v_proj", "fc2")),
    **dict.fromkeys(("llama", "mistral"), _KEY_VALUE_DOWN),
    "mixtral": ("k_proj", "v_proj", "w2"),
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QUERY_VALUE_DOWN),
    "deberta": ("in_proj", "output.dense"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
}

FEEDFORWARD: dict[str, Sequence[str]] = {
    "t5": ("wo",),
    "mt5": (),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    "bloom": ("mlp.dense_4h_to_h",),
    **dict.fromkeys(("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), _H_TO_H),
    **dict.fromkeys(("bert", "roberta", "deberta", "deberta-v2"), ("output.dense",)),
    **dict.fromkeys(("opt", "bart", "phi"), ("fc2",)),
    "gptj": ("fc_out",),
    "gpt_neo": ("c_proj",),
    **dict.fromkeys(("llama", "llama4", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _DOWN),
    "mixtral": ("w2",),
}
