"""The page of measurements says what the rows say, and a measurement what the clock said."""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from places import ROOT


class Modules(NamedTuple):
    """What is tested: scripts that are no package."""

    report: Any
    goals: Any
    harness: Any
    timing: Any
    records: Any


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Modules:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report
    from lib import goals, harness, records, timing

    return Modules(report, goals, harness, timing, records)


def row(ratio: Any, group: str = "a forward", **more: Any) -> dict[str, Any]:
    place = {"cpu": "a CPU", "device": "cpu"}
    about = {"repeats": 9, "machine": place, "versions": {"torch": "2"}, "command": "python benchmarks/x.py"}
    return {"group": group, "what": "bind", "to_peft": ratio, **about, **more}


def spread(low: float, median: float, high: float) -> dict[str, float]:
    return {"low": low, "median": median, "high": high}


def test_committed_page_is_what_the_committed_rows_give(at: Modules) -> None:
    folder = ROOT / "benchmarks" / "results"
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert written == at.report.page(at.report.read(folder)), "python benchmarks/report.py writes it again"


def test_goal_of_a_measurement_that_is_there_names_one_of_its_cases(at: Modules) -> None:
    rows = at.report.read(ROOT / "benchmarks" / "results")
    for goal in at.goals.GOALS:
        cases = {row["what"] for row in rows if fnmatch.fnmatchcase(row["group"], goal.group)}
        assert not cases or goal.case in cases, goal


@pytest.mark.parametrize(
    ("ratio", "limit", "times", "median", "met"),
    [
        (spread(0.4, 0.5, 0.6), 0.5, False, 0.5, True),
        (spread(0.4, 0.51, 0.6), 0.5, False, 0.51, False),
        (spread(0.2, 0.25, 0.5), 4, True, 4, True),
        (spread(0.2, 0.26, 0.5), 4, True, 3.8462, False),
        (2, 2, False, 2, True),  # a count
    ],
)
def test_goal_is_met_by_the_median(
    at: Modules, ratio: Any, limit: float, times: bool, median: float, met: bool
) -> None:
    goal = at.goals.Goal("a", "b", limit, "a forward", "bind", times=times)
    found = at.report.judged(goal, [row(ratio)])
    assert (found.value.median, found.met) == (median, met)
    assert found.value.low <= found.value.median <= found.value.high


def test_worst_row_and_ratio_count(at: Modules) -> None:
    to = {"one": spread(0.8, 0.9, 1.0), "other": spread(1.0, 1.1, 1.2)}
    rows = [row(spread(0, 0, 0), f"convolution {name}", to=to) for name in "ab"]
    rows[1]["to"] = {**to, "one": spread(1.1, 1.2, 1.3)}
    goal = at.goals.Goal("a", "b", 1.15, "convolution *", "bind", ("to.one", "to.other"))
    assert at.report.judged(goal, rows[:1]).value.median == 1.1
    assert at.report.judged(goal, rows[:1]).met
    assert at.report.judged(goal, rows).value.median == 1.2
    assert not at.report.judged(goal, rows).met


def test_goal_of_another_device_or_case_is_not_measured(at: Modules) -> None:
    rows = [row(0.1), row(0.1, what="apply", machine={"device": "cuda"})]
    for goal in (
        at.goals.Goal("a", "b", 1, "a forward", "bind", device="cuda"),
        at.goals.Goal("a", "b", 1, "a forward", "apply"),
        at.goals.Goal("a", "b", 1, "another", "bind"),
    ):
        assert at.report.judged(goal, rows)[2:] == (None, None)


def test_row_of_another_form_is_refused_by_name(at: Modules, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps([row(0.5), {"what": "x"}]))
    with pytest.raises(ValueError, match=r"odd\.json, row 2 has no group, machine, repeats, versions; expected a row"):
        at.report.read(tmp_path)


def test_page_says_whether_a_gpu_was_there(at: Modules) -> None:
    says = "`make bench-gpu` has not been run yet"
    assert says in at.report.page([row(0.5)])
    assert says not in at.report.page([row(0.5), row(0.5, machine={"device": "cuda"})])


def test_ratios_are_taken_within_a_round(at: Modules) -> None:
    now = [0.0]
    speeds = itertools.chain.from_iterable([speed] * 3 for speed in (1.0, 1.0, 1.0, 3.0, 9.0))  # of the whole machine

    def taking(seconds: float) -> Callable[[], None]:
        def case() -> None:
            now[0] += seconds * next(speeds)

        return case

    cases = {at.harness.FLOOR: taking(1.0), at.harness.PEFT: taking(1.5), "ours": taking(1.25)}
    found = at.harness.measure("g", cases, lambda: now[0], {}, repeats=3, warm_up=2)
    ours = next(one for one in found if one.what == "ours")
    assert ours.to_floor == at.records.exactly(1.25)
    assert ours.to_peft == at.records.exactly(1.25 / 1.5)
    assert ours.to["base alone"] == ours.to_floor
    assert ours.ms.median == 1000 * 1.25 * 3
    assert ours.excess.median == 0.5  # a quarter beyond the base, where peft takes a half


def test_rows_come_back_as_they_were_written(at: Modules, tmp_path: Path) -> None:
    now = itertools.count()
    cases: dict[str, Callable[[], None]] = dict.fromkeys((at.harness.FLOOR, at.harness.PEFT, "bind"), lambda: None)
    rows = at.harness.measure("g", cases, lambda: float(next(now)), {"rows": 1}, repeats=2)
    at.harness.write(rows, tmp_path / "x.json", machine={"device": "cpu"}, versions={})
    for read, written in zip(at.report.read(tmp_path), rows, strict=True):
        assert at.report.ratio(read, "to_peft") == written.to_peft
        assert at.report.ratio(read, "to.peft") == written.to.get("peft")
        assert read["sizes"] == {"rows": 1}


def test_device_that_is_not_there_is_refused(at: Modules) -> None:
    with pytest.raises(ValueError, match="--device tpu: expected cpu or cuda"):
        at.timing.place("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--device cuda: torch .* sees no GPU; leave --device out for the CPU"):
            at.timing.place("cuda")
