"""What `save` writes and `load` gives back: order, dtypes, names, cards; nothing shared, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bases import BASES
from oracle import furthest, quiet_peft
from places import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from same import adapter_of, assert_same, assert_same_tensors, assert_says, flat, mlp, on_disk
from torch import Tensor, nn

import peftfn as pf
from peftfn.checkpoints import keys
from peftfn.core import files

TWO_ADAPTERS = ROOT / "tests" / "files" / "peft-0.21.2" / "mlp-two-adapters"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_tensors_keep_their_dtype_in_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    made = pf.init(mlp(), pf.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), dtype=dtype)
    loaded = pf.load(pf.save(made, tmp_path))
    assert_same(loaded, made)
    assert {tensor.dtype for tensor in loaded.params["0"].values()} == {dtype}


def test_notes_in_a_file_have_the_names_that_files_before_have(tmp_path: Path) -> None:
    adapter = pf.init(mlp(), pf.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    pf.save(adapter, tmp_path)
    with safe_open(tmp_path / files.WEIGHTS, "pt") as opened:
        notes = opened.metadata()
    assert notes.keys() == {"format", "peftfn.config", "peftfn.replaces", "peftfn.parts"}
    assert json.loads(notes["peftfn.config"]) == json.loads((tmp_path / files.CONFIG).read_text())
    assert json.loads(notes["peftfn.parts"]) == {"sites": {"0": {"kind": "linear"}}, "named": ["0"]}


def test_notes_of_files_before_are_read(tmp_path: Path) -> None:
    adapter = pf.init(BASES["gpt2"].make(), pf.LoraConfig(r=2, target_modules=["c_attn.q", "c_attn.v"]))
    pf.save(adapter, tmp_path)
    path, tensors = tmp_path / files.WEIGHTS, load_file(tmp_path / files.WEIGHTS)
    with safe_open(path, "pt") as opened:
        notes = opened.metadata()
    parts = json.loads(notes["peftfn.parts"])
    for site in parts["sites"].values():
        assert site.pop("kind") == "transposed linear"
        site["transposed"] = True
    save_file(tensors, path, {**notes, "peftfn.parts": json.dumps(parts)})
    assert_same(pf.load(tmp_path), adapter)
    assert pf.load(tmp_path).sites == adapter.sites


def test_patterns_keep_the_order_in_which_they_count(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"2": 3, ".*": 5}, "alpha_pattern": {"2": 1, "[02]": 7}}
    adapter = adapter_of(mlp(), target_modules=["0", "2"], **patterns)
    loaded = pf.load(pf.save(adapter, tmp_path))
    assert_same(loaded, adapter)
    assert (float(loaded.buffers["2"]["scaling"]), float(loaded.buffers["0"]["scaling"])) == pytest.approx(
        (1 / 3, 7 / 5)
    )
    with quiet_peft():
        theirs: Any = peft.PeftModel.from_pretrained(mlp(), str(tmp_path)).base_model.model
    assert (theirs[2].scaling["default"], theirs[0].scaling["default"]) == pytest.approx((1 / 3, 7 / 5))


def test_a_file_of_peft_with_names_and_patterns_that_match_nothing_fits_its_model(tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["0", "query"], "alpha_pattern": {"query": 3}}
    with quiet_peft():
        peft.get_peft_model(mlp(), peft.LoraConfig(**options)).save_pretrained(str(tmp_path))
    assert list(pf.load(tmp_path, model=mlp()).params) == ["0"]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_biases_of_an_attention_are_where_peft_has_them(bias: str, tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).eval()
    options: dict[str, Any] = {"r": 2, "target_modules": ["self_attn"], "bias": bias}
    with quiet_peft():
        peft.get_peft_model(model, peft.LoraConfig(**options)).save_pretrained(str(tmp_path))
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    fresh = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).eval()
    if peft.__version__ >= "0.21":  # older ones save others of an attention's biases, which are read all the same
        assert sorted(keys.to_keys(pf.init(fresh, pf.LoraConfig(**options)))) == sorted(theirs)
    loaded = pf.load(tmp_path, model=fresh)
    assert_same_tensors(keys.to_keys(loaded), dict(sorted(theirs.items())))
    trained = {f"{path}.{name}" for path, leaf in loaded.params.items() for name in leaf if name.endswith("bias")}
    assert len(trained) == sum(key.endswith("bias") for key in theirs)


def test_views_and_shared_tensors_are_saved_as_what_they_hold(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    made = [adapter_of(model, target_modules=["0", "1"], lora_alpha=alpha) for alpha in (2, 6)]
    slices = pf.unstack(pf.stack(made))[1]
    assert_same(pf.load(pf.save(slices, tmp_path / "slices")), made[1])
    leaf = {name: tensor.T.contiguous().T for name, tensor in made[0].params["0"].items()}
    shared = made[0].replace(params={"0": leaf, "1": leaf})
    assert_same(pf.load(pf.save(shared, tmp_path / "shared")), shared)


def test_an_adapter_in_a_sub_folder_is_found_by_either_name() -> None:
    folder = TWO_ADAPTERS
    other = pf.load(folder / "other")
    assert_same(pf.load(folder, adapter_name="other"), other)
    assert_same(pf.load(folder, subfolder="other"), other)
    assert_same(pf.load(folder.parent, subfolder="mlp-two-adapters", adapter_name="other"), other)
    assert_same(pf.load(str(folder), adapter_name="default"), pf.load(folder))
    assert other.config != pf.load(folder).config


def test_a_loaded_adapter_does_not_change_when_its_file_does(tmp_path: Path) -> None:
    adapter = adapter_of(mlp())
    path = pf.save(adapter, tmp_path) / "adapter_model.safetensors"
    loaded = pf.load(tmp_path)
    with path.open("r+b") as file:  # as peft and cp write: into the file that is there
        file.write(b"\xff" * path.stat().st_size)
    assert_same(loaded, adapter)


def test_a_bin_file_is_read_and_replaced_by_safetensors(tmp_path: Path) -> None:
    adapter = adapter_of(mlp())
    pf.save(adapter, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    tensors = {key: nn.Parameter(tensor) for key, tensor in keys.to_keys(adapter).items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    loaded = pf.load(tmp_path)
    assert_same(loaded, adapter)
    assert not any(tensor.requires_grad for tensor in flat(loaded).values())
    pf.save(loaded, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_config_that_was_edited_by_hand_counts(tmp_path: Path) -> None:
    pf.save(adapter_of(mlp(), lora_alpha=2), tmp_path)
    pf.save(adapter_of(mlp(), lora_alpha=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 6'))
    assert float(pf.load(tmp_path).buffers["0"]["scaling"]) == 3


def test_save_leaves_other_files_and_a_written_card_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "training.json").write_text("{}")
    pf.save(adapter_of(mlp()), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "training.json").read_text() == "{}"


def test_the_model_card_says_what_the_adapter_is_and_runs(tmp_path: Path) -> None:
    model = mlp()
    adapter = adapter_of(model, base_model_name_or_path="org/base", modules_to_save=["2"])
    text = (pf.save(adapter, tmp_path) / "README.md").read_text()
    head, body = text.removeprefix("---\n").split("---\n", 1)
    assert head.splitlines() == ["library_name: peft", "base_model: org/base", "tags:", "- peftfn"]
    assert "Method: LORA; sites: 2; trained parameters: 41; base: `org/base`." in body
    code = body.split("```python\n")[1].split("```")[0].replace("path/or/hub-id", str(tmp_path))
    names: dict[str, Any] = {"model": model, "batch": torch.ones(2, 4)}
    exec(code, names)  # noqa: S102  # the card's example is for a reader to run
    assert torch.equal(names["output"], pf.apply(model, adapter, names["batch"]))


def test_a_card_names_no_hub_model_where_the_base_is_a_local_folder(tmp_path: Path) -> None:
    adapter = adapter_of(mlp(), base_model_name_or_path=str(tmp_path / "base"))
    assert "base_model:" not in (pf.save(adapter, tmp_path) / "README.md").read_text()


def test_other_spellings_of_the_same_keys_are_read(tmp_path: Path) -> None:
    adapter = adapter_of(mlp(), bias="all")
    tensors = keys.to_keys(adapter)
    pf.save(adapter, tmp_path)
    spelled = {key.replace("base_model.model.", "base_model.model._orig_mod.") for key in tensors}  # torch.compile's
    save_file(dict(zip(sorted(spelled), tensors.values(), strict=True)), tmp_path / "adapter_model.safetensors")
    assert furthest(keys.to_keys(pf.load(tmp_path)), tensors) == 0


def saves(adapter: pf.Adapter) -> dict[str, Any]:
    """What cannot be saved, by what the error says."""
    leaf = adapter.params["0"]
    clash = pf.LoraConfig(r=2, target_modules=["0"], target_parameters=["0.weight"])
    return {
        "TypeError: save was given a Sequential; expected a peftfn.Adapter": mlp(),
        "TypeError: save was given a tuple; expected a peftfn.Adapter": (adapter, adapter),
        "TypeError: save was given a LoraConfig; expected a peftfn.Adapter": adapter.config,
        "TypeError: save was given a stack; save its adapters one by one": pf.stack([adapter, adapter]),
        "ValueError: 0.lora_A.weight is on the meta device and has no values": adapter.replace(
            params={**adapter.params, "0": {**leaf, "lora_A": leaf["lora_A"].to("meta")}}
        ),
        "ValueError: two tensors of the adapter have one key": adapter.replace(
            params={**adapter.params, "0.weight": leaf}, config=clash
        ),
        "ValueError: 'weight' is a parameter of the model itself, and PEFT's files have keys": pf.init(
            nn.Linear(3, 3), pf.LoraConfig(r=2, target_parameters=["weight"])
        ),
    }


@pytest.mark.parametrize("number", range(7))
def test_what_cannot_be_saved_is_one_clear_error_and_leaves_the_folder_as_it_was(number: int, tmp_path: Path) -> None:
    folder = pf.save(adapter_of(mlp()), tmp_path / "adapter")
    before = on_disk(tmp_path)
    said, value = list(saves(pf.load(folder)).items())[number]
    for target in (folder, tmp_path / "new"):
        with pytest.raises((TypeError, ValueError)) as caught:
            pf.save(value, target)
        assert_says(caught, said)
    assert on_disk(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_save_inside_a_transform_is_an_error(tmp_path: Path) -> None:
    adapter = adapter_of(mlp())

    def loss(params: Any) -> Tensor:
        pf.save(adapter.replace(params=params), tmp_path / "new")
        return params["0"]["lora_A"].sum()

    with pytest.raises(ValueError, match=r"is inside a torch.func transform or torch.compile and has no values to"):
        torch.func.grad(loss)(adapter.params)
    assert not (tmp_path / "new").exists()


def test_save_into_a_file_is_an_error_that_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"notes.txt is a file; expected a folder to write adapter_model"):
        pf.save(adapter_of(mlp()), path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


VIT_BEFORE_5 = {"vit.layers": "vit.encoder.layer", "attention.q_proj": "attention.attention.query"}


def older_vit_folder(adapter: pf.Adapter, folder: Path, **fields: Any) -> Path:
    """The adapter as peft wrote it when transformers 4 named the modules of ViT."""
    pf.save(adapter, folder)
    tensors = keys.to_keys(adapter)
    for now, before in VIT_BEFORE_5.items():
        tensors = {key.replace(now, before): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / files.WEIGHTS, {"format": "pt"})
    config = json.loads((folder / files.CONFIG).read_text()) | {"target_modules": ["query"], **fields}
    (folder / files.CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has the names of before")
def test_an_adapter_from_before_transformers_renamed_the_modules_is_read_with_the_model(tmp_path: Path) -> None:
    base = BASES["vit"]
    model = base.make()
    adapter = adapter_of(model, target_modules=["q_proj"], modules_to_save=["classifier"])
    folder = older_vit_folder(adapter, tmp_path)
    assert_same(pf.load(folder, model=model), adapter)
    with pytest.raises(KeyError, match=r"has a site 'vit.encoder.layer.0.attention.attention.query', which ViT"):
        pf.apply(model, pf.load(folder), base.inputs())


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has the names of before")
def test_patterns_for_names_of_before_are_an_error_and_not_lost(tmp_path: Path) -> None:
    model = BASES["vit"].make()
    folder = older_vit_folder(adapter_of(model, target_modules=["q_proj"]), tmp_path, alpha_pattern={"query": 3})
    with pytest.raises(ValueError, match="as an older transformers names its modules, and so is its alpha_pattern"):
        pf.load(folder, model=model)


class Tempered(nn.Module):
    """A head with buffers that are saved with it: a number and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("temperature", torch.tensor(2.0))
        self.register_buffer("order", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> (rows, 2)."""
        return self.linear(x) / self.temperature


@pytest.mark.parametrize("how", ["with the model", "alone", "as peft writes it"])
def test_buffers_of_a_saved_module_are_buffers_again(how: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Tempered())
    adapter = adapter_of(model, modules_to_save=["1"])
    pf.save(adapter, tmp_path)
    if how == "as peft writes it":
        theirs = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4), Tempered()), str(tmp_path))
        theirs.save_pretrained(str(tmp_path))
    again = pf.load(tmp_path, None if how == "alone" else model)
    assert_same_tensors(flat(again), flat(adapter))
    assert sorted(again.buffers["1"]) == ["order", "temperature"]
    pf.leaves(again)
