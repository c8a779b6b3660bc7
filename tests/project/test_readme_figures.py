"""The figures in README.md are those of the last measurements, in benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from places import ROOT

README = (ROOT / "README.md").read_text()
BASE, PEFT, OURS, BOUND, FUNC = "base alone", "peft", "peftfn", "bind + backward", "torch.func.grad"
KINDS = [f"{base}, dropout {dropout}" for base in ("float32", "bfloat16 base") for dropout in ("0", "0.1")]


def row(file: str, group: str, what: str) -> dict[str, Any]:
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    (found,) = [one for one in rows if (one["group"], one["what"]) == (group, what)]
    return found


def median(field: str, file: str, group: str, what: str) -> float:
    value = row(file, group, what)[field]
    return value["median"] if isinstance(value, dict) else value


def step(kind: str, what: str) -> float:
    return median("to_floor", "training_step", f"training step, {kind}", what)


def kept(kind: str, what: str) -> float:
    """MiB kept for backward beyond the base."""
    own, base = (row("saved", f"kept, {kind}", one)["bytes"] for one in (what, BASE))
    return (own - base) / 2**20


def peak(kind: str, what: str) -> float:
    return median("mib", "peak", f"peak, {kind}", what)


def rows_of_one_token(how: str, what: str) -> float:
    return median("to_floor", "many", f"one token, 32 rows, {how}", what)


def ms(group: str, what: str) -> float:
    return median("ms", "many", group, what)


def merge(size: str, field: str, what: str) -> float:
    return median(field, f"merge-{size}gb", f"merge of {size} GB", what)


EACH, OTHER = "an adapter each", "in another order"
ALL_GRAPHS = ("16 adapters of one rank", "16 adapters of mixed ranks", "16 assignments of rows")
CONVOLUTION = ("convolutions", "forward, 8×64→64 32×32, 3×3/1, r=16")
FORWARD = ("training_step", "forward of one token")
ENSEMBLE, GRADIENTS = "ensemble of 8, one token, 32 in peft", "training 32 adapters, 16 tokens each"

# By how a line of the table begins: peft's figures and ours, as functions of the rows.
SPEED: dict[str, Callable[[], tuple[list[float], list[float]]]] = {
    "training step of a 4-layer Llama": lambda: (
        [step(k, PEFT) for k in KINDS[:2]],
        [step(k, BOUND) for k in KINDS[:2]],
    ),
    "the same on a bfloat16 base": lambda: ([step(k, PEFT) for k in KINDS[2:]], [step(k, BOUND) for k in KINDS[2:]]),
    "the same through `torch.func.grad`": lambda: ([], [step(k, FUNC) for k in KINDS]),
    "bytes kept for backward": lambda: ([kept(k, PEFT) for k in KINDS], [kept(k, OURS) for k in KINDS]),
    "peak memory of a step": lambda: ([peak(k, PEFT) for k in KINDS], [peak(k, BOUND) for k in KINDS]),
    "convolution 3×3": lambda: ([median("to_floor", *CONVOLUTION, PEFT)], [median("to_floor", *CONVOLUTION, OURS)]),
    "one token: `bind`; `apply`": lambda: (
        [median("to_floor", *FORWARD, PEFT)],
        [median("to_floor", *FORWARD, one) for one in ("bind", "apply")],
    ),
    "32 rows of one token": lambda: (
        [rows_of_one_token(how, PEFT) for how in (EACH, OTHER)],
        [rows_of_one_token(how, "apply(index=)") for how in (EACH, OTHER)],
    ),
    "the same, bound once": lambda: (
        [rows_of_one_token(how, PEFT) for how in (EACH, OTHER)],
        [rows_of_one_token(how, "bind(index=)") for how in (EACH, OTHER)],
    ),
    "an ensemble of 8": lambda: ([ms(ENSEMBLE, PEFT)], [ms(ENSEMBLE, "apply(index=)")]),
    "gradients of 32 adapters": lambda: ([ms(GRADIENTS, PEFT)], [ms(GRADIENTS, "apply(index=)")]),
    "graphs that `torch.compile` makes": lambda: (
        [row("graphs", "graphs", one)["graphs of peft"] for one in ALL_GRAPHS],
        [row("graphs", "graphs", one)["graphs"] for one in ALL_GRAPHS],
    ),
    "a merge of 2 GB": lambda: ([1, 1], [merge("2", field, "merge_folder") for field in ("to_peft", "peak_to_peft")]),
    "the same of 10 GB": lambda: (
        [1, 1],
        [merge("10", field, "merge_folder") for field in ("to_peft", "peak_to_peft")],
    ),
}


def lines() -> list[list[str]]:
    section = README.split("## Speed")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def holds(text: str, values: list[float]) -> None:
    """The figures in a text are the values, as far as they have digits."""
    figures = re.findall(r"\d+(?:\.\d+)?", text)
    assert len(figures) == len(values), (text, values)
    for figure, value in zip(figures, values, strict=True):
        digits = len(figure.partition(".")[2])
        assert abs(float(figure) - value) <= 0.5000001 * 10**-digits, (text, values)


@pytest.mark.parametrize("line", lines(), ids=lambda line: line[0][:30])
def test_figures_of_a_line_are_measured(line: list[str]) -> None:
    what, theirs, ours = line
    (start,) = [one for one in SPEED if what.startswith(one)]
    expected = SPEED[start]()
    holds(theirs, expected[0])
    holds(ours, expected[1])


def test_every_measured_line_is_in_the_table() -> None:
    assert len(lines()) == len(SPEED)


def test_peak_memory_of_the_base_alone_is_measured() -> None:
    (text,) = re.findall(r"the base alone ([\d; ]+)\)", README)
    holds(text, [peak(kind, BASE) for kind in KINDS])


def test_figures_on_quantized_bases_are_measured() -> None:
    section = README.split("`python benchmarks/quantized.py`")[1].split("\n\n")[0]
    kinds = [f"nf4, {dtype}, dropout {dropout}" for dtype in ("bfloat16", "float32") for dropout in ("0", "0.1")]
    saved = [median("to_peft", "quantized_saved", f"kept, {kind}", OURS) for kind in kinds]
    times = [median("to_peft", "quantized", f"training step, {kind}", "apply + backward") for kind in kinds]
    eight = [
        median("to_peft", "quantized", f"training step, 8-bit, float32, dropout {dropout}", "apply + backward")
        for dropout in ("0", "0.1")
    ]
    section = re.sub(r"nf4|bfloat16|float32|8-bit", "", section)
    holds(section, [*saved, min(times), max(times), *eight])
