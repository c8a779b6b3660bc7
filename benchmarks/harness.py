"""What the benchmarks share: interleaved timing, medians and quartiles, a table, JSON rows and a chart.

A busy machine slows everything down for a while, so the cases of a group take turns, in a new order each round, and
ratios are taken within a round before their median is. With one thread the clock is the process's CPU time, which
does not run while another process has the core. Each sample starts with no garbage from the one before; the collector
stays on, so that a case pays for the garbage that it makes.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

FLOOR = "base alone"
PEFT = "peft"


class Quartiles(NamedTuple):
    """The median of the samples, and the values that a quarter and three quarters of them are below."""

    median: float
    low: float
    high: float


class Row(NamedTuple):
    """One measurement.

    Attributes:
        group: the cases that it was measured beside.
        what: its case.
        ms: milliseconds a call.
        to_floor: its time over that of the base alone, in the same round.
        to_peft: the same over peft's.
        excess: what it takes beyond the base alone, over what peft takes beyond it, of medians; `None` where that is
            not what the group asks.
        repeats: samples.
        calls: calls in each sample.
        sizes: what the group's model and batch measure.
    """

    group: str
    what: str
    ms: Quartiles
    to_floor: Quartiles
    to_peft: Quartiles
    excess: float | None
    repeats: int
    calls: int
    sizes: Mapping[str, int]


def pin(threads: int) -> Callable[[], float]:
    """Fix the number of threads, and return the clock to read for it."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(threads)
    return time.process_time if threads == 1 else time.perf_counter


def measure(
    group: str,
    cases: Mapping[str, Callable[[], object]],
    clock: Callable[[], float],
    sizes: Mapping[str, int],
    *,
    repeats: int,
    warm_up: int = 2,
    calls: int = 1,
) -> list[Row]:
    """Time the cases in turns: `repeats` samples each, of `calls` calls, after `warm_up` rounds that do not count."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # what there is now need not be looked through again at each collection
    for _ in range(warm_up + repeats):
        shuffle(order)
        for name in order:
            samples[name].append(_sample(cases[name], clock, calls))
    gc.unfreeze()
    kept = {name: times[warm_up:] for name, times in samples.items()}
    beyond = {
        name: statistics.median(t - f for t, f in zip(times, kept[FLOOR], strict=True)) for name, times in kept.items()
    }
    return [
        Row(
            group,
            name,
            _quartiles([1000 * seconds for seconds in times]),
            _quartiles(_ratios(times, kept[FLOOR])),
            _quartiles(_ratios(times, kept[PEFT])),
            round(beyond[name] / beyond[PEFT], 3) if beyond[PEFT] > 0 else None,
            repeats,
            calls,
            sizes,
        )
        for name, times in kept.items()
    ]


def _sample(run: Callable[[], object], clock: Callable[[], float], calls: int) -> float:
    gc.collect()
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def _ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(times, others, strict=True)]


def _quartiles(values: Sequence[float]) -> Quartiles:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(round(median, 4), round(low, 4), round(high, 4))


def table(rows: Sequence[Row]) -> str:
    """The measurements of one group as text: medians and quartiles."""
    width = max(len(row.what) for row in rows)
    lines = [
        f"{rows[0].group} ({rows[0].repeats} rounds)",
        f"  {'':{width}}  {'ms':>7}  {'quartiles':>15}  {'/ base':>6}  {'quartiles':>11}  {'/ peft':>6}  excess",
    ]
    for row in rows:
        ms = f"{row.ms.median:7.1f}  {row.ms.low:7.1f} {row.ms.high:7.1f}"
        ratios = f"{row.to_floor.median:6.3f}  {row.to_floor.low:.3f} {row.to_floor.high:.3f}"
        excess = "" if row.excess is None else f"{row.excess:6.3f}"
        lines.append(f"  {row.what:{width}}  {ms}  {ratios}  {row.to_peft.median:6.3f}  {excess}")
    return "\n".join(lines)


def machine(threads: int) -> dict[str, Any]:
    """Where the numbers come from."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads, "clock": "cpu" if threads == 1 else "wall"}


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


def write(rows: Sequence[Row], path: Path, **about: Any) -> None:
    """Write a JSON list with one measurement a line; `about` is added to each."""
    plain = [{k: v._asdict() if isinstance(v, Quartiles) else v for k, v in row._asdict().items()} for row in rows]
    lines = [json.dumps(row | about) for row in plain]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a bar chart: for each group, how many times the base's time each case takes, with quartiles.

    One scale for all of them, so that the groups can be compared.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # a server has no display
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(row.group for row in rows))
    widest = 1.25 * max(row.to_floor.high for row in rows)
    figure, panels = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 3), squeeze=False)
    for axes, group in zip(panels[0], groups, strict=True):
        bars = [row for row in rows if row.group == group]
        ratios = [row.to_floor for row in bars]
        colors = [{FLOOR: "tab:gray", PEFT: "tab:orange"}.get(row.what, "tab:blue") for row in bars]
        medians = [ratio.median for ratio in ratios]
        whiskers = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        drawn = axes.barh([row.what for row in bars], medians, xerr=whiskers, color=colors, ecolor="black", capsize=2)
        axes.bar_label(drawn, [f" {median:.2f}" for median in medians], padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(group, fontsize=10)
        axes.set(xlabel="× the base alone", xlim=(0, widest))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\nmedians and quartiles; blue: peftfn", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
