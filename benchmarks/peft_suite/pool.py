"""A pool of forks: each takes a group of cases and a time limit, and what it has found is kept as it goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_suite import subject
from peft_suite.inventory import Case
from peft_suite.verdicts import CRASH, OUT, Verdict

Judge = Callable[[Case], Verdict]


class _Worker(NamedTuple):
    cases: Sequence[Case]
    path: Path
    ends: float


def verdicts(
    groups: Sequence[Sequence[Case]], make: Callable[[], Judge], folder: Path, jobs: int, limit: float
) -> Iterator[tuple[Case, Verdict]]:
    """Each case with its verdict, as groups are done; a group that dies or takes too long loses the case it was at."""
    waiting, running = list(reversed(groups)), dict[int, _Worker]()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    while waiting or running:
        while waiting and len(running) < jobs:
            cases = waiting.pop()
            path = folder / f"{os.getpid()}-{len(waiting)}-{time.monotonic_ns()}"
            running[_fork(cases, make, path)] = _Worker(cases, path, time.monotonic() + limit * (1 + len(cases) / 20))
        time.sleep(0.02)
        for process, worker in list(running.items()):
            late = time.monotonic() > worker.ends
            if late:
                os.kill(process, signal.SIGKILL)
            done, status = os.waitpid(process, 0 if late else os.WNOHANG)
            if done:
                del running[process]
                found, rest = _read(worker, Verdict(OUT) if late else Verdict(CRASH, f"died: {status}"))
                waiting += [rest] if rest else []
                yield from found


def _fork(cases: Sequence[Case], make: Callable[[], Judge], path: Path) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        tempfile.tempdir = str(path.parent)  # what a killed one leaves goes with the folder
        judge = make()
        with path.open("w", encoding="utf-8") as file:
            for case in cases:
                file.write(json.dumps(judge(case)) + "\n")
                file.flush()
        code = 0
    finally:
        shutil.rmtree(subject.temporary(), ignore_errors=True)
        os._exit(code)


def _read(worker: _Worker, last: Verdict) -> tuple[list[tuple[Case, Verdict]], Sequence[Case]]:
    lines: list[Any] = []
    if worker.path.exists():
        lines = [json.loads(line) for line in worker.path.read_text(encoding="utf-8").splitlines()]
        worker.path.unlink()
    found = [(case, Verdict(*line)) for case, line in zip(worker.cases, lines, strict=False)]
    if len(found) < len(worker.cases):
        found.append((worker.cases[len(found)], last))
    return found, worker.cases[len(found) :]
