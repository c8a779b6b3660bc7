"""Prompt methods asked for what cannot be: one clear error, before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoding
import oracle
import pytest
import torch
import transformers
from bases import BASES
from checkpoints import enable
from prompts import Case
from safetensors.torch import load_file, save_file
from same import assert_same, on_disk
from torch import nn

import peftfn as pf

TOKENS = {"num_virtual_tokens": 3}
PROMPT = pf.PromptTuningConfig(**TOKENS)


def vit() -> nn.Module:
    return BASES["vit"].make()


def gpt2() -> nn.Module:
    return BASES["gpt2"].make()


def of_tiny(name: str, **sizes: Any) -> nn.Module:
    """A model that writes, without weights."""
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**small, **{"num_attention_heads": 2, **sizes})
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(config)


SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA_3N: dict[str, Any] = {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 4, "laurel_rank": 4}
GEMMA_3N |= {"num_key_value_heads": 1, "head_dim": 8, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}
GEMMA_3N |= {"intermediate_size": [24, 24], "activation_sparsity_pattern": [0.0, 0.0]}


def gemma3n() -> nn.Module:
    with torch.device("meta"):
        return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**SMALL | GEMMA_3N))


def musicgen() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.MusicgenForCausalLM(transformers.MusicgenDecoderConfig(**sizes))


LATENT: dict[str, Any] = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}


def checkpointed(use_reentrant: bool, build: Callable[[], nn.Module] = gpt2) -> nn.Module:
    """The model with checkpoints on, in training, without dropout."""
    model = enable(build(), use_reentrant)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


IDS = {"input_ids": torch.randint(0, 40, (2, 4))}

MAMBA = "Mamba2Model.forward has no argument for a cache of keys and values"
if decoding.cache_name(transformers.Mamba2Model) == "cache":  # from transformers 5.24 on one class of cache holds both
    MAMBA = "2 layers of Mamba2ForCausalLM keep something else than keys and values"

INITS: dict[str, tuple[Callable[[], nn.Module], pf.PeftConfig]] = {
    "num_virtual_tokens is None; expected a positive integer": (gpt2, pf.PromptTuningConfig()),
    "adapter_len is None": (gpt2, pf.AdaptionPromptConfig(adapter_layers=1)),
    "adapter_layers=9, and GPT2LMHeadModel has 2 such layers": (
        gpt2,
        pf.AdaptionPromptConfig(adapter_len=2, adapter_layers=9),
    ),
    "is of model type 't5'; LLaMA-Adapter knows gpt2, llama, mistral": (
        BASES["t5"].make,
        pf.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
    ),
    "ViTModel.forward has no argument for a cache of keys and values": (vit, pf.PrefixTuningConfig(**TOKENS)),
    MAMBA: (
        lambda: of_tiny("Mamba2", head_dim=8, num_heads=4, state_size=8, n_groups=1),
        pf.PrefixTuningConfig(**TOKENS),
    ),
    f"1 layers of Qwen3Next{'Model' if oracle.IS_OLD else 'ForCausalLM'} keep something else than keys and values": (
        lambda: of_tiny("Qwen3Next", layer_types=["linear_attention", "full_attention"], num_experts=0),
        pf.PrefixTuningConfig(**TOKENS),
    ),
    "layers of DeepseekV3ForCausalLM keep keys of": (
        lambda: of_tiny("DeepseekV3", **LATENT),
        pf.PrefixTuningConfig(**TOKENS),
    ),
    "EsmModel embeds a token by more than its row (its config has token_dropout)": (
        lambda: transformers.EsmModel(transformers.EsmConfig(**SMALL, pad_token_id=0)),
        PROMPT,
    ),
    "Gemma3nTextDecoderLayer in Gemma3nForCausalLM reads token ids": (gemma3n, PROMPT),
    "XLMModel goes on from a cache a token at a time, or by lengths of its own": (
        lambda: transformers.XLMModel(transformers.XLMConfig(n_words=40, emb_dim=16, n_layers=2, n_heads=2)),
        pf.PrefixTuningConfig(**TOKENS),
    ),
    "has 4 input embeddings, one for each of its vocabularies": (musicgen, PROMPT),
    "Sequential takes no inputs_embeds": (BASES["mlp"].make, PROMPT),
    "takes no inputs_embeds": (vit, PROMPT),
    "task_type='SEQ_2_SEQ_LM' is for an encoder-decoder, and GPT2LMHeadModel is none": (
        gpt2,
        pf.PromptTuningConfig(**TOKENS, task_type="SEQ_2_SEQ_LM"),
    ),
}
"""What `init` says, by model and config."""

LONGFORMER = {"attention_window": 4, "sep_token_id": 2, "intermediate_size": 24}
INITS["LongformerForQuestionAnswering finds the question in its token ids"] = (
    lambda: transformers.LongformerForQuestionAnswering(transformers.LongformerConfig(**SMALL, **LONGFORMER)),
    PROMPT,
)


def blt() -> nn.Module:
    half: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    half |= {"intermediate_size": 24}
    names = ("encoder_config", "decoder_config", "global_config", "patcher_config")
    with torch.device("meta"):
        return transformers.BltForCausalLM(transformers.BltConfig(vocab_size=40, **dict.fromkeys(names, half)))


def esmc() -> nn.Module:
    config = transformers.EsmcConfig(**SMALL, intermediate_size=24)
    with torch.device("meta"):
        return transformers.EsmcForSequenceClassification(config)


if hasattr(transformers, "BltForCausalLM"):
    INITS["BltForCausalLM embeds a token by more than its row (its config has encoder_hash_byte_group_size)"] = (
        blt,
        PROMPT,
    )
    said = "BltConfig: transformers makes no cache" if oracle.IS_OLD else "BltForCausalLM has a cache of two halves"
    INITS[said] = (blt, pf.PrefixTuningConfig(**TOKENS))
if hasattr(transformers, "EsmcForSequenceClassification"):
    INITS["EsmcModel in EsmcForSequenceClassification takes no inputs_embeds"] = (esmc, PROMPT)


@pytest.mark.parametrize("said", INITS)
def test_a_model_or_a_config_that_does_not_fit_is_one_clear_error(said: str) -> None:
    build, config = INITS[said]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # what it says is asserted below
        pf.init(build(), config)
    assert said in str(caught.value)


CONFIGS: dict[str, Callable[[], Any]] = {
    "num_virtual_tokens=0): expected a positive integer": lambda: pf.PromptTuningConfig(num_virtual_tokens=0),
    "prompt_tuning_init='WORDS'; expected one of 'RANDOM'": lambda: pf.PromptTuningConfig(prompt_tuning_init="WORDS"),
    "prompt_tuning_init='TEXT' needs tokenizer_name_or_path": lambda: pf.PromptTuningConfig(prompt_tuning_init="TEXT"),
    "tokenizer_kwargs are for prompt_tuning_init='TEXT'": lambda: pf.PromptTuningConfig(tokenizer_kwargs={"a": 1}),
    "encoder_reparameterization_type='GRU'; expected 'MLP' or 'LSTM'": lambda: pf.PromptEncoderConfig(
        encoder_reparameterization_type="GRU"
    ),
    "encoder_num_layers=0": lambda: pf.PromptEncoderConfig(encoder_num_layers=0),
    "init_weights='one'; expected None or 'zero'": lambda: pf.PrefixTuningConfig(init_weights="one"),
    "AdaptionPromptConfig(adapter_len=-1)": lambda: pf.AdaptionPromptConfig(adapter_len=-1),
}


@pytest.mark.parametrize("said", CONFIGS)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # what it says is asserted below
        CONFIGS[said]()
    assert said in str(caught.value)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix", "adaption prompt"])
def test_merge_says_that_there_is_no_weight_to_change(method: str, tmp_path: Path) -> None:
    model = gpt2()
    adapter = pf.init(model, Case("gpt2", method).config(pf))
    with pytest.raises(ValueError, match=r"changes what the model is given, not its weights, so it cannot be merged"):
        pf.merge(dict(model.named_parameters()), adapter)
    with pytest.raises(ValueError, match=r"cannot be merged"):
        pf.bind(model, (adapter, adapter)).save_pretrained(tmp_path / "nowhere", merge=True)
    assert not (tmp_path / "nowhere").exists()
    pf.bind(model, adapter).save_pretrained(tmp_path)  # what can be saved is the adapter
    assert_same(pf.load(tmp_path, model), adapter)


UNLIKE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BartForCausalLM counts them in its positions (BartLearnedPositionalEmbedding)": (
        "prompt",
        "Bart",
        {"d_model": 16},
    ),
    "ConvBertModel reads them all the same (its config has head_ratio)": ("prompt", "ConvBert", {}),
    "FNetModel takes no attention_mask": ("prompt", "FNet", {}),
}
"""What is said of rows of unlike length: the method, the model, its sizes."""


@pytest.mark.parametrize("said", UNLIKE)
def test_rows_of_unlike_length_are_refused_where_masked_places_count(said: str) -> None:
    method, name, sizes = UNLIKE[said]
    sizes |= {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    halves = {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = getattr(transformers, f"{name}Config")
    if "Bart" in name:
        sizes = {"vocab_size": 40, "d_model": 16, **halves}
    kind = {"Bart": "BartForCausalLM"}.get(name, f"{name}Model")
    model = getattr(transformers, kind)(config(**sizes)).eval()
    make = {"prompt": pf.PromptTuningConfig, "prefix": pf.PrefixTuningConfig}[method]
    one, other = (pf.init(model, make(num_virtual_tokens=count)) for count in (2, 3))
    batch = IDS
    for stacked, index in ((pf.stack([one, other]), [0, 1]), (pf.stack([one, one]), [0, -1])):
        with pytest.raises(ValueError, match=re.escape(said)):
            pf.apply(model, stacked, batch, index=index)
    both = pf.apply(model, pf.stack([one, one]), batch, index=[0, 1])
    torch.testing.assert_close(both[0], pf.apply(model, one, batch)[0])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_generate_that_runs_past_the_forward_is_one_clear_error(method: str) -> None:
    class Past(transformers.GPT2LMHeadModel):
        def generate(self, inputs: Any = None, **rest: Any) -> Any:
            return self.transformer(inputs).last_hidden_state.argmax(-1)  # as BLIP-2 calls the model inside

    model = Past(gpt2().config).eval()
    make = {"prompt": pf.PromptTuningConfig, "prefix": pf.PrefixTuningConfig}[method]
    bound = pf.bind(model, pf.init(model, make(**TOKENS)))
    with pytest.raises(
        NotImplementedError, match=r"generate\(\) of Past ran a part of the model past the model's forward"
    ):
        bound.generate(IDS["input_ids"])
    assert bound(**IDS).logits.shape[1] == (7 if method == "prompt" else 4)


def test_an_argument_that_has_to_be_given_is_given_as_none() -> None:
    class Needs(transformers.GPT2LMHeadModel):
        def forward(self, input_ids: Any, attention_mask: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:
            return super().forward(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **rest)

    model = Needs(gpt2().config).eval()
    adapter = pf.init(model, PROMPT)
    plain = transformers.GPT2LMHeadModel(model.config).eval()
    plain.load_state_dict(model.state_dict())
    expected = pf.apply(plain, adapter, IDS)
    torch.testing.assert_close(pf.apply(model, adapter, IDS).logits, expected.logits)


def test_a_prefix_and_checkpointing_are_one_clear_error() -> None:
    model = checkpointed(use_reentrant=False)
    adapter = pf.init(model, Case("gpt2", "prefix").config(pf))
    for run in (lambda: pf.apply(model, adapter, IDS), lambda: pf.bind(model, adapter)(**IDS)):
        with pytest.raises(ValueError, match=r"prefix tuning and activation checkpointing do not go together"):
            run()


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "adaption prompt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_others_train_through_checkpointing(kind: str, reentrant: bool) -> None:
    case = Case("gpt2", kind)
    grads: list[list[torch.Tensor | None]] = []
    for checkpointing in (False, True):
        model: Any = checkpointed(reentrant, case.model)
        model.train(checkpointing)
        adapter = pf.init(model, case.config(pf))
        pf.leaves(adapter)
        pf.apply(model, adapter, IDS).logits.square().mean().backward()
        grads.append([tensor.grad for tensor in pf.leaves(adapter)])
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(*grads, strict=True))


def test_a_batch_without_tokens_is_one_clear_error() -> None:
    model = gpt2()
    for method in ("prompt tuning", "prefix"):
        with pytest.raises(ValueError, match="expected input_ids or inputs_embeds"):
            pf.apply(model, pf.init(model, Case("gpt2", method).config(pf)), {"labels": IDS["input_ids"]})


def test_an_argument_per_token_that_nobody_knows_is_an_error_and_not_dropped() -> None:
    class Coloured(type(gpt2())):
        def forward(self, input_ids: Any = None, colours: Any = None, inputs_embeds: Any = None, **rest: Any) -> Any:
            return super().forward(input_ids, inputs_embeds=inputs_embeds, **rest)

    model = Coloured(gpt2().config)
    with pytest.raises(ValueError, match=r"the batch has colours of shape \(2, 4\), one for each token"):
        pf.apply(model, pf.init(model, PROMPT), {**IDS, "colours": IDS["input_ids"]})


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_what_init_refuses_is_refused_of_an_adapter_that_was_made_elsewhere(method: str, tmp_path: Path) -> None:
    make = {"prompt": pf.PromptTuningConfig, "prefix": pf.PrefixTuningConfig}[method]
    elsewhere = transformers.BertLMHeadModel(
        transformers.BertConfig(**SMALL, intermediate_size=24, is_decoder=True, hidden_act="gelu")
    )
    pf.save(pf.init(elsewhere, make(**TOKENS)), tmp_path)
    model = transformers.EsmModel(transformers.EsmConfig(**SMALL, pad_token_id=0))
    adapter = pf.load(tmp_path)
    said = {"prompt": "EsmModel embeds a token by more than", "prefix": "EsmModel.forward has no argument for a cache"}
    for run in (lambda: pf.apply(model, adapter, IDS), lambda: pf.bind(model, adapter)):
        with pytest.raises(ValueError, match=re.escape(said[method])):
            run()


def test_a_prompt_for_another_width_is_one_clear_error() -> None:
    adapter = pf.init(gpt2(), PROMPT)
    wide = adapter.replace(params={"": {"prompt_embeddings": torch.zeros(3, 99)}})
    with pytest.raises(ValueError, match=r"has prompt_embeddings \(3, 99\), expected \(tokens, 16\)"):
        pf.apply(gpt2(), wide, IDS)
    prefix = pf.init(gpt2(), pf.PrefixTuningConfig(**TOKENS))
    with pytest.raises(ValueError, match=r"has a prefix of width 64, expected 32"):
        pf.apply(BASES["llama"].make(), prefix, IDS)


@pytest.mark.parametrize("fault", ["shorter", "unknown key", "no prompt"])
def test_a_file_that_is_not_whole_is_one_clear_error(fault: str, tmp_path: Path) -> None:
    folder = pf.save(pf.init(gpt2(), PROMPT), tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    said = {
        "shorter": ("prompt_embeddings of 2 rows, and its config says 3", {k: t[:2] for k, t in tensors.items()}),
        "unknown key": ("has the key 'colour'", tensors | {"colour": torch.zeros(1)}),
        "no prompt": ("expected prompt_embeddings", {"base_model.classifier.weight": torch.zeros(1)}),
    }
    save_file({key: t.contiguous() for key, t in said[fault][1].items()}, file)
    before = on_disk(tmp_path)
    with pytest.raises((KeyError, ValueError)) as caught:
        pf.load(folder)
    assert said[fault][0] in str(caught.value)
    assert on_disk(tmp_path) == before


def test_two_kinds_at_once_work_in_apply_bind_and_files(tmp_path: Path) -> None:
    model = BASES["llama"].make()
    configs = {
        "prompt": pf.PromptTuningConfig(**TOKENS, task_type="CAUSAL_LM"),
        "lora": pf.LoraConfig(r=2),
        "ia3": pf.IA3Config(),
        "encoder": pf.PromptEncoderConfig(**TOKENS, task_type="CAUSAL_LM"),
        "adaption": pf.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
    }
    made = {name: pf.init(model, config) for name, config in configs.items()}
    batch = BASES["llama"].inputs()
    for pair in (("lora", "prompt"), ("ia3", "lora"), ("prompt", "encoder"), ("adaption", "prompt")):
        adapters = tuple(made[name] for name in pair)
        kept = tuple(pf.load(pf.save(made[name], tmp_path / name), model) for name in pair)
        expected = pf.apply(model, adapters, batch).logits
        bound = pf.bind(model, adapters)
        assert torch.equal(bound(**batch).logits, expected)
        assert torch.allclose(pf.apply(model, kept, batch).logits, expected, atol=1e-6)
        trained = [p for p in bound.parameters() if p.requires_grad]
        assert len(trained) == sum(len(leaf) for one in adapters for leaf in one.params.values())
        bound(**batch).logits.square().mean().backward()
        assert all(parameter.grad is not None for parameter in trained)
