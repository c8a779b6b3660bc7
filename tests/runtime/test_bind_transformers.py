"""`bind` with transformers' own tools: generate, pipeline, Trainer, save_pretrained."""

from __future__ import annotations

import copy
import json
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from bases import BASES, ids, llama
from binding import EXPERTS, adapter_for, flat
from oracle import IS_TRANSFORMERS_4, called, loaded, outputs, quiet_peft
from snapshot import snapshot
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import peftfn as pf

# Merging adds the delta to the weight where `apply` adds it to the output: sums in another order.
MERGED: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
TEXTS = [
    line for topic in ("assert", "lambda", "with") for line in pydoc_data.topics.topics[topic].splitlines() if line
][:24]


def tokenizer() -> Any:
    """A tokenizer of the whole words that TEXTS begin with; the rest is unknown."""
    known = dict.fromkeys(word for line in TEXTS for word in re.findall(r"\w+|[^\w\s]+", line.lower()))
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *known][:40])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # a token, and no password
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special: dict[str, Any] = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    special["model_input_names"] = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=12, padding_side="left", **special
    )


def causal() -> Any:
    """A small Llama that knows which ids are special."""
    torch.manual_seed(1)
    return llama(pad_token_id=0, bos_token_id=1, eos_token_id=1)().eval()


def base(name: str) -> Any:
    return BASES[name].make()


# --- generate and pipeline -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "length_penalty": 0.0}],
    ids=["greedy", "beams", "without cache", "more beams"],
)
def test_generate_gives_pefts_tokens(how: dict[str, Any], tmp_path: Path) -> None:
    model = causal()
    adapter = adapter_for(model, dict(target_modules=["q_proj", "v_proj", "lm_head"], lora_alpha=32))
    pf.save(adapter, tmp_path)
    prompt = {"input_ids": ids(3, 4), "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    prompt["attention_mask"][0, :2] = 0  # padded on the left
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    before = snapshot(model)
    ours, bare = pf.bind(model, adapter).generate(**prompt, **how), pf.bind(model, ()).generate(**prompt, **how)
    assert snapshot(model) == before
    assert torch.equal(ours, loaded(model, tmp_path).generate(**prompt, **how))
    assert not torch.equal(ours, bare)


def test_pipelines_take_a_bound_model() -> None:
    words, text = tokenizer(), TEXTS[3]
    classifier = base("bert")
    adapter = adapter_for(classifier, dict(target_modules=["query"], task_type="SEQ_CLS"))
    batch = dict(words(text, return_tensors="pt", truncation=True))
    expected = torch.softmax(pf.apply(classifier, adapter, batch).logits[0], dim=-1)
    classify = transformers.pipeline(
        "text-classification", model=pf.bind(classifier, adapter), tokenizer=words, top_k=None
    )
    found = {row["label"]: row["score"] for row in classify([text], truncation=True)[0]}
    assert found == pytest.approx({f"LABEL_{n}": float(p) for n, p in enumerate(expected)}, rel=1e-5)

    model = causal()
    bound = pf.bind(model, adapter_for(model, dict(target_modules=["q_proj", "lm_head"], lora_alpha=32)))
    write = transformers.pipeline("text-generation", model=bound, tokenizer=words)
    (written,) = write(text, max_new_tokens=4, do_sample=False, return_tensors=True)
    tokens = bound.generate(**words(text, return_tensors="pt"), max_new_tokens=4, do_sample=False)[0]
    assert written["generated_token_ids"] == tokens.tolist()


# --- Trainer ---------------------------------------------------------------------------------------------------------


def examples() -> list[dict[str, Any]]:
    """Real sentences with a column that no model takes, so that Trainer has to look at the model's signature."""
    words = tokenizer()
    return [{**words(line, truncation=True), "labels": n % 2, "line": line} for n, line in enumerate(TEXTS)]


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    """A Trainer of four steps; its AdamW has a large eps, as in oracle.steps."""
    given: dict[str, Any] = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 4}
    given |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "adam_epsilon": 1e-4, "save_strategy": "no"}
    given |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, **options}
    arguments = transformers.TrainingArguments(**given)
    collate = transformers.DataCollatorWithPadding(tokenizer())
    return transformers.Trainer(model, arguments, train_dataset=cast("Any", examples()), data_collator=collate)


