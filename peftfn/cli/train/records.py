"""What a run leaves to look at: metrics.jsonl, one line a step, and loss.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftfn.cli.errors import need
from peftfn.core import files

METRICS = "metrics.jsonl"
PICTURE = "loss.png"

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records in `path`; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is cut short, or empty


def keep_until(path: Path, step: int) -> list[Record]:
    """Drop the records after `step`: a resumed run writes them again."""
    kept = [record for record in read(path) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    files.write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return kept


def append(path: Path, record: Record) -> None:
    """Add one line."""
    with files.naming_what_has_no_room(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def smoothed(values: list[float], keep: float) -> list[float]:
    """The running mean in which each value's share falls by `keep` a step, without bias towards the first."""
    means: list[float] = []
    total = share = 0.0
    for value in values:
        total = keep * total + value
        share = keep * share + 1
        means.append(total / share)
    return means


def bottom(losses: Sequence[float]) -> float | None:
    """Where the axis of a picture begins: at 0, or `None`, which is where the losses begin, if that is far above it."""
    known = [loss for loss in losses if math.isfinite(loss)]
    return 0 if known and 0 <= min(known) < 0.5 * max(known) else None


def draw(records: list[Record], path: Path) -> None:
    """Write the loss curve as a PNG: each step, the running mean, and the held-out loss if there is one."""
    need("matplotlib").use("Agg")  # no window: a server has no display
    plt = need("matplotlib.pyplot")
    train = [r for r in records if "loss" in r]
    held_out = [r for r in records if "eval_loss" in r]
    losses = [r["loss"] for r in train]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in train], losses, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    mean = smoothed(losses, keep=1 - 1 / max(len(losses) / 20, 1))
    axes.plot([r["step"] for r in train], mean, color="tab:blue", label="running mean")
    if held_out:
        axes.plot(
            [r["step"] for r in held_out],
            [r["eval_loss"] for r in held_out],
            "o-",
            color="tab:orange",
            label="held out",
        )
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.set_ylim(bottom=bottom(losses))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    files.write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)
