"""What transformers calls things is what peftfn looks for: each test fails with a sentence that says what changed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from bases import BASES, WIDE
from torch import nn
from transformers import masking_utils
from transformers.generation import GenerationMixin

from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.models import transformers_positions as counted

VERSION = f"transformers {transformers.__version__}"
ANNOTATED = ("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BertModel", "Mamba2ForCausalLM")
BY_NAME = {"XLNetLMHeadModel": "mems", "RwkvForCausalLM": "state", "ReformerModelWithLMHead": "past_buckets_states"}
"""Models that annotate no cache."""

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, **WIDE}


def names(cls: type) -> set[str]:
    return set(inspect.signature(inspect.unwrap(cls.forward)).parameters)


@pytest.mark.parametrize("name", ANNOTATED)
def test_the_cache_is_an_argument_annotated_as_one(name: str) -> None:
    cls = getattr(transformers, name)
    found = hf.annotated_cache(cls)
    assert found in names(cls), (
        f"{VERSION} renamed the cache argument's type: {name}.forward has no argument annotated Cache"
    )


def test_a_model_that_annotates_none_calls_it_as_its_layers_do() -> None:
    model = transformers.RobertaForCausalLM(transformers.RobertaConfig(**SIZES, is_decoder=True))
    if not transformers.__version__.startswith("4."):  # 4 annotates it
        assert hf.annotated_cache(type(model)) is None
    assert hf.cache_argument(model) == hf.annotated_cache(transformers.RobertaModel), (
        f"{VERSION} calls the cache of RobertaForCausalLM.forward otherwise than that of the model inside it"
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_states_that_are_no_cache_of_transformers_have_the_names_that_are_listed(name: str) -> None:
    cls = getattr(transformers, name)
    assert BY_NAME[name] in names(cls), (
        f"{VERSION}: {name}.forward has no argument {BY_NAME[name]}; list its new name in transformers_names._STATES"
    )
    with torch.device("meta"):
        model = cls(cls.config_class(is_decoder=True))
    assert hf.cache_argument(model) == BY_NAME[name]
    assert not hf.keeps_keys(model)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (transformers.LlamaForCausalLM, (hf.IDS, hf.EMBEDS, hf.MASK, hf.POSITIONS, hf.LABELS, hf.USE_CACHE)),
        (transformers.BertForQuestionAnswering, (hf.IDS, hf.EMBEDS, hf.MASK, hf.TOKEN_TYPES, *hf.ANSWERS)),
        (transformers.BartForConditionalGeneration, ("decoder_input_ids", "decoder_attention_mask")),
        (transformers.models.bart.modeling_bart.BartDecoder, (hf.ENCODED, hf.ENCODED_MASK)),
    ],
)
def test_arguments_have_the_names_that_are_listed(cls: type, arguments: tuple[str, ...]) -> None:
    gone = [name for name in arguments if name not in names(cls)]
    assert not gone, f"{VERSION} renamed arguments of {cls.__name__}.forward: it has no {', '.join(gone)}"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_output_is_known_to_hold_a_cache_and_how_many_tokens_it_has(name: str) -> None:
    model: Any = BASES[name].make()
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    batch |= {"decoder_input_ids": batch["input_ids"]} if name == "t5" else {}
    output = model(**batch, use_cache=True)
    held = [value for value in output.values() if caches.is_cache(value)]
    assert len(held) == 1, f"{VERSION}: the output of {name} has {len(held)} values whose class is a Cache"
    assert caches.length(held[0]) == 3
    assert not caches.is_empty(held[0])
    left = caches.without_caches(output)
    assert set(output) - set(left) == {hf.cache_argument(model)}, f"{VERSION} calls the cache otherwise in the output"


def test_a_new_cache_is_empty_and_full_after_a_call() -> None:
    for name, sizes in (("Llama", {}), ("Mamba2", {"head_dim": 8, "num_heads": 4, "state_size": 8, "n_groups": 1})):
        config = getattr(transformers, f"{name}Config")(**SIZES | sizes)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        cache = caches.new_cache(config)
        assert caches.is_empty(cache)
        output = model(torch.tensor([[5, 6, 7]]), use_cache=True)
        assert not caches.is_empty(output[hf.cache_argument(model)]), (
            f"{VERSION}: nobody sees that {name}'s cache is used"
        )


def test_a_static_cache_says_how_much_it_holds() -> None:
    config = transformers.LlamaConfig(**SIZES)
    cache = transformers.StaticCache(config=config, max_cache_len=5)
    assert caches.capacity(cache) == 5, f"{VERSION}: a layer of a static cache does not say its max_cache_len"
    caches.make_room(cache, 3, config)
    assert caches.capacity(cache) == 8
    model = transformers.LlamaForCausalLM(config).eval()
    model(torch.tensor([[5, 6, 7]]), **{hf.cache_argument(model): cache})
    caches.make_room(cache, 3, config)
    assert caches.capacity(cache) == 8, f"{VERSION}: a layer of a static cache does not say that it has its memory"
    assert caches.length(cache) == 3


def test_generate_asks_the_model_for_its_masks() -> None:
    asked = inspect.getsource(GenerationMixin.prepare_inputs_for_generation)
    assert f'"{hf.GENERATION_MASKS}"' in asked, f"{VERSION}: generate no longer asks {hf.GENERATION_MASKS} for masks"
    assert hf.wants_whole_mask(transformers.BloomForCausalLM) or not hasattr(
        transformers.BloomForCausalLM, hf.GENERATION_MASKS
    )
    assert not hf.wants_whole_mask(transformers.LlamaForCausalLM)


def test_attention_is_chosen_by_the_names_that_are_listed() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    assert getattr(model.config, hf.ATTENTION) in ("sdpa", "eager"), (
        f"{VERSION}: a model's config has no {hf.ATTENTION} that says which attention it has"
    )
    assert hasattr(model, hf.KNOWS_SDPA), f"{VERSION}: a model no longer says by {hf.KNOWS_SDPA} whether it has sdpa"
    missing = [name for name in ("sdpa_mask", "eager_mask") if not hasattr(masking_utils, name)]
    assert not missing, f"{VERSION}: its masking_utils has no {', '.join(missing)}, which make the masks under vmap"
    home = inspect.getmodule(type(model))
    assert hasattr(home, hf.ATTENTIONS), (
        f"{VERSION}: the module of Llama has no {hf.ATTENTIONS}, where it finds its attention"
    )


@pytest.mark.skipif(not hasattr(transformers, "HunYuanVLModel"), reason="this transformers has no HunYuan-VL")
def test_positions_in_space_are_known_to_go_on_or_to_begin_anew_in_each_picture() -> None:
    for cls, goes_on in ((transformers.Qwen2VLModel, True), (transformers.HunYuanVLModel, False)):
        count = type("Counting", (nn.Module,), {"get_rope_index": cls.get_rope_index})()
        assert counted.counts_on(count) is goes_on, f"{VERSION}: {cls.__name__}.get_rope_index has other variables"
    assert not counted.counts_on(nn.Linear(1, 1))
