"""The page and the picture of all that was measured: every row of results/*.json, and what each goal came to.

Nothing is measured here: the same rows give the same page.

    python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.goals import GOALS, Goal
from lib.pictures import Line, ratios
from lib.records import BESIDE, PEFT, RESULTS, Quartiles, exactly, rounded

Record = Mapping[str, Any]
NEEDED = {"group", "what", "repeats", "machine", "versions"}
HEAD = (
    "`python benchmarks/report.py` writes this page from the rows in `*.json` beside it; `make bench` measures all of "
    "them again first. Every case is held against peft, or the mathematics, before it is timed."
)
COLUMNS = {
    "ms": "ms",
    "to_floor": "over the base",
    "to_peft": "over peft",
    "excess": "beyond the base, over peft",
    "peak_to_peft": "peak memory over peft",
}
TO_PEFT = {"to_peft": "", "excess": ", beyond the base", "peak_to_peft": ", peak memory"}
COPIES = {"read and write", "read and write, fsync", "copy in the kernel"}
NOT_OURS = {PEFT, "always apart", "always as one"} | BESIDE | COPIES


class Found(NamedTuple):
    """What a goal came to: the rows that it is about, the value of the worst, and whether that is enough."""

    goal: Goal
    rows: Sequence[Record]
    value: Quartiles | None
    met: bool | None


def read(folder: Path) -> list[Record]:
    """Every row in the folder.

    Raises:
        ValueError: a file holds something else.
    """
    rows: list[Record] = []
    for path in sorted(folder.glob("*.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(held, dict):
            continue  # a table of verdicts, which has a page of its own
        for number, row in enumerate(held, 1):
            if missing := NEEDED - set(row):
                raise ValueError(
                    f"{path}, row {number} has no {', '.join(sorted(missing))}; expected a row as records.write writes "
                    "it: measure again."
                )
            rows.append({"command": made_by(path), **row})
    return rows


def made_by(path: Path) -> str:
    """The command of a row that does not name its own: the script of the file's name, if there is one."""
    script = Path(__file__).with_name(f"{path.stem}.py")
    return f"python benchmarks/{script.name}" if script.is_file() else "?"


def ratio(row: Record, name: str) -> Quartiles | None:
    """A row's ratio of that name; `to.NAME` is its time over that of case NAME. A count has no spread."""
    found: Any = row.get("to", {}).get(name.removeprefix("to.")) if name.startswith("to.") else row.get(name)
    if found is None:
        return None
    return Quartiles(**found) if isinstance(found, Mapping) else exactly(found)


def inverse(value: Quartiles) -> Quartiles:
    """How many times as fast: over one in place of under it."""
    return Quartiles(rounded(1 / value.median), rounded(1 / value.high), rounded(1 / value.low))


def judged(goal: Goal, rows: Sequence[Record]) -> Found:
    """What the goal came to."""
    meant = [
        row
        for row in rows
        if fnmatch.fnmatchcase(row["group"], goal.group)
        and row["what"] == goal.case
        and row["machine"].get("device", "cpu") == goal.device
    ]
    values = [value for row in meant for name in goal.ratios if (value := ratio(row, name)) is not None]
    if not values:
        return Found(goal, meant, None, None)
    worst = max(values)
    if goal.times:
        worst = inverse(worst)
    return Found(goal, meant, worst, worst.median >= goal.limit if goal.times else worst.median <= goal.limit)


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(value: Quartiles) -> str:
    """The quartiles, where there are any."""
    return "" if value.low == value.high else f"{number(value.low)} to {number(value.high)}"


def cell(value: Quartiles | None) -> str:
    """The median, and the quartiles where there are any."""
    if value is None:
        return ""
    return f"{number(value.median)} ({spread(value)})" if spread(value) else number(value.median)


def over(goal: Goal) -> str:
    """What the goal's ratios are over, in words."""
    if goal.times:
        return "peft's time over ours"
    if goal.group.startswith("kept") and goal.ratios == ("to_peft",):
        return "bytes over peft's"
    names = {"to_peft": "time over peft's", "to_floor": "time over the bare base's", "to_copy": "time over a copy's"}
    names |= {"excess": "beyond the base, over peft's", "peak_to_peft": "memory over peft's", "graphs": "graphs"}
    return names.get(goal.ratios[0], "time over the better's")


