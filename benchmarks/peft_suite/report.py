"""The tables of a run, as Markdown; and whether a sample is worse than what is kept."""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_suite import fetch, judge, kept
from peft_suite.inventory import Case
from peft_suite.table import TESTS
from peft_suite.verdicts import (
    BAD,
    CRASH,
    LEFT,
    NOT_OFFERED,
    OUT,
    REFUSED,
    RIGHT,
    UNFIT,
    UNWRITTEN,
    VALUES,
    WRONG,
    Verdict,
)

Found = Sequence[tuple[Case, Verdict]]
WORDS = (RIGHT, WRONG, CRASH, REFUSED, OUT, NOT_OFFERED, VALUES, LEFT, UNFIT, UNWRITTEN)
WORSE = (RIGHT, REFUSED, CRASH, OUT, WRONG)
MEANING = {
    RIGHT: "what peft computes, in float64 or by its own file, or the mathematics where peft is wrong",
    WRONG: "something else, without a word",
    CRASH: "an error that is not this library's own",
    REFUSED: "an error of this library's own, where peft has a result",
    OUT: "over the time limit",
    NOT_OFFERED: "a method, a field or an operation that is not here; counted by name below",
    VALUES: "about the state of peft's wrappers (names, active adapters, deleting): an adapter here is a value",
    LEFT: "peft's own tests skip it, or peft itself raises",
    UNFIT: "needs what is not at hand; counted below",
    UNWRITTEN: "nobody has written a counterpart",
}


def against(found: Found, before: kept.Kept, *, whole: bool) -> int:
    """Print what is not right; 1 where a verdict is worse than the kept one."""
    worse: list[str] = []
    for case, verdict in found:
        counts = before.counts.get((kept.test(case), kept.method(case)), {})
        if verdict.word not in WORSE[1:]:
            if verdict.word != RIGHT and counts and verdict.word not in counts:
                worse.append(f"{case.name}: {verdict.word} ({verdict.why}); none was before")
            continue
        known = before.bad.get(case.name, RIGHT)
        if verdict.word == REFUSED and counts.get(NOT_OFFERED) and known == RIGHT:
            continue  # it may be one of those that were not offered: the kept run does not say which
        if WORSE.index(verdict.word) > WORSE.index(known):
            worse.append(f"{case.name}: {verdict.word}, was {known}: {verdict.why}")
        elif whole:
            print(f"{case.name}: {verdict.word}: {verdict.why}")
    counted = collections.Counter(verdict.word for _, verdict in found)
    print(f"{len(found)} cases: " + ", ".join(f"{counted[word]} {word}" for word in WORDS if counted[word]))
    print("\n".join(worse) or "none is worse than what is kept")
    sys.stdout.flush()
    return 1 if worse else 0


def write(found: Found, path: Path) -> None:
    """Write the page."""
    total = collections.Counter(verdict.word for _, verdict in found)
    head = (
        f"# peft's own tests, through peftfn\n\nThe test tables of peft {fetch.version()}: {len(found):,} cases, each "
        f"with what stands for it here. `{kept.COMMAND}` writes this page.\n\nBases from a hub are built tiny from the "
        "config of their architecture (`benchmarks/peft_suite/models.py`). Outputs, gradients and steps are held to "
        "peft in float64, tokens are peft's in float64. A test without a counterpart of its own is run as it is, and "
        "what it builds goes through the laws (`battery.py`)."
    )
    parts = [
        head,
        _table(("verdict", "cases", "what it means"), [(w, f"{total[w]:,}", MEANING[w]) for w in WORDS if total[w]]),
        "## Kinds of failures\n\nOne example of each; all cases are in `peft-suite.json`.\n\n" + _failures(found),
        "## By method\n\n" + _by_method(found),
        "## By procedure, of the methods that are here\n\nRight, of those that have a result in peft.\n\n"
        + _by_test(found),
        "## Promised there, not offered here\n\n" + _named(found, NOT_OFFERED),
        "## No meaning here\n\n" + _named(found, VALUES),
        "## Not run\n\n" + _named(found, UNFIT),
        "## No counterpart written\n\n" + _unwritten(found),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _failures(found: Found) -> str:
    kinds: dict[tuple[str, str], list[tuple[Case, Verdict]]] = {}
    for case, verdict in found:
        if verdict.word in BAD:
            kinds.setdefault((verdict.word, kind(verdict.why)), []).append((case, verdict))
    ordered = sorted(kinds.items(), key=lambda item: (WORDS.index(item[0][0]), -len(item[1])))
    rows = [
        (word, len(some), ", ".join(sorted({case.test.removeprefix("test_") for case, _ in some})), _example(some[0]))
        for (word, _), some in ordered
    ]
    return _table(("verdict", "cases", "tests", "example"), rows) if rows else "None."


def kind(why: str) -> str:
    """A reason without what differs from case to case: numbers, paths, and lists."""
    plain = re.sub(r"\[.*?\]|\{.*?\}|'[^']*'|\d[\d.e+-]*|\w+Config\b|\w+(?<!Runtime)Model\b", "*", why)
    return re.sub(r"\b(?:[\w*]+\.)+[\w*]+\b", "*", plain)[:70]


def _example(one: tuple[Case, Verdict]) -> str:
    case, verdict = one
    return f"`{case.name[:140]}`: {verdict.why[:260]}"


def _by_method(found: Found) -> str:
    counts: dict[str, collections.Counter[str]] = {}
    for case, verdict in found:
        counts.setdefault(kept.method(case), collections.Counter())[verdict.word] += 1
    words = [word for word in WORDS if any(one[word] for one in counts.values())]
    ordered = sorted(counts.items(), key=lambda item: (item[0] not in judge.OFFERED, item[0]))
    rows = [(name, sum(one.values()), *[one[word] or "" for word in words]) for name, one in ordered]
    return _table(("method", "cases", *words), rows)


def _by_test(found: Found) -> str:
    counts: dict[str, dict[str, collections.Counter[str]]] = {}
    for case, verdict in found:
        if verdict.word in WORSE:
            own = (case.file, case.test) in TESTS or "model_id" in case.params
            name = case.test.removeprefix("test_") if own else "(what other tests build, by the laws)"
            one = counts.setdefault(name, {})
            one.setdefault(kept.method(case), collections.Counter())[verdict.word] += 1
    methods = sorted({name for one in counts.values() for name in one}, key=lambda name: (name == "-", name))
    rows = [(name, *[_cell(one.get(method)) for method in methods]) for name, one in sorted(counts.items())]
    return _table(("procedure", *methods), rows)


def _cell(words: Mapping[str, int] | None) -> str:
    if not words:
        return ""
    total = sum(words.values())
    return str(total) if words.get(RIGHT) == total else f"**{words.get(RIGHT, 0)} of {total}**"


def _named(found: Found, word: str) -> str:
    counts = collections.Counter(verdict.why for _, verdict in found if verdict.word == word)
    return _table(("what", "cases"), [(why, number) for why, number in counts.most_common()]) if counts else "None."


def _unwritten(found: Found) -> str:
    counts = collections.Counter(f"{case.file}.{case.test}" for case, verdict in found if verdict.word == UNWRITTEN)
    return _table(("test", "cases"), sorted(counts.items())) if counts else "None."
