"""Adapters straight from their files: one stack of many folders, tensors mapped into memory, a short soak."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import lora, trained
from places import ROOT
from same import assert_same
from torch import nn

import peftfn as pf


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))


def saved(folder: Path, count: int = 3) -> list[pf.Adapter]:
    """Adapters of unlike rank, each in a folder of its own."""
    made = [
        trained(pf.init(model(), pf.LoraConfig(r=rank, target_modules=["0", "2"])), rank)
        for rank in range(1, count + 1)
    ]
    for number, adapter in enumerate(made):
        pf.save(adapter, folder / str(number))
    return made


def test_a_stack_from_folders_is_the_stack_of_their_adapters(tmp_path: Path) -> None:
    made = saved(tmp_path)
    places = [tmp_path / str(number) for number in range(3)]
    for stacked in (pf.load_stack(places), pf.load_stack(map(str, places), model(), device="cpu")):
        for one, other in zip(pf.unstack(stacked), made, strict=True):
            assert one.config == other.config
            assert_same(one, other)
    x = torch.randn(4, 8)
    index = [2, -1, 0, 1]
    assert pf.apply(model(), pf.load_stack(places), x, index=index).shape == (4, 5)


def test_load_stack_says_what_it_cannot_use(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(TypeError, match=r"load_stack was given one path, .* expected several"):
        pf.load_stack(tmp_path / "0")
    with pytest.raises(ValueError, match=r"stack was given no adapter"):
        pf.load_stack([])
    with pytest.raises(FileNotFoundError, match=r"3"):
        pf.load_stack([tmp_path / "0", tmp_path / "3"])
    wider = nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 5))
    with pytest.raises(ValueError, match=r"lora_A \(1, 8\)"):
        pf.load_stack([tmp_path / "0"], wider)


def test_mapped_tensors_are_the_file_and_what_is_written_to_them_stays_out_of_it(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 2)
    mapped = pf.load(tmp_path / "0", model(), mmap=True)
    assert_same(mapped, first)
    before = (tmp_path / "0" / "adapter_model.safetensors").read_bytes()
    mapped.params["0"]["lora_A"].add_(1)
    assert (tmp_path / "0" / "adapter_model.safetensors").read_bytes() == before
    assert_same(pf.load(tmp_path / "0", mmap=True), first)
    kept = pf.load(tmp_path / "0", mmap=True)
    pf.save(second, tmp_path / "0")  # a new file in the old one's place
    assert_same(kept, first)
    assert_same(pf.load(tmp_path / "0", mmap=True), second)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says where a file is mapped")
def test_mapped_tensors_lie_in_the_file(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(2000, 2000))
    pf.save(pf.init(wide, lora("0", init_lora_weights=False)), tmp_path)
    mapped = pf.load(tmp_path, mmap=True).params["0"]["lora_A"]
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(f"{tmp_path}/adapter_model.safetensors")]
    assert any(int(low, 16) <= mapped.data_ptr() < int(high, 16) for low, high in ranges)
    own = pf.load(tmp_path).params["0"]["lora_A"]
    assert not any(int(low, 16) <= own.data_ptr() < int(high, 16) for low, high in ranges)


def test_threads_answer_right_while_adapters_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of `make soak`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script: Any = importlib.import_module("soak")
    threads = torch.get_num_threads()
    try:
        report = script.soak(10 / 60, adapters=16, threads=4)
    finally:
        torch.set_num_threads(threads)
    assert (report.wrong, report.errors, report.base_changed) == (0, [], False), str(report)
    assert report.batches > 0
    assert report.changes > 0
