"""Bar charts of measurements, and the chart of all ratios to peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.records import BESIDE, PEFT, Measured, Quartiles

COLUMNS = 4  # charts side by side
UNIT = "× the base alone"
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}


def draw(rows: Sequence[Measured], path: Path, title: str, *, unit: str = UNIT) -> None:
    """Write bar charts: for each group, how many times the base's time each case takes, with quartiles."""
    plt = _pyplot()
    groups = list(dict.fromkeys(row.group for row in rows))
    lines = [groups[start : start + COLUMNS] for start in range(0, len(groups), COLUMNS)]
    columns = min(COLUMNS, len(groups))
    figure, panels = plt.subplots(len(lines), columns, figsize=(3.9 * columns, 2.6 * len(lines) + 0.4), squeeze=False)
    for line, along in zip(lines, panels, strict=True):
        for axes in along[len(line) :]:
            axes.set_visible(False)
        for axes, group in zip(along, line, strict=False):
            _bars(axes, [row for row in rows if row.group == group])
            axes.set_title(group, fontsize=9)
            axes.set_xlabel(unit, fontsize=8)
    figure.suptitle(f"{title}\nmedians and quartiles; blue: peftfn", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")  # a server has no display
    import matplotlib.pyplot as plt

    return plt


def _bars(axes: Any, rows: Sequence[Measured]) -> None:
    ratios = [row.to_floor for row in rows]
    colors = ["tab:gray" if row.what in BESIDE else {PEFT: "tab:orange"}.get(row.what, "tab:blue") for row in rows]
    medians = [ratio.median for ratio in ratios]
    whiskers = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    drawn = axes.barh([row.what for row in rows], medians, xerr=whiskers, color=colors, ecolor="black", capsize=2)
    axes.bar_label(drawn, [f" {median:.3g}" for median in medians], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(ratio.high for ratio in ratios))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


class Line(NamedTuple):
    """A line of the chart of ratios: its text, its value, and the goal if there is one, and whether it is met.

    A line without a value is a heading.
    """

    text: str
    value: Quartiles | None = None
    goal: float | None = None
    met: bool | None = None


def ratios(lines: Sequence[Line], path: Path) -> None:
    """Write a chart of ratios on one logarithmic axis, in two columns, with the goals as bars across."""
    plt = _pyplot()
    half = next((n for n in range(len(lines) // 2, len(lines)) if lines[n].value is None), len(lines))
    halves = [lines[:half], lines[half:]] if half < len(lines) else [lines]
    tall = 0.17 * max(map(len, halves)) + 1.2
    figure, panels = plt.subplots(1, len(halves), figsize=(7.5 * len(halves), tall), sharex=True, squeeze=False)
    for axes, part in zip(panels[0], halves, strict=True):
        _dots(axes, part, max(map(len, halves)))
    title = "time or memory over peft's: medians and quartiles on a logarithmic axis; left of 1 is better than peft"
    figure.suptitle(f"{title}\nbar: a goal, green where it is met and red where not", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _dots(axes: Any, lines: Sequence[Line], places: int) -> None:
    axes.axvline(1, color="tab:orange", linewidth=1)
    for at, (_, value, goal, met) in enumerate(lines):
        if value is not None:
            axes.plot([value.low, value.high], [at, at], color="black", linewidth=1)
            axes.plot(value.median, at, "o", color="tab:blue", markersize=4)
            # The number goes behind the goal where it would lie on it.
            end = goal if goal is not None and value.high < goal < 1.8 * value.high else value.high
            offset = {"xytext": (4, -2.5), "textcoords": "offset points"}
            axes.annotate(f"{value.median:.3g}", (end, at), fontsize=6, bbox=WHITE, **offset)
        if goal is not None:
            axes.plot(goal, at, "|", color="tab:green" if met else "tab:red", markersize=9, markeredgewidth=2)
    axes.set_xscale("log", subs=(2, 5))
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which("{x:g}")
    axes.set_yticks(range(len(lines)), [line.text for line in lines], fontsize=7)
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if line.value is None else "normal")
    axes.set_ylim(places - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
