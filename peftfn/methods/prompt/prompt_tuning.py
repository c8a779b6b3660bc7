"""Prompt tuning: trained embeddings before the input (Lester et al. 2021, https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.methods.action import OnCall
from peftfn.methods.method import Method, like_weight
from peftfn.methods.prompt import cached_calls, insert_tokens, prompt_config, prompt_input, prompt_rows
from peftfn.methods.prompt.model_call import Call
from peftfn.methods.prompt.prompt_config import PromptLearningConfig
from peftfn.methods.slots import Slot
from peftfn.methods.traits import Files, Targets
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Site


@dataclasses.dataclass(frozen=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning's config, with PEFT's fields and defaults.

    Attributes:
        prompt_tuning_init: `"RANDOM"` (standard normal), `"SAMPLE_VOCAB"` (embeddings of random tokens) or `"TEXT"`.
        prompt_tuning_init_text: for `"TEXT"`: tokenized, then repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: for `"TEXT"`: a folder or hub id.
        tokenizer_kwargs: for `"TEXT"`: arguments of `AutoTokenizer.from_pretrained`; `trust_remote_code` is dropped.

    Raises:
        ValueError: the init is unknown, `"TEXT"` lacks its text or tokenizer, or another init has `tokenizer_kwargs`.

    Example:
        >>> import peftfn as pf
        >>> pf.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM").prompt_tuning_init
        'RANDOM'
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    starts: ClassVar[tuple[str, ...]] = ("RANDOM", "SAMPLE_VOCAB", "TEXT")

    prompt_tuning_init: str = dataclasses.field(
        default="RANDOM", metadata={"help": "RANDOM, SAMPLE_VOCAB (random tokens) or TEXT."}
    )
    prompt_tuning_init_text: str | None = dataclasses.field(
        default=None, metadata={"help": "The text that a prompt of TEXT starts as."}
    )
    tokenizer_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "Tokenizer of that text: a folder or hub id."}
    )
    tokenizer_kwargs: Mapping[str, Any] | None = dataclasses.field(
        default=None, metadata={"help": "Arguments of its from_pretrained."}
    )

    def __post_init__(self) -> None:
        init = self.prompt_tuning_init
        object.__setattr__(self, "prompt_tuning_init", str(getattr(init, "value", init)))  # PEFT has an enum
        super().__post_init__()
        if self.prompt_tuning_init not in self.starts:
            raise ValueError(f"prompt_tuning_init={init!r}; expected one of {', '.join(map(repr, self.starts))}.")
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ValueError(f"prompt_tuning_init='TEXT' needs {name}; it is {getattr(self, name)!r}.")
        elif self.tokenizer_kwargs:
            raise ValueError(f"tokenizer_kwargs are for prompt_tuning_init='TEXT'; it is {self.prompt_tuning_init!r}.")


def init(
    config: PromptTuningConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> Leaf:
    """The prompt, (tokens, dim), in float32 unless `dtype` says otherwise."""
    weight = prompt_config.table(site.layer)
    assert config.token_dim is not None, "resolve has filled it in"
    if config.prompt_tuning_init == "RANDOM":
        prompt = torch.randn(config.rows, config.token_dim, generator=generator)
    elif config.prompt_tuning_init == "SAMPLE_VOCAB":
        ids = torch.randint(weight.shape[0], (config.rows,), generator=generator)
        prompt = rows_of(site.layer, ids)
    else:
        prompt = rows_of(site.layer, _text_ids(config))
    return {"prompt_embeddings": like_weight(prompt, weight, dtype)}


def rows_of(model: nn.Module, ids: Tensor) -> Tensor:
    """(tokens, dim): the embeddings of these tokens."""
    embedding: Any = prompt_input.embedding(model)
    if embedding.weight.is_meta:
        raise ValueError(
            "this start reads the model's embeddings, and the model is on the meta device; load its weights, or, of "
            "prompt tuning, use 'RANDOM'."
        )
    with torch.no_grad():
        return embedding(ids.to(embedding.weight.device)).clone()


def _text_ids(config: PromptTuningConfig) -> Tensor:
    from transformers import AutoTokenizer

    # A config may come from anywhere: it does not get to run code.
    given = {name: value for name, value in (config.tokenizer_kwargs or {}).items() if name != "trust_remote_code"}
    load = cast("Callable[..., Any]", AutoTokenizer.from_pretrained)
    ids: list[int] = load(config.tokenizer_name_or_path, **given)(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} gives no token; write some text.")
    return torch.tensor([ids[number % len(ids)] for number in range(config.rows)])


def forward(config: PromptLearningConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """The call with the prompt before its input."""
    return prompted(config, leaf, site, call)


def prompted(config: PromptLearningConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """The call with a prompt before its input; a decoder's, with the encoder's longer output.

    Args:
        config: of a stack, one with the longest prompt.
        leaf: the prompt (tokens, dim), or one for each row (rows, tokens, dim); and of how many tokens, if they differ.
        site: the model.
        call: a call of it.
    """
    model, prompt = site.layer, leaf["prompt_embeddings"]
    tokens = prompt[..., : config.num_virtual_tokens, :]
    added = prompt_rows.added(model, tokens.shape[-2], leaf, at_end=not prompt_rows.reads_last(model))
    if prompt_config.is_encoder_decoder(model) and call.given.get(hf.ENCODED) is not None:
        return cached_calls.with_encoded(call, added)
    if call.first:
        prompt_config.refuse_pictures(model, call.given)
        caches.make_room(call.cache, added.places, getattr(model, "config", None))
    after = insert_tokens.with_tokens(call, tokens, added, lambda ids: prompt_input.embed(model, ids), config.task_type)
    return prompt_rows.with_positions(model, call, after, added)


METHOD = Method(
    config=PromptTuningConfig,
    slots={"prompt_embeddings": Slot(), insert_tokens.LENGTH: Slot(trained=False)},
    init=init,
    action=OnCall(forward, prompt_input.check, prompt_rows.disabled, prompt_input.call_sites),
    targets=Targets(prompt_input.resolve, prompt_config.sites),
    stacking=prompt_rows.STACKING,
    files=Files(prompt_config.check_rows),
)
