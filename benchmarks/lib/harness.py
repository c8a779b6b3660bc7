"""What the benchmarks share: interleaved timing, medians and quartiles, a table, JSON rows and a chart.

A busy machine slows everything down for a while, so the cases of a group take turns, in a new order each round, and
ratios are taken within a round before their median is. With one thread the clock is the process's CPU time, which
does not run while another process has the core; on a GPU it is the events that the stream passes before a case and
after it, and the most memory that the case had allocated beyond what was there before is noted too. Each sample starts
with no garbage from the one before; the collector stays on, so that a case pays for the garbage that it makes.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib import timing
from lib.pictures import UNIT, draw
from lib.records import FLOOR, PEFT, RESULTS, Measured, Quartiles, Row, quartiles, rounded, table, write
from lib.timing import pin

__all__ = [
    "FLOOR",
    "PEFT",
    "RESULTS",
    "Quartiles",
    "Row",
    "Run",
    "begin",
    "draw",
    "keep",
    "machine",
    "measure",
    "pin",
    "shown",
    "table",
    "timed",
    "versions",
    "write",
]


class Run(NamedTuple):
    """What the command line says.

    Attributes:
        quick: a smaller measurement, of which nothing is kept.
        repeats: samples of each case.
        threads: how many torch uses.
        device: where everything is.
        clock: what to read before and after a sample on the CPU.
        folder: where rows go; `None` for nowhere.
    """

    quick: bool
    repeats: int
    threads: int
    device: torch.device
    clock: Callable[[], float]
    folder: Path | None


def begin(description: str, repeats: int = 9, devices: Sequence[str] = tuple(timing.TAKE)) -> Run:
    """Read the command line of a benchmark, and pin its threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller, 3 samples; nothing is written without --output")
    parser.add_argument("--threads", type=int, default=1, help="threads (1); with one, CPU time is measured")
    parser.add_argument("--repeats", type=int, help=f"samples of each case ({repeats})")
    parser.add_argument("--device", default="cpu", help=f"{' or '.join(devices)}; cuda is timed by events (cpu)")
    parser.add_argument("--output", type=Path, help="folder for the rows (results, beside this file)")
    given = parser.parse_args()
    count = (3 if given.quick else repeats) if given.repeats is None else given.repeats
    if count < 2:
        parser.error(f"--repeats {count}: quartiles need 2 or more")
    try:
        device = timing.place(given.device, devices)
    except ValueError as error:
        parser.error(str(error))
    folder = given.output or (None if given.quick else RESULTS)
    return Run(given.quick, count, given.threads, device, pin(given.threads), folder)


def measure(
    group: str,
    cases: Mapping[str, Callable[[], object]],
    clock: Callable[[], float],
    sizes: Mapping[str, int],
    *,
    repeats: int,
    warm_up: int = 2,
    calls: int = 1,
    device: torch.device | str = "cpu",
) -> list[Row]:
    """Time the cases in turns: `repeats` samples each, of `calls` calls, after `warm_up` rounds that do not count."""
    samples: dict[str, list[timing.Sample]] = {name: [] for name in cases}
    take = timing.TAKE[torch.device(device).type]
    order = list(cases)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # what there is now need not be looked through again at each collection
    for _ in range(warm_up + repeats):
        shuffle(order)
        for name in order:
            samples[name].append(take(cases[name], clock, calls))
    gc.unfreeze()
    kept = {name: found[warm_up:] for name, found in samples.items()}
    times = {name: [one.seconds for one in found] for name, found in kept.items()}
    peaks = {
        name: max((one.peak for one in found if one.peak is not None), default=None) for name, found in kept.items()
    }
    return [_row(group, name, times, peaks, (repeats, calls, sizes)) for name in cases]


def _row(
    group: str,
    name: str,
    times: Mapping[str, Sequence[float]],
    peaks: Mapping[str, int | None],
    how: tuple[int, int, Mapping[str, int]],
) -> Row:
    own, floor = times[name], times[FLOOR]
    over_floor = [one - other for one, other in zip(own, floor, strict=True)]
    beyond = statistics.median(one - other for one, other in zip(times[PEFT], floor, strict=True))
    peak, theirs = peaks[name], peaks[PEFT]
    return Row(
        group,
        name,
        quartiles([1000 * seconds for seconds in own]),
        quartiles(_ratios(own, floor)),
        quartiles(_ratios(own, times[PEFT])),
        {other: quartiles(_ratios(own, found)) for other, found in times.items() if other != name},
        quartiles([one / beyond for one in over_floor]) if beyond > 0 else None,
        *how,
        peak,
        None if peak is None or not theirs else rounded(peak / theirs),
    )


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(times, others, strict=True)]


def timed(
    run: Run,
    group: str,
    cases: Mapping[str, Callable[[], object]],
    sizes: Mapping[str, int],
    *,
    repeats: int | None = None,
    calls: int = 1,
    warm_up: int = 2,
) -> list[Row]:
    """Time the cases as the command line says, and print what came of it."""
    rounds = repeats or run.repeats
    warm_up = min(1, warm_up) if run.quick else warm_up
    how = {"repeats": rounds, "warm_up": warm_up, "calls": calls, "device": run.device}
    return shown(measure(group, cases, run.clock, sizes, **how))


def shown(rows: list[Row]) -> list[Row]:
    """The same rows, after printing them: the next group takes a minute or two."""
    print(table(rows), end="\n\n", flush=True)
    return rows


def machine(threads: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where the numbers come from."""
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads, "device": torch.device(device).type}
    if found["device"] == "cuda":
        return {**found, "gpu": torch.cuda.get_device_name(device), "clock": "events"}
    return {**found, "clock": "cpu" if threads == 1 else "wall"}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of what the benchmark compares."""
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)  # also where it runs from a checkout, uninstalled


def keep(
    run: Run, name: str, rows: Sequence[Measured], packages: Sequence[str] = ("peftfn",), unit: str = UNIT
) -> None:
    """Write the rows of a run, and a picture of them, where the command line says so."""
    if run.folder is None:
        return
    on = machine(run.threads, run.device)
    used = versions("torch", "transformers", "peft", *packages)
    stem = name if on["device"] == "cpu" else f"{name}-{on['device']}"
    write(rows, run.folder / f"{stem}.json", machine=on, versions=used)
    hardware = on.get("gpu") or f"{on['cpu']}, {run.threads} thread{'s' if run.threads > 1 else ''}"
    title = f"{hardware}, torch {used['torch']}, peft {used['peft']}"
    draw(rows, run.folder / f"{stem}.png", title, unit=unit)
    print(f"written to {run.folder / stem}.json and .png")
