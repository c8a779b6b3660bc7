"""Verdicts on disk: each as it is found, and what is kept of a whole run."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_suite import fetch, judge
from peft_suite.inventory import Case
from peft_suite.verdicts import BAD, RIGHT, Verdict

RESULTS = Path(__file__).parents[1] / "results" / "peft-suite.json"
RUN = (RIGHT, *BAD)
"""What comes of a case that was run."""
COMMAND = "make test-peft-suite"


class Kept(NamedTuple):
    """A run as it is kept: every case that is not right, and how many there are of each word.

    Attributes:
        bad: case -> word.
        counts: test, method -> word -> how many.
    """

    bad: Mapping[str, str]
    counts: Mapping[tuple[str, str], Mapping[str, int]]


def method(case: Case) -> str:
    """The method that a case is about, `-` where it names none."""
    found = judge.config_class(case)
    return judge.method_of(found) if found else "-"


def test(case: Case) -> str:
    """The test that a case is one of."""
    return f"{case.file}.{case.test}"


def lines(path: Path) -> dict[str, Verdict]:
    """What was found so far, by case."""
    if not path.exists():
        return {}
    read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: Verdict(word, why) for name, word, why in read}


def append(path: Path, case: Case, verdict: Verdict) -> None:
    """Add one."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps([case.name, *verdict]) + "\n")


def write(path: Path, found: Sequence[tuple[Case, Verdict]]) -> None:
    """Keep a whole run."""
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    for case, verdict in found:
        here = method(case) in judge.OFFERED or verdict.word in RUN
        key = (test(case) if here else "*", method(case))  # of a method that is not here, how many there are
        counts.setdefault(key, collections.Counter())[verdict.word] += 1
    rows = [[*key, dict(sorted(words.items()))] for key, words in sorted(counts.items())]
    bad = sorted([case.name, verdict.word, verdict.why] for case, verdict in found if verdict.word in BAD)
    body: dict[str, Any] = {"peft": fetch.version(), "command": COMMAND, "cases": len(found)}
    text = json.dumps(body)[:-1] + ', "bad": [\n' + _lines(bad) + '\n], "counts": [\n' + _lines(rows) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _lines(rows: Sequence[Any]) -> str:
    return ",\n".join(json.dumps(row) for row in rows)


def read(path: Path) -> Kept:
    """The run that is kept; an empty one where there is none."""
    if not path.exists():
        return Kept({}, {})
    data = json.loads(path.read_text(encoding="utf-8"))
    return Kept({name: word for name, word, _ in data["bad"]}, {(t, m): words for t, m, words in data["counts"]})
