"""PEFT's default target modules of AdaLoRA, by `config.model_type` (as of PEFT 0.21)."""

from __future__ import annotations

from collections.abc import Sequence

_QV = ("q_proj", "v_proj")
_ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

TARGETS: dict[str, Sequence[str] | str] = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    **dict.fromkeys(("bart", "opt"), _ALL),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(("gptj", "gpt_neo", "llama", "llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    "bert": ("query", "value"),
    "roberta": ("query", "key", "value", "dense"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