def goals_table(found: Sequence[Found]) -> list[str]:
    """The goals as Markdown."""
    lines = ["| | what | ratio | goal | median | quartiles | | made by |", "|---|---|---|---|---|---|---|---|"]
    section = ""
    for goal, rows, value, met in found:
        title = "" if goal.section == section else goal.section
        section = goal.section
        limit = f"{'≥' if goal.times else '≤'} {goal.limit:g}"
        results = ("", "", "not measured") if value is None else (number(value.median), spread(value), word(met))
        made = ", ".join(dict.fromkeys(f"`{row['command']}`" for row in rows))
        lines.append(f"| {' | '.join([title, goal.what, over(goal), limit, *results, made])} |")
    return lines


def word(met: bool | None) -> str:
    return "met" if met else "**missed**"


def rows_table(rows: Sequence[Record]) -> list[str]:
    """Every row as Markdown."""
    lines = [
        f"| measurement | case | {' | '.join(COLUMNS.values())} | samples |",
        "|---|---|" + "---|" * len(COLUMNS) + "---|",
    ]
    group = ""
    for row in rows:
        title = "" if label(row) == group else label(row)
        group = label(row)
        cells = [cell(ratio(row, name)) for name in COLUMNS]
        lines.append(f"| {' | '.join([title, row['what'], *cells, str(row['repeats'])])} |")
    return lines


def lines_of(rows: Sequence[Record], found: Sequence[Found]) -> list[Line]:
    """The lines of the picture: of each group with a goal over peft, every time over peft's and what else is a goal."""
    aimed = {
        (label(row), row["what"], goal.ratios[0]): (1 / goal.limit if goal.times else goal.limit, met)
        for goal, meant, _, met in found
        for row in meant
    }
    shown = {group for group, _, name in aimed if name in TO_PEFT}
    lines: list[Line] = []
    for row in rows:
        if row["what"] in NOT_OURS or label(row) not in shown or ratio(row, "to_peft") is None:
            continue
        if all(line.text != label(row) for line in lines):
            lines.append(Line(label(row)))
        for name, text in TO_PEFT.items():
            value, aim = ratio(row, name), aimed.get((label(row), row["what"], name))
            if value is not None and (aim or name == "to_peft"):
                lines.append(Line(row["what"] + text, value, *(aim or ())))
    return lines


def label(row: Record) -> str:
    """The row's group, with the device where it is not the CPU."""
    device = row["machine"].get("device", "cpu")
    return row["group"] if device == "cpu" else f"{row['group']}, {device}"


def places(rows: Sequence[Record]) -> list[str]:
    """Where the rows come from: for each command the machine and the versions."""
    lines = ["| command | machine | versions |", "|---|---|---|"]
    seen = dict.fromkeys((row["command"], _listed(row["machine"]), _listed(row["versions"])) for row in rows)
    return lines + [f"| `{command}` | {machine} | {versions} |" for command, machine, versions in seen]


def _listed(what: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in what.items())


def page(rows: Sequence[Record]) -> str:
    """The whole page."""
    found = [judged(goal, rows) for goal in GOALS]
    met, missed = (sum(one.met is this for one in found) for this in (True, False))
    says = (
        f"Of {len(found)} goals {met} are met, {missed} are missed and {len(found) - met - missed} are not measured "
        "here. ≤ is met by a median of that or less, ≥ by that or more. Quartiles are over the rounds of one run, in "
        "which all cases took turns; what is counted has none."
    )
    if not any(row["machine"].get("device") == "cuda" for row in rows):
        says += " `make bench-gpu` has not been run yet: no row comes from a GPU."
    parts = (
        ["# What was measured", "", HEAD, "", says, "", *goals_table(found), "", "![ratios to peft](ratios.png)"],
        ["## Every measurement", "", *rows_table(rows)],
        ["## Where", "", *places(rows)],
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the page and the picture of all that was measured.")
    parser.add_argument("--quick", action="store_true", help="print what the goals came to; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder with the rows (results)")
    given = parser.parse_args()
    rows = read(given.output)
    found = [judged(goal, rows) for goal in GOALS]
    for goal, _, value, met in found:
        result = "not measured" if value is None else f"{number(value.median)} {word(met).strip('*')}"
        print(f"{goal.section}: {goal.what}: {over(goal)}: {'≥' if goal.times else '≤'} {goal.limit:g}: {result}")
    if not given.quick:
        (given.output / "README.md").write_text(page(rows), encoding="utf-8")
        ratios(lines_of(rows, found), given.output / "ratios.png")
        print(f"written to {given.output}")


if __name__ == "__main__":
    main()
