"""Whatever stops `save`, the folder holds the adapter that was there or the new one, whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
from same import adapter_of, assert_same, mlp

import peftfn as pf
from peftfn.checkpoints import checkpoint
from peftfn.core import files

# Each order is one forked child, so that what is killed had its imports done. "die N" dies at its Nth look at the
# folder; "go" saves until it is killed.
SAVER = """
import os, signal, sys
import torch
import peftfn as pf

torch.set_num_threads(1)
adapters = [pf.load(name) for name in sys.argv[1:]]

def die_at(number, folder):
    events = iter(range(1, number))
    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and folder in str(arguments[0]):
            if next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    order, number, folder = line.split()
    child = os.fork()
    if child == 0:
        if order == "die":
            die_at(int(number), folder)
            pf.save(adapters[1], folder)
        while order == "go":
            for adapter in adapters:
                pf.save(adapter, folder)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

Pair = tuple[pf.Adapter, pf.Adapter]


class Saver(NamedTuple):
    """A process that saves, and is killed."""

    process: subprocess.Popen[str]

    def order(self, order: str, number: float, folder: Path) -> int:
        """The status of the child: 0, or the signal that killed it. For "go", after `number` seconds."""
        say, hear = self.process.stdin, self.process.stdout
        assert say is not None
        assert hear is not None
        print(order, number, folder, file=say)
        child = int(hear.readline())
        if order == "go":
            time.sleep(number)
            os.kill(child, signal.SIGKILL)
        return int(hear.readline())


@pytest.fixture(scope="module")
def pair() -> Pair:
    """Two adapters that differ in targets, rank and alpha."""
    model = mlp()
    return adapter_of(model, lora_alpha=3), adapter_of(model, r=3, target_modules=["0", "2"], lora_alpha=5, bias="all")


@pytest.fixture(scope="module")
def saver(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    """The process that saves this pair."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    names = [str(pf.save(adapter, tmp_path_factory.mktemp("pair"))) for adapter in pair]
    command = [sys.executable, "-c", SAVER, *names]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        yield Saver(process)
        process.kill()


def which(folder: Path, pair: Pair) -> int:
    """The number of the adapter that the folder holds, whole; an error if it is neither."""
    found = pf.load(folder)
    number = [one.config for one in pair].index(found.config)
    assert_same(found, pair[number])
    return number


def test_a_kill_at_any_random_moment_leaves_one_of_the_two_adapters(saver: Saver, pair: Pair, tmp_path: Path) -> None:
    live = tmp_path / "live"
    pf.save(pair[0], live)
    longest = 0.01  # seconds; grows until children get to their second save, however slow the machine is
    draw = random.Random(0)
    seen = set[int]()
    for _ in range(25):
        assert saver.order("go", longest * draw.random(), live) == signal.SIGKILL
        seen.add(which(live, pair))
        longest *= 1 if len(seen) == 2 else 1.5
    assert seen == {0, 1}


@pytest.mark.parametrize("before", ["an adapter", "peft's adapter", "nothing"])
def test_a_kill_at_each_step_of_a_save_leaves_the_old_or_the_new(
    before: str, saver: Saver, pair: Pair, tmp_path: Path
) -> None:
    live = tmp_path / "live"
    seen: list[int | None] = []
    for number in range(1, 100):
        prepare(live, before, pair[0])
        status = saver.order("die", number, live)
        try:
            seen.append(which(live, pair))
        except FileNotFoundError:
            assert before == "nothing"
            seen.append(None)
        if status == 0:
            break
    assert seen == sorted(seen, key=lambda one: one or 0)  # once the new one is there, it stays
    assert len(seen) > 8
    assert (seen[0], seen[-1]) == (None if before == "nothing" else 0, 1)


def prepare(folder: Path, before: str, old: pf.Adapter) -> None:
    """The folder as it is before a save."""
    for path in folder.glob("*") if folder.exists() else ():
        path.unlink()
    if before == "nothing":
        folder.rmdir() if folder.exists() else None
        return
    pf.save(old, folder)
    if before == "peft's adapter":  # nothing but tensors in the file
        path = folder / files.WEIGHTS
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"format": "pt"})


STEPS = [(os, "fsync"), (Path, "replace"), (Path, "write_text"), (safetensors.torch, "save_file"), (Path, "unlink")]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("before", ["an adapter", "peft's adapter"])
def test_an_error_at_each_step_of_a_save_leaves_the_old_or_the_new_and_no_other_file(
    error: BaseException, before: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for number in range(1, 100):
        prepare(tmp_path, before, pair[0])
        left = iter(range(number))
        with monkeypatch.context() as patch:
            for owner, name in STEPS:
                patch.setattr(owner, name, failing(getattr(owner, name), left, number, error))
            try:
                pf.save(pair[1], tmp_path)
            except type(error):
                pass
        assert sorted(path.name for path in tmp_path.iterdir()) == [files.CARD, files.CONFIG, files.WEIGHTS]
        seen.append(which(tmp_path, pair))
        if next(left, None) is not None:
            break
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert (seen[0], seen[-1]) == (0, 1)


def failing(function: Any, left: Iterator[int], last: int, error: BaseException) -> Any:
    """The function, that raises at the call that takes the last number."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) == last - 1:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("order", ["save, then read", "read, then save"])
def test_a_folder_that_is_saved_to_while_it_is_read_gives_one_of_the_two(
    order: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pf.save(pair[0], tmp_path)
    read = checkpoint._read_weights

    def interrupted(*args: Any) -> Any:
        if order == "save, then read":
            pf.save(pair[1], tmp_path)
        found = read(*args)
        pf.save(pair[1], tmp_path)
        return found

    monkeypatch.setattr(checkpoint, "_read_weights", interrupted)
    assert which(tmp_path, pair) == (1 if order == "save, then read" else 0)
