"""`merge_folder` by pieces of matrices: the bits of `merge`, in the memory of a few pieces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import exact
import pytest
import torch
from oracle import randomised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfn as pf
from peftfn.checkpoints.merge_folder import shards
from peftfn.core import row_blocks

ODD = (1, 63, 64, 65, 127, 129, 1000, 4097, 4099)


@pytest.mark.parametrize("rows", ODD)
@pytest.mark.parametrize("width", [64, 1000, 5000])
@pytest.mark.parametrize("most", [1, 300_000, 1 << 20])
def test_the_blocks_of_each_piece_are_those_of_the_whole_matrix(rows: int, width: int, most: int) -> None:
    every, pieces = list(row_blocks.blocks(rows, width)), list(row_blocks.pieces(rows, width, most))
    for cut in (every, pieces):
        assert [0, *(one.stop for one in cut)] == [*(one.start for one in cut), rows]
        assert all(one.stop - one.start >= 64 for one in cut) or rows < 64
    found = [
        (piece.start + one.start, piece.start + one.stop)
        for piece in pieces
        for one in row_blocks.blocks(piece.stop - piece.start, width)
    ]
    assert found == [(one.start, one.stop) for one in every]


class Large(nn.Module):
    """Layers of several blocks each, with odd numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20_001, 128)
        self.middle = nn.Linear(128, 9_999)
        self.head = nn.Linear(1000, 2_563, bias=False)


def written(folder: Path, dtype: torch.dtype) -> tuple[Large, pf.Adapter]:
    model = Large().to(dtype)
    folder.mkdir()
    save_file(model.state_dict(), folder / shards.SINGLE)
    config = pf.LoraConfig(r=16, lora_alpha=24, target_modules=["embedding", "middle", "head"])
    return model, randomised(pf.init(model, config))


def by_hand(model: nn.Module, adapter: pf.Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """W + s·B·A by the formula: whole products, in one dtype."""
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for path, leaf in adapter.params.items():
        names = ("lora_embedding_A", "lora_embedding_B") if path == "embedding" else ("lora_A", "lora_B")
        a, b = (leaf[name].to(dtype) for name in names)
        delta = ((b @ a).T if path == "embedding" else b @ a) * adapter.buffers[path]["scaling"]
        found[f"{path}.weight"] = found[f"{path}.weight"].to(dtype) + delta
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pieces_have_the_bits_of_merge_and_are_the_formula(dtype: torch.dtype, tmp_path: Path) -> None:
    model, adapter = written(tmp_path / "base", dtype)
    output = pf.merge_folder(tmp_path / "base", adapter, tmp_path / "merged", progress=False)
    merged = pf.merge(model.state_dict(), adapter)
    assert_same(load_file(output / shards.SINGLE), merged)
    truth = by_hand(model, adapter, torch.float64)
    rounded = {name: tensor.to(dtype) for name, tensor in by_hand(model, adapter, torch.float32).items()}
    for name, tensor in merged.items():
        exact.assert_close_to_truth(tensor, rounded[name], truth[name])


def test_another_dtype_and_two_adapters_go_by_blocks_too(tmp_path: Path) -> None:
    model, first = written(tmp_path / "base", torch.bfloat16)
    second = randomised(first)
    both, float32 = (first, second), torch.float32
    output = pf.merge_folder(tmp_path / "base", both, tmp_path / "merged", dtype=float32, progress=False)
    expected = pf.merge({name: tensor.to(float32) for name, tensor in model.state_dict().items()}, both)
    assert_same(load_file(output / shards.SINGLE), expected)


def test_a_merge_that_was_stopped_inside_a_matrix_goes_on_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, adapter = written(tmp_path / "base", torch.bfloat16)
    write, offsets, stop = shards.write, list[int](), [3]

    def counted(file: Any, offset: int, tensor: Tensor) -> None:
        if stop and len(offsets) == stop[0]:
            raise KeyboardInterrupt
        offsets.append(offset)
        write(file, offset, tensor)

    monkeypatch.setattr(shards, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        pf.merge_folder(tmp_path / "base", adapter, tmp_path / "merged", progress=False)
    stop.clear()
    output = pf.merge_folder(tmp_path / "base", adapter, tmp_path / "merged", progress=False)
    assert len(offsets) > 6  # three matrices, of several blocks each
    assert offsets == sorted(set(offsets))
    assert_same(load_file(output / shards.SINGLE), pf.merge(model.state_dict(), adapter))


def test_a_weight_that_would_not_be_finite_is_named_with_its_rows(tmp_path: Path) -> None:
    _, adapter = written(tmp_path / "base", torch.float16)
    b = adapter.params["middle"]["lora_B"].clone()
    b[9_000] = 1e6
    middle = {**adapter.params["middle"], "lora_B": b}
    spoilt = adapter.replace(params={**adapter.params, "middle": middle})
    with pytest.raises(ValueError, match=r"middle\.weight would have \d+ of \d+ values, in rows \d+ to 9998, that"):
        pf.merge_folder(tmp_path / "base", spoilt, tmp_path / "merged", safe=True, progress=False)


PEAK = """
import sys
import torch
import peftfn as pf

torch.set_num_threads(1)
def peak():
    # Not getrusage's: that one starts with the peak of the process that started this one.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

small, large, adapter = sys.argv[1:]
adapter = pf.load(adapter, mmap=True)
pf.merge_folder(small, adapter.replace(params={}, buffers={}), small + "-merged", progress=False)
before = peak()
pf.merge_folder(large, adapter, large + "-merged", progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_a_merge_takes_less_memory_than_one_matrix(tmp_path: Path) -> None:
    weight = torch.zeros(8192, 8192, dtype=torch.bfloat16)
    for name, tensor in (("small", weight[:1].clone()), ("large", weight)):
        (tmp_path / name).mkdir()
        save_file({"0.weight": tensor}, tmp_path / name / shards.SINGLE)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8192, 8192, bias=False))
    config = pf.LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    pf.save(pf.init(model, config), tmp_path / "adapter")
    folders = (str(tmp_path / name) for name in ("small", "large", "adapter"))
    found = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, check=True)
    assert int(found.stdout) < weight.nbytes  # whole matrices would take twice that, and what MKL needs once
