"""What a sweep shows while it runs, and what it leaves to look at: a live table, loss.png and summary.csv."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from peftfn.cli import folders
from peftfn.cli.errors import need
from peftfn.cli.sweep import grids
from peftfn.cli.train import progress, records
from peftfn.cli.train.records import Record
from peftfn.core import files

SUMMARY = "summary.csv"
_LEGEND = 16
"""Curves that a legend can name."""


class Line(NamedTuple):
    """Where one adapter of a sweep stands.

    Attributes:
        name: the run's.
        changed: the options that are its own.
        state: training, trained, stopped or diverged.
        records: one for each of its steps.
    """

    name: str
    changed: Mapping[str, Any]
    state: str
    records: Sequence[Record]

    def row(self) -> dict[str, str]:
        """Its line of the table, by column."""
        last = self.records[-1] if self.records else {}
        measured = [one for one in self.records if "eval_loss" in one]
        loss = f"{records.smoothed([one['loss'] for one in self.records[-50:]], keep=0.9)[-1]:.4f}" if last else ""
        held_out = {
            name: f"{value:.4f}" for name, value in (measured[-1] if measured else {}).items() if name[:5] == "eval_"
        }
        own = {name: grids.shown(value) for name, value in self.changed.items()}
        return {
            "run": self.name,
            **own,
            "state": self.state,
            "step": str(last.get("step", 0)),
            "loss": loss,
            **held_out,
        }


def rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """The table: a line of column names, and one for each run."""
    found = [line.row() for line in lines]
    columns = list(dict.fromkeys(name for row in found for name in row))
    return [tuple(columns), *(tuple(row.get(name, "") for name in columns) for row in found)]


class Live:
    """A tqdm bar over the steps, and under it a line for each run, on a terminal; elsewhere the bar alone."""

    def __init__(self, total: int, start: int, lines: Sequence[Line]) -> None:
        self._bar = progress.bar(total, start)
        room = shutil.get_terminal_size().lines - 3
        shown = min(len(lines) + 1, room) if sys.stderr.isatty() else 0
        make = need("tqdm").tqdm
        self._lines = [make(total=0, position=1 + n, bar_format="{desc}", leave=False) for n in range(shown)]

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in (*self._lines, self._bar):
            line.close()

    def show(self, lines: Sequence[Line]) -> None:
        """Advance the bar by one step."""
        going = [line for line in lines if line.state == "training"]
        self._bar.set_postfix_str(f"{len(going)} of {len(lines)} adapters train", refresh=False)
        self._bar.update()
        if self._lines:
            texts = folders.table(rows(lines)).split("\n")
            for line, text in zip(self._lines, texts, strict=False):  # as many as there is room for
                line.set_description_str(text)


def write_summary(lines: Sequence[Line], path: Path) -> None:
    """Write the table as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows(lines))
    files.write_atomic(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


def draw(lines: Sequence[Line], path: Path) -> None:
    """Write the loss curves of all runs as a PNG: running means, and held-out losses where there are some."""
    need("matplotlib").use("Agg")  # no window: a server has no display
    plt = need("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(8, 5))
    colours = plt.get_cmap("viridis")
    for number, line in enumerate(lines):
        losses = [one["loss"] for one in line.records]
        colour = colours(number / max(len(lines) - 1, 1))
        mean = records.smoothed(losses, keep=1 - 1 / max(len(losses) / 20, 1))
        axes.plot([one["step"] for one in line.records], mean, color=colour, label=line.name)
        held_out = [one for one in line.records if "eval_loss" in one]
        axes.plot([one["step"] for one in held_out], [one["eval_loss"] for one in held_out], "o", color=colour)
    axes.set(xlabel="optimizer step", ylabel="loss (line: training, dots: held out)")
    axes.set_ylim(bottom=records.bottom([one["loss"] for line in lines for one in line.records]))
    axes.grid(alpha=0.3)
    if len(lines) <= _LEGEND:
        axes.legend(fontsize="small")
    figure.tight_layout()
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)
