"""`merge_folder` against what peft writes, bit for bit, and against `apply`."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from bases import BASES, EXPERTS_ARE_PARAMETERS, Base, bert, llama, minilm_folder, text
from oracle import called, distance, outputs, quiet_peft, randomised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfn as pf
from peftfn.checkpoints.merge_folder import flushing, shards

# Of a merged model and an adapted one: products in another order, in float32.
SUMS = 2e-5


class Case(NamedTuple):
    """A folder and an adapter for it.

    Attributes:
        base: the model that the adapter is for.
        options: of its config.
        saved: what is written of the model: it itself, or the bare model inside it.
        dtype: of the folder.
        like_peft: whether peft's merged folder holds the same bits.
    """

    base: Base
    options: dict[str, Any]
    saved: Callable[[Any], Any] = lambda model: model
    dtype: torch.dtype = torch.float32
    like_peft: bool = True

    def folder(self, at: Path) -> Path:
        model: Any = self.base.make().to(self.dtype)
        self.saved(model).save_pretrained(at, max_shard_size="6KB")
        return at

    def adapter(self, kind: str = "LoraConfig") -> pf.Adapter:
        config = getattr(pf, self.options.get("kind", kind))
        given = {name: value for name, value in self.options.items() if name != "kind"}
        return randomised(pf.init(self.base.make().to(self.dtype), config(**given)))


ALL = "all-linear"
# transformers 5 has renamed ViT's layers
VIT = ["q_proj", "fc1"] if transformers.__version__ >= "5" else ["query", "intermediate.dense"]
CASES = {
    "llama": Case(BASES["llama"], {"target_modules": ALL}),
    "llama in bfloat16": Case(BASES["llama"], {"target_modules": ALL, "r": 16}, dtype=torch.bfloat16),
    "llama in float16": Case(BASES["llama"], {"target_modules": ["q_proj"]}, dtype=torch.float16),
    "tied llama": Case(BASES["llama tied"], {"target_modules": ["q_proj", "down_proj"]}),
    "gpt2": Case(BASES["gpt2"], {"target_modules": ["c_attn", "c_proj"]}),
    "bare gpt2": Case(BASES["gpt2"], {"target_modules": ["c_attn"]}, saved=lambda model: model.transformer),
    "bert and a new head": Case(
        BASES["bert"], {"target_modules": ["query"], "task_type": "SEQ_CLS"}, saved=lambda model: model.bert
    ),
    "bert and its own head": Case(
        BASES["bert"], {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    ),
    "biases": Case(BASES["bert"], {"target_modules": ["query"], "bias": "all"}),
    "ia3": Case(
        BASES["bert"], {"kind": "IA3Config", "target_modules": ["key", "dense"], "feedforward_modules": ["dense"]}
    ),
    "t5": Case(BASES["t5"], {"target_modules": ["q", "wo"]}),
    "vit": Case(BASES["vit"], {"target_modules": VIT, "modules_to_save": ["classifier"]}),
    "gemma": Case(BASES["gemma"], {"target_modules": ["q_proj"]}),
    "rslora": Case(BASES["llama"], {"target_modules": ["q_proj"], "use_rslora": True, "r": 6}, dtype=torch.bfloat16),
    "attention of mixtral": Case(BASES["mixtral"], {"target_modules": ["q_proj"]}),
}
if EXPERTS_ARE_PARAMETERS:
    CASES |= {
        "experts of mixtral": Case(
            BASES["mixtral"],
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        )
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def by_peft(case: Case, folder: Path, adapter: Path, output: Path) -> dict[str, Tensor]:
    """What peft writes: transformers loads the folder, peft merges, transformers saves."""
    with quiet_peft():
        model: Any = type(case.base.make()).from_pretrained(folder, dtype="auto")
        merged: Any = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(output)
    return tensors_of(output)


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert (key, found[key].dtype, found[key].shape) == (key, tensor.dtype, tensor.shape)
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", CASES)
def test_a_streamed_merge_is_what_peft_writes_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, adapter = case.folder(tmp_path / "base"), case.adapter()
    pf.save(adapter, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    output = pf.merge_folder(folder, adapter, tmp_path / "merged", progress=False)
    assert_same_bits(tensors_of(output), by_peft(case, folder, tmp_path / "adapter", tmp_path / "peft"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged", "peft"]


@pytest.mark.parametrize("name", CASES)
def test_the_merged_folder_loads_as_the_adapted_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, adapter = case.folder(tmp_path / "base"), case.adapter()
    output = pf.merge_folder(folder, adapter, tmp_path / "merged", progress=False)
    kind: Any = type(case.base.make())
    merged, info = kind.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if case.dtype == torch.float32:
        batch = case.base.inputs()
        found, expected = called(merged.eval(), batch), pf.apply(case.base.make(), adapter, batch)
        assert distance(outputs(found), outputs(expected)) < SUMS


def test_sharded_files_keep_their_names_order_and_index(tmp_path: Path) -> None:
    case = CASES["llama"]
    folder = case.folder(tmp_path / "base")
    output = pf.merge_folder(folder, case.adapter(), tmp_path / "merged", progress=False)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(path.name for path in output.glob("*.safetensors")) == files
    old, new = (json.loads((at / shards.INDEX).read_text()) for at in (folder, output))
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"] == old["metadata"]
    for name in files:
        assert list(shards.read_shard(output / name).entries) == list(shards.read_shard(folder / name).entries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_is_that_of_a_base_loaded_in_it(dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES["llama in bfloat16"]
    folder, adapter = case.folder(tmp_path / "base"), case.adapter()
    output = pf.merge_folder(folder, adapter, tmp_path / "merged", dtype=dtype, progress=False)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    pf.bind(model, adapter).save_pretrained(tmp_path / "bound", merge=True)
    assert_same_bits(tensors_of(output), tensors_of(tmp_path / "bound"))
    assert transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == dtype


def test_several_adapters_are_merged_in_order(tmp_path: Path) -> None:
    case = CASES["llama in bfloat16"]
    folder = case.folder(tmp_path / "base")
    first, second = case.adapter(), CASES["rslora"].adapter()
    one = pf.merge_folder(folder, first, tmp_path / "one", progress=False)
    expected = tensors_of(pf.merge_folder(one, second, tmp_path / "two", progress=False))
    both = pf.merge_folder(folder, (first, second), tmp_path / "both", progress=False)
    assert_same_bits(tensors_of(both), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_tied_weights_come_apart_where_one_of_them_changes(options: dict[str, Any], tmp_path: Path) -> None:
    base = BASES["llama tied"]
    case = Case(base, options)
    folder, adapter = case.folder(tmp_path / "base"), case.adapter()
    output = pf.merge_folder(folder, adapter, tmp_path / "merged", progress=False)
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert merged.config.tie_word_embeddings is False
    batch = base.inputs()
    expected = pf.apply(base.make(), adapter, batch)
    assert distance(outputs(called(merged.eval(), batch)), outputs(expected)) < SUMS


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_has_grown_follows_its_adapter(tied: bool, tmp_path: Path) -> None:
    base = Base(llama(tie_word_embeddings=tied), text)
    folder = Case(base, {}).folder(tmp_path / "base")
    grown: Any = base.make()
    grown.resize_token_embeddings(47)
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    adapter = pf.init(grown, pf.LoraConfig(target_modules=["q_proj"], modules_to_save=names))
    noisy = randomised(adapter)
    output = pf.merge_folder(folder, noisy, tmp_path / "merged", progress=False)
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert merged.config.vocab_size == 47
    assert merged.config.tie_word_embeddings is tied
    embedding = noisy.params["model.embed_tokens"]["weight"]
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    head = embedding if tied else noisy.params["lm_head"]["weight"]
    assert torch.equal(merged.get_output_embeddings().weight, head)


def test_a_new_head_brings_its_labels_and_its_class(tmp_path: Path) -> None:
    case = CASES["bert and a new head"]
    base = Base(bert(num_labels=5), text)
    folder = case.folder(tmp_path / "base")
    adapter = pf.init(base.make(), pf.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    output = pf.merge_folder(folder, adapter, tmp_path / "merged", progress=False)
    config = transformers.AutoConfig.from_pretrained(output)
    assert config.num_labels == 5
    assert config.architectures == ["BertForSequenceClassification"]


def test_files_beside_the_weights_are_copied_but_weights_of_other_formats(tmp_path: Path) -> None:
    case = CASES["llama"]
    folder = case.folder(tmp_path / "base")
    (folder / "tokenizer.json").write_text("a tokenizer")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for name in ("README.md", "pytorch_model.bin", "tf_model.h5", ".hidden", "rust_model.ot"):
        (folder / name).write_text("not this")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("another tokenizer")
    for tokenizer, expected in ((None, "a tokenizer"), (tmp_path / "other", "another tokenizer")):
        output = tmp_path / f"merged {tokenizer is None}"
        pf.merge_folder(folder, case.adapter(), output, tokenizer=tokenizer, progress=False)
        assert (output / "tokenizer.json").read_text() == expected
        assert (output / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
        beside = {"config.json", "generation_config.json", "tokenizer.json", "1_Pooling/config.json", shards.INDEX}
        assert {name for name in files if not name.endswith(".safetensors")} == beside


def test_the_real_encoder_is_merged_as_it_lies_in_its_package(tmp_path: Path) -> None:
    model: Any = transformers.AutoModel.from_pretrained(minilm_folder())
    adapter = randomised(pf.init(model, pf.LoraConfig(target_modules=["query", "value", "dense"])), size=0.02)
    output = pf.merge_folder(minilm_folder(), adapter, tmp_path / "merged", progress=False)
    merged = transformers.AutoModel.from_pretrained(output).eval()
    batch = BASES["minilm"].inputs()
    with torch.no_grad():
        found, expected = (one.last_hidden_state for one in (merged(**batch), pf.apply(model.eval(), adapter, batch)))
    assert distance(found, expected) < SUMS


def test_a_folder_without_a_config_is_merged_by_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    save_file(model.state_dict(), tmp_path / shards.SINGLE)
    adapter = randomised(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])))
    output = pf.merge_folder(tmp_path, adapter, tmp_path / "merged", progress=False)
    assert_same_bits(load_file(output / shards.SINGLE), pf.merge(model.state_dict(), adapter))


def test_a_weight_that_would_not_be_finite_is_refused(tmp_path: Path) -> None:
    case = CASES["llama in float16"]
    folder, adapter = case.folder(tmp_path / "base"), case.adapter()
    params = {path: {name: tensor * 1e4 for name, tensor in leaf.items()} for path, leaf in adapter.params.items()}
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight would have .* NaN or infinite"):
        pf.merge_folder(folder, adapter.replace(params=params), tmp_path / "merged", safe=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    pf.merge_folder(folder, adapter, tmp_path / "merged", safe=True, progress=False)


def test_what_cannot_be_merged_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    case = CASES["llama"]
    folder, adapter = case.folder(tmp_path / "base"), case.adapter()
    other = randomised(pf.init(BASES["gpt2"].make(), pf.LoraConfig(target_modules=["c_attn"])))
    prompt = pf.init(case.base.make(), pf.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"1")
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (folder, other, KeyError, "has a site 'transformer.h.0.attn.c_attn'"),
        (folder, prompt, ValueError, "cannot be merged"),
        (folder, pf.stack([adapter, adapter]), TypeError, "a stack"),
        (folder, 1, TypeError, "int"),
        (tmp_path / "nowhere", adapter, FileNotFoundError, "is no folder"),
        (tmp_path / "empty", adapter, FileNotFoundError, "has no model.safetensors"),
        (tmp_path / "bin", adapter, FileNotFoundError, "only pytorch_model.bin"),
    ]
    for at, one, error, words in wrong:
        with pytest.raises(error, match=words):
            pf.merge_folder(at, one, tmp_path / "merged", progress=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match="holds quantized weights"):
        pf.merge_folder(folder, adapter, tmp_path / "merged", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "bin", "empty"]


def test_a_header_that_contradicts_itself_is_a_broken_file(tmp_path: Path) -> None:
    header = json.dumps({"0.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 28]}}).encode()
    (tmp_path / shards.SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(28))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        shards.read_shard(tmp_path / shards.SINGLE)


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_file_that_is_not_whole_is_named(cut: int, tmp_path: Path) -> None:
    case = CASES["llama"]
    folder = case.folder(tmp_path / "base")
    broken = sorted(folder.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:cut])
    with pytest.raises(ValueError, match=broken.name):
        pf.merge_folder(folder, case.adapter(), tmp_path / "merged", progress=False)


@pytest.mark.parametrize("name", ["llama in bfloat16", "biases"])
def test_a_merge_is_the_same_whatever_the_default_device(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, adapter = case.folder(tmp_path / "base"), case.adapter()
    expected = tensors_of(pf.merge_folder(folder, adapter, tmp_path / "merged", progress=False))
    with torch.device("meta"):
        found = pf.merge_folder(folder, adapter, tmp_path / "again", dtype=case.dtype, progress=False)
    assert_same_bits(tensors_of(found), expected)


def test_a_disk_that_fails_while_a_file_is_made_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(flushing, "_OFTEN", 1)
    monkeypatch.setattr(os, "fsync", fail)
    with ThreadPoolExecutor(1) as thread, FileIO(tmp_path / "part", "w") as file:
        flush = flushing.Flushing(file, thread)
        flush.after(1)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            flush.finish()
