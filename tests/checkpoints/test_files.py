"""PEFT's files, both directions: those that peft 0.5.0 and 0.21.2 wrote, and those that peft has to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from make_peft_files import build
from oracle import IS_OLD, called, distance, gradients, outputs, quiet_peft
from places import ROOT
from safetensors.torch import load_file
from same import assert_same, assert_same_tensors
from torch import Tensor, nn

import peftfn as pf
from peftfn import methods

FOLDERS = sorted((ROOT / "tests" / "files").glob("*/*"))

# Largest difference over largest value, against numbers computed on another CPU. Gradients of a float32 model go
# through sums of a few thousand products, each rounded to 6e-8.
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-6}


class Case(NamedTuple):
    """One adapter of a folder that peft wrote."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}/{self.name}"

    @property
    def about(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())

    @property
    def at(self) -> Path:
        """Where the adapter's own files are."""
        return self.folder / self.about["adapters"][self.name]

    @property
    def rounding(self) -> float:
        return ROUNDING[self.about["dtype"]]

    def base(self) -> nn.Module:
        if "Mixtral" in str(self.about["model"]) and int(transformers.__version__.split(".")[0]) < 5:
            pytest.skip("before transformers 5 the experts are modules, not parameters")
        model = build(self.about["model"], self.about["dtype"])
        model.load_state_dict(load_file(self.folder / "base.safetensors"))
        return model

    def expected(self) -> tuple[Any, dict[str, Tensor]]:
        """The batch, and what peft computed from it."""
        found = load_file(self.at / "expected.safetensors")
        inputs = {name.removeprefix("input."): t for name, t in found.items() if name.startswith("input.")}
        return inputs.get("0", inputs), found

    def tensors(self) -> dict[str, Tensor]:
        """What peft saved, in the layout of the latest peft."""
        path = self.at / "adapter_model.safetensors"
        found = load_file(path) if path.exists() else torch.load(path.with_suffix(".bin"), weights_only=True)
        return {latest(key, found): tensor for key, tensor in found.items()}

    def load(self, **options: Any) -> pf.Adapter:
        return pf.load(self.folder, adapter_name=self.name, **options)

    def load_whole(self) -> pf.Adapter:
        """The adapter, with the model where the file alone does not say which tensor is which."""
        return self.load(model=self.base() if self.needs_base else None)

    @property
    def needs_base(self) -> bool:
        """Whether a part of the adapter is not in its file, or nothing there says what it is."""
        return "Mixtral" in str(self.about["model"]) or kind_of(self.folder) in ("OSF", "PSOFT")


def latest(key: str, keys_there: Any) -> str:
    """The key as peft 0.21 writes it: the bias of an adapted layer is its base layer's."""
    module = key.removesuffix(".bias")
    return f"{module}.base_layer.bias" if f"{module}.lora_A.weight" in keys_there else key


def kind_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


# Calls of these have arguments of their own, or labels, or their files lack what the base gives; their own tests read
# what peft writes of them.
ELSEWHERE = {"MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE", "PVERA", "RANDLORA", "FROD"}
KINDS = {method.config.peft_type for method in methods.TABLE} - ELSEWHERE
CASES = [
    Case(folder, name) for folder in FOLDERS for name in json.loads((folder / "case.json").read_text())["adapters"]
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_folder_is_a_case_of_one_of_the_tests_below() -> None:
    assert {kind_of(folder) for folder in FOLDERS} == KINDS
    assert len(CASES) == 81


@every_case
@pytest.mark.parametrize("checked", [False, True], ids=["", "model"])
def test_what_peft_saved_computes_what_it_did_there(case: Case, checked: bool) -> None:
    model = case.base()
    if not checked and case.needs_base:
        with pytest.raises(ValueError, match=r"pass (it|the base): peftfn\.load\(folder, model"):
            case.load()
        return
    adapter = case.load(model=model if checked else None)
    batch, expected = case.expected()
    assert distance(outputs(pf.apply(model, adapter, batch)), expected["output"]) < case.rounding
    bare = expected["base_output"]
    if bare.shape == expected["output"].shape:  # a prompt's tokens have outputs as well
        assert distance(outputs(pf.apply(model, adapter, batch)), bare) > 10 * case.rounding


@every_case
def test_what_peft_saved_has_the_gradients_it_had_there(case: Case) -> None:
    model = case.base()
    batch, expected = case.expected()
    ours = gradients(model, case.load(model=model), batch)
    there = {key.removeprefix("grad."): tensor for key, tensor in expected.items() if key.startswith("grad.")}
    theirs = {latest(key, there): tensor for key, tensor in there.items()}
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert distance(ours[key], tensor) < case.rounding, key


@every_case
def test_what_peft_saved_is_saved_again_as_the_latest_peft_would(case: Case, tmp_path: Path) -> None:
    again = load_file(pf.save(case.load_whole(), tmp_path) / "adapter_model.safetensors")
    assert_same_tensors(dict(sorted(again.items())), dict(sorted(case.tensors().items())))
    newer = Case(case.folder.parents[1] / "peft-0.21.2" / case.folder.name, case.name)
    assert {key: t.shape for key, t in again.items()} == {key: t.shape for key, t in newer.tensors().items()}


@every_case
def test_load_after_save_is_the_adapter_bit_for_bit(case: Case, tmp_path: Path) -> None:
    adapter = case.load_whole()
    assert_same(pf.load(pf.save(adapter, tmp_path), case.base() if case.needs_base else None), adapter)


@every_case
def test_peft_reads_what_we_save_and_computes_the_same(case: Case, tmp_path: Path) -> None:
    if "adalora-conv2d" in str(case) and IS_OLD:
        pytest.skip("this peft has no AdaLoRA of convolutions")
    if IS_OLD and kind_of(case.folder) not in peft.PeftType.__members__:
        pytest.skip("this peft does not have the method yet")
    if "oft" in str(case) and IS_OLD:
        pytest.skip("before 0.18 peft's sum of powers was another one")
    pf.save(case.load_whole(), tmp_path)
    model = case.base()
    batch, expected = case.expected()
    if "prompt_embeddings" in case.tensors():  # which peft's load_adapter calls unexpected, and reads
        with quiet_peft():
            theirs = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
            assert distance(outputs(called(theirs, batch)), expected["output"]) < case.rounding
        return
    with quiet_peft():
        theirs: Any = peft.PeftModel(model, peft.PeftConfig.from_pretrained(str(tmp_path)))
        found = theirs.load_adapter(str(tmp_path), "default", is_trainable=True)
    # An old peft reads VeRA's two, of which each layer has the same, and calls them unexpected.
    assert [key for key in found.unexpected_keys if not (IS_OLD and ".vera_" in key)] == []
    # Each layer of peft's has VB-LoRA's one bank under a name of its own.
    assert [key for key in found.missing_keys if "default" in key and "vector_bank" not in key] == []
    if "attention" in str(case):
        theirs = merged_attention(theirs)
    assert distance(outputs(called(theirs.eval(), batch)), expected["output"]) < case.rounding


def merged_attention(theirs: Any) -> nn.Module:
    """What peft 0.21.2 should compute: it adds the delta of out_proj twice, and torch's fused layer goes past it."""
    for name, parameter in theirs.named_parameters():
        if "out_proj.lora_B" in name:
            parameter.data /= 2
    return theirs.merge_and_unload()
