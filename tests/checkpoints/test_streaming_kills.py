"""Whatever stops `merge_folder`, the output is the old or the new one, whole; and what is done is not done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_streaming import CASES, tensors_of
from torch import Tensor

import peftfn as pf
from peftfn.checkpoints.merge_folder import shards, unfinished

# Each order is one forked child. It dies at its Nth step: a look at a file below the folder, or half-way in writing a
# tensor or copying a range.
MERGER = """
import os, signal, sys
import torch
import peftfn as pf
from peftfn.checkpoints.merge_folder import shards

torch.set_num_threads(1)
folder, first, second = sys.argv[1], pf.load(sys.argv[2]), pf.load(sys.argv[3])

def die_at(number, below):
    left = iter(range(1, number))
    def step(half=lambda: None):
        if next(left, None) is None:
            half()
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and below in str(arguments[0]):
            step()
    write, copy = shards.write, shards.copy_range
    def counted_write(file, offset, tensor):
        step(lambda: write(file, offset, tensor.flatten()[: tensor.numel() // 2]))
        write(file, offset, tensor)
    def counted_copy(source, target, start, offset, size, tell):
        step(lambda: copy(source, target, start, offset, size // 2, tell))
        copy(source, target, start, offset, size, tell)
    shards.write, shards.copy_range = counted_write, counted_copy
    sys.addaudithook(hook)

for line in sys.stdin:
    number, output = line.split()
    child = os.fork()
    if child == 0:
        die_at(int(number), os.path.dirname(output))
        pf.merge_folder(folder, second, output, overwrite=True, progress=False)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Merger(NamedTuple):
    """A process that merges, and is killed; what it merges, and what comes of either adapter."""

    process: subprocess.Popen[str]
    folder: Path
    adapters: tuple[pf.Adapter, pf.Adapter]
    outputs: tuple[dict[str, Tensor], dict[str, Tensor]]

    def die_at(self, number: int, output: Path) -> bool:
        """Whether it was killed before it was done."""
        assert self.process.stdin
        assert self.process.stdout
        print(number, output, file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), status
        return status == signal.SIGKILL


@pytest.fixture(scope="module")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Merger]:
    at = tmp_path_factory.mktemp("kills")
    case = CASES["llama in bfloat16"]
    folder, second = case.folder(at / "base"), case.adapter()
    first = second.replace(params={path: {n: t * 2 for n, t in leaf.items()} for path, leaf in second.params.items()})
    adapters = first, second
    for name, adapter in zip(("first", "second"), adapters, strict=True):
        pf.save(adapter, at / name)
        pf.merge_folder(folder, adapter, at / f"merged {name}", progress=False)
    outputs = tensors_of(at / "merged first"), tensors_of(at / "merged second")
    command = [sys.executable, "-W", "ignore", "-c", MERGER, folder, at / "first", at / "second"]
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield Merger(process, folder, adapters, outputs)
    process.kill()
    process.communicate()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], one) for key, one in expected.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="killed children are forked")
@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "an old one there"])
def test_a_kill_at_any_step_leaves_the_old_output_or_the_new_and_the_next_run_ends_it(
    merger: Merger, there: bool, tmp_path: Path
) -> None:
    number, killed = 1, True
    while killed:
        output = tmp_path / str(number) / "output"
        output.parent.mkdir()
        if there:
            pf.merge_folder(merger.folder, merger.adapters[0], output, progress=False)
        killed = merger.die_at(number, output)
        if output.exists() and any(output.iterdir()):
            found = tensors_of(output)
            assert same(found, merger.outputs[1]) or (there and same(found, merger.outputs[0])), number
            assert sorted(path.name for path in output.iterdir()) == names(merger.folder), number
        else:
            assert not there, number
        pf.merge_folder(merger.folder, merger.adapters[1], output, overwrite=True, progress=False)
        assert same(tensors_of(output), merger.outputs[1]), number
        assert [path.name for path in output.parent.iterdir()] == ["output"], number
        number += 1
    assert number > 40  # it was looked at in every step of all files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at", [1, 7, 13])
def test_what_was_written_is_not_written_again(
    merger: Merger, at: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[int] = []
    write, stop = shards.write, [True]

    def counted(file: Any, offset: int, tensor: Tensor) -> None:
        if stop and len(written) == at:
            raise KeyboardInterrupt
        written.append(offset)
        write(file, offset, tensor)

    monkeypatch.setattr(shards, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        pf.merge_folder(merger.folder, merger.adapters[1], tmp_path / "output", progress=False)
    assert not (tmp_path / "output").exists()
    assert len(written) == at
    stop.clear()
    output = pf.merge_folder(merger.folder, merger.adapters[1], tmp_path / "output", progress=False)
    assert len(written) == 14  # seven layers of two blocks, each once in both runs together
    assert same(tensors_of(output), merger.outputs[1])


def stopped(merger: Merger, below: Path) -> tuple[Path, list[Path], list[Path]]:
    """An output that is not there, with the parts and the whole files that were left of it."""
    for number in range(10, 60):
        output = below / str(number) / "output"
        output.parent.mkdir()
        assert merger.die_at(number, output)
        left = output.with_name(".output.unfinished") / "folder"
        parts, whole = (sorted(left.glob(f"*.{ending}")) for ending in ("part", "safetensors"))
        if parts and whole and parts[0].stat().st_size:
            return output, parts, whole
    raise AssertionError("it was never stopped in the second file")


def test_after_a_power_cut_parts_are_written_again_and_whole_files_are_not(merger: Merger, tmp_path: Path) -> None:
    output, parts, whole = stopped(merger, tmp_path)
    for part in parts:
        part.write_bytes(bytes(part.stat().st_size))  # what a disk may have of a file that was not synced
    kept = [path.stat().st_ino for path in whole]
    note = output.with_name(".output.unfinished") / "making.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "boot": "another"}))
    pf.merge_folder(merger.folder, merger.adapters[1], output, progress=False)
    assert same(tensors_of(output), merger.outputs[1])
    assert [(output / path.name).stat().st_ino for path in whole] == kept


def test_work_on_something_else_is_thrown_away(merger: Merger, tmp_path: Path) -> None:
    output, _, _ = stopped(merger, tmp_path)
    pf.merge_folder(merger.folder, merger.adapters[0], output, progress=False)
    assert same(tensors_of(output), merger.outputs[0])


def test_two_do_not_write_into_one_folder(merger: Merger, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with (
        unfinished.making(output, "something", overwrite=False),
        pytest.raises(FileExistsError, match="another process is writing"),
    ):
        pf.merge_folder(merger.folder, merger.adapters[0], output, progress=False)


def test_an_output_that_is_there_is_left_alone(merger: Merger, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already and not empty"):
        pf.merge_folder(merger.folder, merger.adapters[0], tmp_path, progress=False)
    with pytest.raises(NotADirectoryError):
        pf.merge_folder(merger.folder, merger.adapters[0], tmp_path / "mine", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