OPTIONS: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_what_it_trains_with_peft_and_leaves_the_base_alone(checkpointing: bool, tmp_path: Path) -> None:
    model = base("bert")
    configs = copy.deepcopy((model.config.to_dict(), getattr(model, "generation_config", None)))
    adapter = adapter_for(model, OPTIONS)
    pf.save(adapter, tmp_path / "start")
    start, before = [tensor.clone() for tensor in flat(adapter)], snapshot(model)
    bound = pf.bind(model, adapter)
    on = "activation_checkpointing" if hasattr(bound, "activation_checkpointing_enable") else "gradient_checkpointing"
    with torch.random.fork_rng():
        trainer(bound, tmp_path / "ours", **{on: checkpointing}).train()
    assert snapshot(model) == before
    assert configs == (model.config.to_dict(), getattr(model, "generation_config", None))
    trained = pf.unbind(bound)
    assert all(map(torch.equal, flat(trained), flat(adapter)))
    assert not any(map(torch.equal, flat(trained), start))

    theirs = loaded(model, tmp_path / "start")
    with quiet_peft(), torch.random.fork_rng():
        trainer(theirs, tmp_path / "theirs", label_names=["labels"]).train()
        theirs.save_pretrained(tmp_path / "end")
    for one, other in zip(flat(trained), flat(pf.load(tmp_path / "end")), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_merged_model_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    model = base("bert")
    bound = pf.bind(model, adapter_for(model, OPTIONS))
    before = snapshot(model)
    bound.save_pretrained(tmp_path / "merged", merge=True)
    with (
        torch.random.fork_rng(),
        pytest.raises(RuntimeError, match=r"is not what the base has.*the adapter with peftfn\.load"),
    ):
        trainer(bound, tmp_path).train(resume_from_checkpoint=str(tmp_path / "merged"))
    assert snapshot(model) == before


def test_trainer_takes_a_bound_model_whose_base_says_that_it_is_quantized(tmp_path: Path) -> None:
    model = base("bert")
    model.is_quantized = True  # as a model from GGUF says, although its layers are plain ones
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(copy.deepcopy(model), tmp_path)
    trainer(pf.bind(model, adapter_for(model, OPTIONS)), tmp_path)


# --- save_pretrained -------------------------------------------------------------------------------------------------


class PlainConfig(transformers.PretrainedConfig):
    """Of a model of a kind that no library has."""

    model_type = "peftfn-test"


class Plain(transformers.PreTrainedModel):
    """An attention that reads its own weights, a grouped convolution, and a bare parameter."""

    config_class = PlainConfig

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.scale = nn.Parameter(torch.ones(8, 8))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 8) -> the same."""
        mixed = self.attention(x, x, x, need_weights=False)[0]
        return self.convolution(mixed.transpose(1, 2)).transpose(1, 2) @ self.scale


def odd() -> Any:
    return Plain(PlainConfig())


SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert and its head": ("bert", OPTIONS),
    "llama": ("llama", {"target_modules": "all-linear", "modules_to_save": ["norm"]}),
    "tied, untouched": ("llama tied", {"target_modules": ["q_proj"]}),
    "tied, embedding adapted": ("llama tied", {"target_modules": ["embed_tokens"]}),
    "tied, head adapted": ("llama tied", {"target_modules": ["lm_head"]}),
    "tied, embedding replaced": ("llama tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "gpt2, embedding adapted": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "t5": ("t5", {"target_modules": ["q", "wo"]}),
    "t5, head adapted": ("t5", {"target_modules": ["lm_head"]}),
    "t5, embedding adapted": ("t5", {"target_modules": ["shared", "q"]}),
    "vit": ("vit", {"target_modules": ["dense", "projection"], "modules_to_save": ["classifier"]}),
    "mixtral's experts": ("mixtral", EXPERTS),
}


@pytest.mark.parametrize(("name", "options"), SAVED.values(), ids=list(SAVED))
def test_save_pretrained_writes_a_plain_model_with_the_same_outputs(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, batch = base(name), BASES[name].inputs()
    bound = pf.bind(model, adapter_for(model, options))
    before, tied = snapshot(model), getattr(model.config, "tie_word_embeddings", None)
    state = bound.state_dict()
    if name == "t5" and IS_TRANSFORMERS_4 and "wo" not in options["target_modules"]:
        with pytest.raises(ValueError, match="weights that T5ForConditionalGeneration ties"):
            bound.save_pretrained(tmp_path / "no", merge=True)
        assert not (tmp_path / "no").exists()
        return
    bound.save_pretrained(tmp_path, merge=True)
    assert (snapshot(model), getattr(bound.config, "tie_word_embeddings", None)) == (before, tied)
    assert all(map(torch.equal, bound.state_dict().values(), state.values()))
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "generation_config.json", "model.safetensors"}
    plain, seen = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(seen.values())
    assert list(plain.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        ours, theirs = outputs(called(bound, batch)), outputs(called(plain.eval(), batch))
        assert not torch.allclose(ours, outputs(called(model, batch)), **MERGED)
    torch.testing.assert_close(theirs, ours, **MERGED)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["attention"]}, {"target_modules": ["convolution"]}, {"target_parameters": ["scale"]}],
)
def test_save_pretrained_merges_what_reads_its_own_weights(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = odd().eval(), torch.randn(3, 4, 8)
    bound = pf.bind(model, adapter_for(model, options))
    bound.save_pretrained(tmp_path, merge=True)
    plain = Plain.from_pretrained(tmp_path).eval()
    assert type(plain) is Plain
    torch.testing.assert_close(plain(x), bound(x), **MERGED)
    assert not torch.allclose(plain(x), model(x), **MERGED)


def test_save_pretrained_says_which_adapter_has_no_merged_form_and_writes_nothing(tmp_path: Path) -> None:
    model, folder = odd(), tmp_path / "plain"
    adapter = adapter_for(model, dict(target_modules=["convolution"]))
    dense = {
        "lora_A": torch.randn(2, 8, 3),
        "lora_B": torch.randn(8, 2, 1),
    }  # peft's A reads the channels of all groups
    bound = pf.bind(model, adapter.replace(params={"convolution": dense}))
    with pytest.raises(ValueError, match=r"^convolution: cannot merge .* 2 groups .* Keep it unmerged"):
        bound.save_pretrained(folder, merge=True)
    assert not folder.exists()


def test_save_pretrained_passes_its_options_on(tmp_path: Path) -> None:
    model, batch = base("llama"), BASES["llama"].inputs()
    bound = pf.bind(model, adapter_for(model, dict(target_modules=["q_proj"])))
    bound.save_pretrained(tmp_path, merge=True, max_shard_size="5KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) == len(
        model.state_dict()
    )
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, bound(**batch).logits, **MERGED)
