"""What a measurement is, as a value, as text and as a line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

FLOOR = "base alone"
PEFT = "peft"
FUNCTIONAL_FLOOR, BARE_ROWS = f"{FLOOR}, torch.func.grad", "base, 8 rows"
HAND = "by hand"
BESIDE = frozenset({FLOOR, FUNCTIONAL_FLOOR, BARE_ROWS, HAND})
"""Cases that are neither ours nor peft's."""
RESULTS = Path(__file__).parent.parent / "results"


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
        to: the same over that of every other case, by name.
        excess: what it takes beyond the base alone, over the median of what peft takes beyond it; `None` where peft
            takes nothing beyond.
        repeats: samples.
        calls: calls in each sample.
        sizes: what the group's model and batch measure.
        peak: on a GPU, bytes allocated beyond what was there before the call, at most.
        peak_to_peft: that over peft's.
    """

    group: str
    what: str
    ms: Quartiles
    to_floor: Quartiles
    to_peft: Quartiles
    to: Mapping[str, Quartiles]
    excess: Quartiles | None
    repeats: int
    calls: int
    sizes: Mapping[str, int]
    peak: int | None = None
    peak_to_peft: float | None = None


class Measured(Protocol):
    """What `write` and `draw` need of a row: a named tuple with at least these."""

    @property
    def group(self) -> str:
        """The cases that it was measured beside."""
        ...

    @property
    def what(self) -> str:
        """Its case."""
        ...

    @property
    def to_floor(self) -> Quartiles:
        """It, over the base alone."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


def quartiles(values: Sequence[float]) -> Quartiles:
    """The quartiles of the samples, to five digits; one alone has no spread."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]
    return Quartiles(rounded(median), rounded(low), rounded(high))


def exactly(value: float) -> Quartiles:
    """What is counted, not timed: it has no spread."""
    return Quartiles(*[rounded(value)] * 3)


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


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
        excess = "" if row.excess is None else f"{row.excess.median:6.3f}"
        lines.append(f"  {row.what:{width}}  {ms}  {ratios}  {row.to_peft.median:6.3f}  {excess}".rstrip())
    return "\n".join(lines)


def command() -> str:
    """The command that makes these rows again; where they go is nobody's matter but that run's."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    at = words.index("--output") if "--output" in words else len(words)
    return " ".join(words[:at] + words[at + 2 :])


def write(rows: Sequence[Measured], path: Path, **about: Any) -> None:
    """Write a JSON list with one measurement a line; `about`, and the command, are added to each."""
    save([row._asdict() for row in rows], path, **about)


def save(rows: Sequence[Mapping[str, Any]], path: Path, **about: Any) -> None:
    """The same of rows that are mappings."""
    lines = [json.dumps(_plain(row) | {"command": command()} | about) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Named tuples as mappings: JSON would make lists of them."""
    if isinstance(value, Quartiles):
        return value._asdict()
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, Mapping) else value
