"""`load_with_model` against PEFT's AutoPeftModelFor..., on folders that PEFT and this library wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bases import BASES, WORDS, bert, llama, t5, text
from oracle import distance, quiet_peft, randomise, randomised
from same import assert_same, assert_same_tensors, assert_says
from tokenizers import Tokenizer, models
from torch import Tensor, nn

import peftfn as pf
from peftfn.checkpoints import load_with_model

CLOSE = 1e-5  # the same products, added up in another order

PEFT_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "CAUSAL_LM": "ForCausalLM",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
    None: "",
}
BUILD: dict[str | None, tuple[Any, list[str]]] = {
    "SEQ_CLS": (bert(), ["query"]),
    "SEQ_2_SEQ_LM": (t5, ["q"]),
    "CAUSAL_LM": (llama(), ["q_proj"]),
    "TOKEN_CLS": (bert("ForTokenClassification"), ["query"]),
    "QUESTION_ANS": (bert("ForQuestionAnswering"), ["query"]),
    "FEATURE_EXTRACTION": (bert("Model"), ["query"]),
    None: (bert("ForMaskedLM"), ["query"]),
}


def seeded(build: Any) -> Any:
    torch.manual_seed(1)
    return build().eval()


def on_disk(task: str | None, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The base of a task as `from_pretrained` gives it, and the options of an adapter."""
    build, names = BUILD[task]
    seeded(build).save_pretrained(folder)
    loader = getattr(transformers, load_with_model.CLASSES[task]) if task else transformers.BertForMaskedLM
    return loader.from_pretrained(folder), {"r": 2, "target_modules": names, "task_type": task}


def batch_of(task: str | None) -> dict[str, Tensor]:
    return BASES["t5"].inputs() if task == "SEQ_2_SEQ_LM" else text()


