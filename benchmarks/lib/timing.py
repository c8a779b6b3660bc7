"""How a case is timed: by the process's clock, or on a GPU by the events that its stream passes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Sample(NamedTuple):
    """What one sample took: seconds a call, and on a GPU bytes beyond what was allocated before."""

    seconds: float
    peak: int | None = None


def _by_clock(run: Callable[[], object], clock: Callable[[], float], calls: int) -> Sample:
    gc.collect()
    start = clock()
    for _ in range(calls):
        run()
    return Sample((clock() - start) / calls)


def _by_events(run: Callable[[], object], clock: Callable[[], float], calls: int) -> Sample:
    del clock  # the stream has its own
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1000  # it counts in milliseconds
    return Sample(seconds / calls, torch.cuda.max_memory_allocated() - before)


TAKE = {"cpu": _by_clock, "cuda": _by_events}


def place(name: str, kinds: Sequence[str] = tuple(TAKE)) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: it is of another kind, or it is not there.
    """
    if name.partition(":")[0] not in kinds:
        raise ValueError(f"--device {name}: expected {' or '.join(kinds)}")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch {torch.__version__} sees no GPU; leave --device out for the CPU")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # cases are held against each other in float32 before they are timed
    return device


def pin(threads: int) -> Callable[[], float]:
    """Fix the number of threads, and return the clock to read for it."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(threads)
    return time.process_time if threads == 1 else time.perf_counter


def in_child(script: str, *arguments: object) -> Any:
    """What the script prints last, as JSON, when it is run with `--child` and these: memory is counted by process.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-W", "ignore", script, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])} failed: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> int:
    """The most memory that this process had, in bytes, since it began or Linux was told to count anew.

    Not getrusage's: that one starts with the peak of the process that started this one.
    """
    return _status("VmHWM")


def count_anew() -> int:
    """Tell Linux to count `peak` from now on, and return the bytes that are there now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
