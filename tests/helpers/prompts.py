"""Prompt methods in both libraries: the cases, and our adapter for what a peft model holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import decoding
import oracle
import peft
import torch
import transformers
from bases import BASES, WIDE, Base, bert, ids, text
from torch import Tensor, nn

import peftfn as pf


def bloom() -> nn.Module:
    """A small random Bloom: one projection for queries, keys and values, and ALiBi in place of positions."""
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    sizes |= {"tie_word_embeddings": False}  # a random model would repeat its input
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes | WIDE))


def mistral() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2} | WIDE
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes))


def t5() -> nn.Module:
    """A small random T5 that says something: with its embedding tied to its head it would repeat what it is given."""
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    sizes |= {"tie_word_embeddings": False, "initializer_factor": 3.0, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def with_labels(make: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """The batch with its own tokens as labels."""

    def made() -> dict[str, Tensor]:
        batch = make()
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return made


HERE: dict[str, tuple[Base, str]] = {
    "llama": (BASES["llama"]._replace(batch=with_labels(text)), "CAUSAL_LM"),
    "gpt2": (BASES["gpt2"]._replace(batch=with_labels(text)), "CAUSAL_LM"),
    "bloom": (Base(bloom, with_labels(text)), "CAUSAL_LM"),
    "mistral": (Base(mistral, with_labels(text)), "CAUSAL_LM"),
    "t5": (BASES["t5"]._replace(batch=lambda: {**text(), "labels": ids(3, 4)}), "SEQ_2_SEQ_LM"),
    "bert": (BASES["bert"]._replace(batch=lambda: {**text(), "labels": torch.tensor([0, 1, 1])}), "SEQ_CLS"),
    "bert tokens": (BASES["bert tokens"], "TOKEN_CLS"),
    "bert questions": (BASES["bert questions"], "QUESTION_ANS"),
    "bert features": (Base(bert("Model"), text), "FEATURE_EXTRACTION"),
}
"""Bases by name, with their task."""

WRITERS = {**HERE, "t5": (Base(t5, text), "SEQ_2_SEQ_LM")}
"""The same, but with large weights where small ones would write the same token again and again."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 10}),
    "p-tuning by lstm": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 10, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "projected prefix": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 10},
    ),
    "adaption prompt": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2}),
}
"""peft's configs by name: class and options."""

ADAPTED = ("llama", "mistral", "gpt2")
"""Families that LLaMA-Adapter knows."""


class Case(NamedTuple):
    """One method on one base."""

    base: str
    method: str

    def __str__(self) -> str:
        return f"{self.method} on {self.base}"

    def config(self, library: Any, **more: Any) -> Any:
        """The config of either library."""
        name, options = CONFIGS[self.method]
        return getattr(library, name)(task_type=HERE[self.base][1], **options, **more)

    def model(self, writes: bool = False) -> nn.Module:
        return (WRITERS if writes else HERE)[self.base][0].make()

    def batch(self) -> Any:
        batch = HERE[self.base][0].inputs()
        return {**batch, "task_ids": torch.tensor([2, 0, 1])} if self.method == "multitask" else batch

    def theirs(self, size: float = 0.1, *, writes: bool = False) -> Any:
        """A peft model with noise in all that it trains."""
        with oracle.quiet_peft():
            model = peft.get_peft_model(self.model(writes), self.config(peft)).eval()
        oracle.randomise(model, size=size)
        return model


SOME = {"adaption prompt": ADAPTED, "multitask": ()}
"""Methods that are held against peft on some bases alone."""

CASES = [Case(base, method) for base in HERE for method in CONFIGS if base in SOME.get(method, HERE)]
OF_TASKS = [Case("llama", "multitask"), Case("bert", "multitask")]
"""Those whose batches say of which task a row is."""

if oracle.IS_OLD:  # it reads a cache of encoder and decoder by attributes that transformers 4.57 has no more
    CASES = [case for case in CASES if case.base != "t5" or "prefix" not in case.method]
if decoding.cache_name(transformers.BertModel) == "cache":  # peft 0.21.2 says that BERT takes none (transformers 5.24)
    CASES = [case for case in CASES if "bert" not in case.base or "prefix" not in case.method]


def ours(model: Any, case: Case) -> pf.Adapter:
    """Our adapter with the tensors that a peft model trains."""
    adapter = pf.init(case.model(), case.config(pf))
    params: dict[str, dict[str, Tensor]] = {}
    for name, tensor in oracle.trained(model).items():
        path, leaf = place(name, case.method)
        params.setdefault(path, {})[leaf] = tensor.detach().clone()
    assert {path: set(leaf) for path, leaf in params.items()} == {p: set(leaf) for p, leaf in adapter.params.items()}
    return adapter.replace(params={path: dict(sorted(params[path].items())) for path in sorted(params)})


def place(name: str, method: str) -> tuple[str, str]:
    """Where our adapter has what peft's model calls so."""
    if name.startswith("prompt_encoder.default."):
        own = name.removeprefix("prompt_encoder.default.").replace(".", "_")
        encoded = method in ("p-tuning", "p-tuning by lstm", "projected prefix")
        return "", {"embedding_weight": "embedding" if encoded else "prompt_embeddings"}.get(own, own)
    path, _, leaf = name.replace(".modules_to_save.default", "").rpartition(".")
    return path.removeprefix("base_model.model.").removeprefix("base_model."), leaf


def output(result: Any) -> Tensor:
    """What a model returned, as one tensor."""
    return result.last_hidden_state if "last_hidden_state" in result else oracle.outputs(result)


def saved(model: Any, folder: Path) -> Path:
    """The folder into which peft saved its model."""
    with oracle.quiet_peft():
        model.save_pretrained(folder)
    return folder