def outputs(result: Any) -> Tensor:
    """All numbers of a model's output, as one tensor."""
    found = [value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return torch.cat([tensor.flatten() for tensor in found])


@pytest.mark.parametrize("task", BUILD, ids=str)
def test_what_peft_saved_gives_what_peft_loads(task: str | None, tmp_path: Path) -> None:
    base, options = on_disk(task, tmp_path / "base")
    with quiet_peft():
        model = peft.get_peft_model(base, peft.LoraConfig(**options))
        randomise(model)
        model.save_pretrained(tmp_path / "adapter")
        expected = getattr(peft, f"AutoPeftModel{PEFT_CLASSES[task]}").from_pretrained(tmp_path / "adapter").eval()
    found, adapter = pf.load_with_model(tmp_path / "adapter")
    assert type(found) is type(expected.get_base_model())
    assert not found.training
    batch = batch_of(task)
    theirs = expected.get_base_model()(**batch)  # the wrapper of QUESTION_ANS drops token_type_ids
    assert distance(outputs(pf.apply(found, adapter, batch)), outputs(theirs)) < CLOSE


@pytest.mark.parametrize("task", BUILD, ids=str)
def test_what_we_saved_comes_back(task: str | None, tmp_path: Path) -> None:
    base, options = on_disk(task, tmp_path / "base")
    adapter = randomised(pf.init(base, pf.LoraConfig(**options)))
    pf.save(adapter, tmp_path / "adapter")
    found, again = pf.load_with_model(tmp_path / "adapter")
    assert type(found) is type(base)
    assert_same_tensors(dict(found.state_dict()), dict(base.state_dict()))
    batch = batch_of(task)
    assert torch.equal(outputs(pf.apply(found, again, batch)), outputs(pf.apply(base, adapter, batch)))


def saved(folder: Path, **changes: Any) -> Path:
    """An adapter on a causal model, both on disk; its config with changes."""
    base, options = on_disk("CAUSAL_LM", folder / "base")
    adapter = randomised(pf.init(base, pf.LoraConfig(**options)))
    return pf.save(adapter.replace(config=dataclasses.replace(adapter.config, **changes)), folder / "adapter")


def test_options_class_and_base_can_be_given(tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model_name_or_path=None, task_type=None, auto_mapping=None)
    found, adapter = pf.load_with_model(
        folder, transformers.LlamaForCausalLM, base=tmp_path / "base", dtype=torch.bfloat16
    )
    assert found.dtype == torch.bfloat16
    assert adapter.params["model.layers.0.self_attn.q_proj"]["lora_A"].dtype == torch.float32
    assert pf.apply(found, adapter, text()).logits.dtype == torch.bfloat16


def test_an_adapter_of_its_own_name_is_found(tmp_path: Path) -> None:
    pf.save(pf.load(saved(tmp_path)), tmp_path / "several" / "mine")
    _, adapter = pf.load_with_model(tmp_path / "several", adapter_name="mine")
    assert adapter.params


def tokenizer(words: int) -> Any:
    vocabulary = {f"w{number}": number for number in range(words)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    )


def test_the_vocabulary_follows_a_larger_tokenizer_beside_the_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tokenizer(WORDS - 3).save_pretrained(folder)
    assert pf.load_with_model(folder)[0].get_input_embeddings().weight.shape[0] == WORDS
    tokenizer(WORDS + 3).save_pretrained(folder)
    state = torch.get_rng_state()
    (model, _), (again, _) = pf.load_with_model(folder), pf.load_with_model(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == WORDS + 3
    assert_same_tensors(dict(model.state_dict()), dict(again.state_dict()))
    with quiet_peft():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert theirs.get_input_embeddings().weight.shape[0] == WORDS + 3


def test_the_vocabulary_follows_an_embedding_that_was_saved_with_the_adapter(tmp_path: Path) -> None:
    """PEFT needs the tokenizer for it, and fails where the size was rounded up."""
    base, options = on_disk("CAUSAL_LM", tmp_path / "base")
    base.resize_token_embeddings(WORDS + 24)
    config = pf.LoraConfig(**options, modules_to_save=["embed_tokens", "lm_head"])
    adapter = randomised(pf.init(base, config))
    tokenizer(WORDS + 3).save_pretrained(pf.save(adapter, tmp_path / "adapter"))
    model, again = pf.load_with_model(tmp_path / "adapter")
    batch = text()
    assert torch.equal(pf.apply(model, again, batch).logits, pf.apply(base, adapter, batch).logits)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_number_of_labels_follows_the_saved_head(task: str, tmp_path: Path) -> None:
    """The base's folder holds no head, or one of two labels; PEFT has to be told the number."""
    head = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}[task]
    seeded(bert("Model")).save_pretrained(tmp_path / "bare")
    seeded(bert(head)).save_pretrained(tmp_path / "two")
    for name in ("bare", "two"):
        loader = getattr(transformers, load_with_model.CLASSES[task])
        base = loader.from_pretrained(tmp_path / name, num_labels=5, ignore_mismatched_sizes=True)
        config = pf.LoraConfig(r=2, target_modules=["query"], task_type=task)
        adapter = randomised(pf.init(base, config))
        model, again = pf.load_with_model(pf.save(adapter, tmp_path / f"adapter of {name}"))
        assert model.config.num_labels == 5
        batch = text()
        assert torch.equal(pf.apply(model, again, batch).logits, pf.apply(base, adapter, batch).logits)


def in_cache(cache: Path, name: str, commit: str, ref: str) -> Path:
    """Where a commit of a hub repository is in a cache as huggingface_hub lays it out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return repository / "snapshots" / commit


@pytest.mark.parametrize("where", [{}, {"subfolder": "deep"}], ids=str)
def test_hub_ids_and_revisions_are_followed_offline(where: dict[str, str], tmp_path: Path) -> None:
    base, options = on_disk("CAUSAL_LM", in_cache(tmp_path, "org/base", "1" * 40, "v1"))
    BASES["llama tied"].make().save_pretrained(in_cache(tmp_path, "org/base", "2" * 40, "main"))
    config = pf.LoraConfig(**options, base_model_name_or_path="org/base", revision="v1")
    adapter = randomised(pf.init(base, config))
    snapshot = in_cache(tmp_path, "org/adapter", "3" * 40, "main")
    pf.save(adapter, snapshot / where.get("subfolder", ""))
    model, again = pf.load_with_model("org/adapter", cache_dir=tmp_path, **where)
    assert_same_tensors(dict(model.state_dict()), dict(base.state_dict()))
    assert_same(again, adapter)
    tokenizer(WORDS + 3).save_pretrained(snapshot)
    model, _ = pf.load_with_model("org/adapter", cache_dir=tmp_path, **where)
    assert model.get_input_embeddings().weight.shape[0] == WORDS + 3


def test_a_class_that_is_imported_can_be_the_base_s(tmp_path: Path) -> None:
    base, options = on_disk("CAUSAL_LM", tmp_path / "base")
    adapter = pf.init(base, pf.LoraConfig(**options | {"task_type": None}))
    assert adapter.config.auto_mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    mapping = {"base_model_class": "OwnLlama", "parent_library": __name__}
    config = dataclasses.replace(adapter.config, auto_mapping=mapping)
    model, _ = pf.load_with_model(pf.save(adapter.replace(config=config), tmp_path / "adapter"))
    assert type(model) is OwnLlama


class OwnLlama(transformers.LlamaForCausalLM):
    """A class outside transformers."""


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({"base_model_name_or_path": None}, "ValueError: names no base (base_model_name_or_path is empty"),
    "a base that is gone": (
        {"base_model_name_or_path": "/nowhere/at all"},
        "FileNotFoundError: '/nowhere/at all', which is no folder here; pass base=",
    ),
    "a base that the hub would have": (
        {"base_model_name_or_path": "no-one/no-such-model"},
        "FileNotFoundError: is for the base 'no-one/no-such-model', which AutoModelForCausalLM could not load",
    ),
    "neither task nor class": (
        {"task_type": None, "auto_mapping": None},
        "ValueError: has neither a task_type nor an auto_mapping",
    ),
    "a class that is not there": (
        {"task_type": None, "auto_mapping": {"base_model_class": "Gone", "parent_library": "transformers.gone"}},
        "ValueError: is for a Gone of 'transformers.gone' (auto_mapping)",
    ),
    "a library that is not imported": (
        {"task_type": None, "auto_mapping": {"base_model_class": "Anti", "parent_library": "antigravity"}},
        "ValueError: import its library first, or pass cls=",
    ),
    "something that is no model": (
        {"task_type": None, "auto_mapping": {"base_model_class": "Path", "parent_library": "pathlib"}},
        "ValueError: which is no class with from_pretrained",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_config_is_said(name: str, tmp_path: Path) -> None:
    changes, said = WRONG[name]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        pf.load_with_model(saved(tmp_path, **changes))
    assert_says(caught, said)


def test_an_unknown_task_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task_type": "JUGGLING"}))
    with pytest.raises(ValueError, match="task_type='JUGGLING' is unknown; expected one of SEQ_CLS"):
        pf.load_with_model(folder)


def test_a_class_without_from_pretrained_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a class with from_pretrained"):
        pf.load_with_model(saved(tmp_path), nn.Linear)


def test_an_adapter_in_the_base_s_own_folder_is_said(tmp_path: Path) -> None:
    """transformers finds it there and puts it into the model: it would act twice."""
    saved(tmp_path)
    adapter = pf.load(tmp_path / "adapter")
    pf.save(adapter, tmp_path / "base")
    with quiet_peft(), pytest.raises(ValueError, match="holds an adapter too"):
        pf.load_with_model(tmp_path / "base")


def test_an_adapter_for_another_base_is_said(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    seeded(llama(hidden_size=32)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"lora_A \(2, 16\)"):
        pf.load_with_model(folder, base=tmp_path / "wide")
