"""The progress bar: loss, throughput and time left."""

from __future__ import annotations

import sys
from typing import Any

from peftfn.cli.errors import need
from peftfn.cli.train import records

_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {elapsed} gone, {remaining} left{postfix}"


class Watch:
    """Counts terms and the seconds spent on them, so that time spent on measuring or saving is left out."""

    def __init__(self) -> None:
        self.terms = 0
        self.seconds = 0.0

    def add(self, terms: int, seconds: float) -> float:
        """The throughput up to now."""
        self.terms += terms
        self.seconds += seconds
        return self.terms / max(self.seconds, 1e-9)


def bar(total: int, start: int) -> Any:
    """A tqdm bar over optimizer steps, of which `start` are done."""
    return need("tqdm").tqdm(
        total=total,
        initial=start,
        desc="training",
        bar_format=_FORMAT,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file keeps every line of it
    )


def counting(total: int, what: str, unit: str) -> Any:
    """A tqdm bar that counts up to a total."""
    return need("tqdm").tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )


def show(bar: Any, unit: str, metrics: list[records.Record]) -> None:
    """Advance the bar by one step, with the running mean of the loss and the throughput of the last record."""
    loss = records.smoothed([r["loss"] for r in metrics[-50:]], keep=0.9)[-1]
    bar.set_postfix_str(f"loss {loss:.4f}, {metrics[-1][f'{unit}_per_second']:,.0f} {unit}/s", refresh=False)
    bar.update()
