"""What a file says is held against the file: one opening, one folder, and headers and notes that fit."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftfn as pf
from peftfn.core import reading

NAMES = [str(number) for number in range(4)]


def base() -> nn.Module:
    return nn.Sequential(*[nn.Linear(8, 8) for _ in NAMES])


def made(alpha: int) -> pf.Adapter:
    return oracle.randomised(pf.init(base(), pf.LoraConfig(r=2, lora_alpha=alpha, target_modules=NAMES)), alpha)


@pytest.mark.parametrize("mmap", [False, True])
def test_header_and_tensors_come_from_one_file_when_another_takes_its_place(
    mmap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = made(1), made(2)
    pf.save(small, tmp_path)
    opened = reading.safetensors_file.described

    def replaced_meanwhile(file: Any, path: Path) -> Any:
        found = opened(file, path)
        (tmp_path / "new").write_bytes(b"\0" * 10_000)
        (tmp_path / "new").replace(path)
        return found

    monkeypatch.setattr(reading.safetensors_file, "described", replaced_meanwhile)
    again = pf.load(tmp_path, mmap=mmap)
    assert all(torch.equal(again.params[name]["lora_A"], small.params[name]["lora_A"]) for name in NAMES)
    assert not torch.equal(small.params["0"]["lora_A"], large.params["0"]["lora_A"])


def saving(gate: threading.Barrier, adapter: pf.Adapter, folder: Path) -> None:
    gate.wait()
    pf.save(adapter, folder)


def test_two_writers_leave_one_adapter(tmp_path: Path) -> None:
    several = [made(8), made(64)]
    for turn in range(20):
        folder = pf.save(several[0], tmp_path / str(turn))
        gate = threading.Barrier(2)
        threads = [threading.Thread(target=saving, args=(gate, one, folder)) for one in several]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = pf.load(folder)
        text = json.loads((folder / "adapter_config.json").read_text())
        own = several[[8, 64].index(text["lora_alpha"])]
        assert torch.equal(found.params["0"]["lora_A"], own.params["0"]["lora_A"])
        assert found.config == own.config


def test_a_link_that_is_switched_meanwhile_is_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = [made(8), made(64)]
    for number, one in enumerate(several):
        pf.save(one, tmp_path / str(number))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "0")
    opened = reading.safetensors_of

    def switched(*args: Any) -> Any:
        link.unlink()
        link.symlink_to(tmp_path / "1")
        return opened(*args)

    monkeypatch.setattr(reading, "safetensors_of", switched)
    found = pf.load(link)
    assert found.config == several[0].config
    assert torch.equal(found.params["0"]["lora_A"], several[0].params["0"]["lora_A"])


HEADERS: dict[str, Any] = {
    "has shape [2, 8] at [-64, 0]": lambda one: {**one, "data_offsets": [-64, 0]},
    "overlaps another tensor": lambda one: {**one, "data_offsets": [0, 64]},
    "has the dtype 'F7'": lambda one: {**one, "dtype": "F7"},
    "bytes for [2, 9] of F32": lambda one: {**one, "shape": [2, 9]},
    "has shape ['2', 8]": lambda one: {**one, "shape": ["2", 8]},
    "has the dtype None": lambda one: 7,
}


def spoilt(path: Path, name: str, change: Any) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[name] = change(header[name])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("said", HEADERS)
def test_a_header_that_does_not_fit_its_file_is_refused(said: str, tmp_path: Path) -> None:
    folder = pf.save(made(8), tmp_path)
    spoilt(folder / "adapter_model.safetensors", "base_model.model.3.lora_A.weight", HEADERS[said])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a whole safetensors file \(") as caught:
        pf.load(folder)
    assert said in str(caught.value)


NOTES = {
    '{"sites":{"0":{"rows":[[0,500000000]],"outputs":8}},"named":["0"]}': "'0' is",
    '{"sites":{"0":{"rows":[[0,500000000]],"outputs":500000000}},"named":["0"]}': "'0' has 500,000,000 outputs",
    '{"sites":{"0":{"rows":[[100,108]],"outputs":8}},"named":["0"]}': "'0' is",
    '{"sites":{"0":{"rows":[[4,8],[0,4]],"outputs":8}},"named":["0"]}': "'0' is",
    '{"sites":{"0":{"kind":"lineal"}},"named":["0"]}': "'0' is",
    '{"sites":null}': "sites is None",
    '{"sites":{"0":{"kind":"linear"}},"named":3}': "named is 3",
    "x": "is not valid JSON",
    '{"sites":{"0":{"outputs":"8"}},"named":["0"]}': "'0' is",
    "[" * 100_000: "is not valid JSON",
}


@pytest.mark.parametrize("note", NOTES, ids=lambda note: note[:40])
def test_a_note_that_does_not_fit_its_file_is_refused(note: str, tmp_path: Path) -> None:
    path = pf.save(made(8), tmp_path) / "adapter_model.safetensors"
    save_file(load_file(path), path, {"peftfn.parts": note})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as caught:
        pf.load(tmp_path)
    assert NOTES[note] in str(caught.value)
    save_file(load_file(path), path, {"peftfn.parts": "{}"})
    assert pf.load(tmp_path).params.keys() == set(NAMES)


FIELDS: dict[str, dict[str, Any]] = {
    "is not valid JSON": {"text": "[" * 100_000},
    "is not valid JSON (Exceeds": {"text": '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}"},
    "LoraConfig(lora_alpha=": {"lora_alpha": 10**400},
    "LoraConfig(r=": {"r": 10**30},
    "rank_pattern={'(?i)0': 2}": {"rank_pattern": {"(?i)0": 2}},
    "modules_to_save=['(']": {"modules_to_save": ["("]},
    "layers_pattern=['(']": {"layers_pattern": ["("], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("said", FIELDS)
def test_a_config_that_nobody_could_use_is_refused_by_field(said: str, tmp_path: Path) -> None:
    path = pf.save(made(8), tmp_path) / "adapter_config.json"
    given = FIELDS[said]
    path.write_text(given.get("text") or json.dumps({**json.loads(path.read_text()), **given}))
    with pytest.raises(ValueError, match=r"adapter_config\.json") as caught:
        pf.load(tmp_path)
    assert said in str(caught.value)


def test_factors_that_are_no_numbers_to_compute_with_are_refused(tmp_path: Path) -> None:
    path = pf.save(made(8), tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    for dtype in (torch.int64, torch.float8_e4m3fn):
        save_file({name: one.to(dtype) for name, one in tensors.items()}, path)
        with pytest.raises(ValueError, match=r"lora_A.weight' in (int64|float8_e4m3fn); expected float16"):
            pf.load(tmp_path)
    save_file({**tensors, "base_model.model.0.lora_A.weight": torch.zeros(())}, path)
    with pytest.raises(ValueError, match=r"has one number as 'base_model\.model\.0\.lora_A\.weight'"):
        pf.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        pf.load("/" + "a" * 5000)


class Named(nn.Module):
    """A layer, and one called as PEFT calls something of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.lin0 = nn.Linear(4, 4)
        self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        return self.get_submodule(self.name)(self.lin0(x))


