"""Bar charts of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from records import FLOOR, PEFT, Measured

COLUMNS = 4  # charts side by side
UNIT = "× the base alone"


def draw(rows: Sequence[Measured], path: Path, title: str, *, unit: str = UNIT) -> None:
    """Write bar charts: for each group, how many times the base's time each case takes, with quartiles."""
    import matplotlib as mpl

    mpl.use("Agg")  # a server has no display
    import matplotlib.pyplot as plt

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


def _bars(axes: Any, rows: Sequence[Measured]) -> None:
    ratios = [row.to_floor for row in rows]
    colors = [{FLOOR: "tab:gray", PEFT: "tab:orange"}.get(row.what, "tab:blue") for row in rows]
    medians = [ratio.median for ratio in ratios]
    whiskers = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    drawn = axes.barh([row.what for row in rows], medians, xerr=whiskers, color=colors, ecolor="black", capsize=2)
    axes.bar_label(drawn, [f" {median:.3g}" for median in medians], padding=4, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(ratio.high for ratio in ratios))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