CALLED: dict[str, dict[str, Any]] = {
    "lora_head": {"target_modules": ["lin0"], "modules_to_save": ["lora_head"]},
    "lora_proj": {"target_modules": ["lora_proj"], "bias": "lora_only"},
    "ia3_proj": {"target_modules": r".*ia3_proj", "bias": "all"},
    "original_module": {"target_modules": ["original_module"], "bias": "all"},
    "base_layer": {"target_modules": ["base_layer"], "bias": "lora_only"},
    "_orig_mod": {"target_modules": ["_orig_mod"]},
}


@pytest.mark.parametrize("name", CALLED)
def test_a_module_may_be_called_as_peft_calls_something_of_its_own(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(Named(name)) if name in ("base_layer", "ia3_proj") else Named(name)
    adapter = oracle.randomised(pf.init(model, pf.LoraConfig(r=2, **CALLED[name])))
    pf.save(adapter, tmp_path)
    for again in (pf.load(tmp_path, model), pf.load(tmp_path)):
        assert torch.equal(pf.apply(model, again, torch.ones(1, 4)), pf.apply(model, adapter, torch.ones(1, 4)))
        assert {path: [*leaf] for path, leaf in again.params.items()} == {
            path: [*leaf] for path, leaf in adapter.params.items()
        }


def sharded(folder: Path, parts: list[dict[str, torch.Tensor]], more: dict[str, str]) -> Path:
    folder.mkdir()
    where: dict[str, str] = {}
    for number, part in enumerate(parts):
        save_file(part, folder / f"{number}.safetensors")
        where |= dict.fromkeys(part, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**where, **more}}))
    return folder


def test_an_index_names_files_of_its_own_folder_and_each_tensor_once(tmp_path: Path) -> None:
    one, adapter = {"0.weight": torch.ones(8, 8)}, made(8)
    save_file({"private": torch.ones(3)}, tmp_path / "secret.safetensors")
    refused = {
        r"index\.json names '\.\./secret\.safetensors'": sharded(
            tmp_path / "a", [one], {"private": "../secret.safetensors"}
        ),
        r"'0\.weight' is in .*0\.safetensors and in 1\.safetensors too": sharded(
            tmp_path / "b", [{**one, "x": torch.ones(1)}, one], {}
        ),
    }
    for said, folder in refused.items():
        with pytest.raises(ValueError, match=said):
            pf.merge_folder(folder, adapter, tmp_path / "out", progress=False)
    folder = sharded(tmp_path / "c", [{f"{name}.weight": torch.ones(8, 8) for name in NAMES}], {})
    spoilt(folder / "0.safetensors", "0.weight", lambda one: {**one, "data_offsets": [-256, 0]})
    with pytest.raises(ValueError, match=r"0\.safetensors is not a whole safetensors file"):
        pf.merge_folder(folder, adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
