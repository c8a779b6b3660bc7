"""benchmarks/results/zoo.md: totals by family and check, then every class and check that is not right, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from zoo import table
from zoo.checks import CHECKS
from zoo.classes import FAMILIES
from zoo.reasons import UNEXPLAINED, explained
from zoo.table import Found
from zoo.verdicts import CRASH, NOT_APPLICABLE, REFUSED, RIGHT, WRONG

BAD = (WRONG, CRASH, REFUSED)


def write(found: Found, version: str, names: Iterable[str]) -> None:
    """Keeps what was found, and writes the page from all tables that are kept."""
    table.write(found, version, names)
    kept = {one: table.read(one) for one in table.versions()}
    (table.RESULTS / "zoo.md").write_text("\n".join(_page(kept)) + "\n")
    print(f"{table.path_of(version)} and zoo.md:", *_summary(found), sep="\n  ")


def _page(kept: dict[str, Found]) -> list[str]:
    lines = [
        "# Every architecture of transformers, tiny, through every check",
        "",
        "`make zoo` writes this page: each class that transformers names for these families is built tiny from its",
        "configuration, and what peftfn makes of it is held against copies with weights replaced by hand, decoding by",
        "hand, rows by themselves, and peft. What a check does is in `benchmarks/zoo/checks_*.py`, why one is not",
        "right in `benchmarks/zoo/reasons.py`. A cell reads right / wrong / crash / refused; what a check says nothing",
        "about is not counted.",
    ]
    for version, found in kept.items():
        lines += ["", f"## transformers {version}", "", *(f"- {line}" for line in _summary(found))]
        lines += ["", *_totals(found), "", "### Not right", "", *_bad(found), "", "### Not built", "", *_unbuilt(found)]
    return lines


def _summary(found: Found) -> list[str]:
    """Totals over classes and over single checks, the worst verdict of a class counting."""
    built = {name: checks for name, checks in found.items() if "build" not in checks}
    lines = [f"{len(found)} classes, {len(built)} of them built here"]
    for title, checks in GROUPS.items():
        worst = Counter(_worst(one, checks) for one in built.values())
        counted = sum(worst.values()) - worst[None]
        told = ", ".join(f"{worst[verdict]} {verdict}" for verdict in (*BAD, RIGHT))
        lines.append(f"{title}: of {counted} classes {told}")
    singles = Counter(one["verdict"] for checks in built.values() for one in checks.values())
    lines.append("single checks: " + ", ".join(f"{singles[v]} {v}" for v in (RIGHT, *BAD, NOT_APPLICABLE)))
    return lines


GROUPS: dict[str, list[str]] = {
    "layers (LoRA, IA3, experts, bind, merge, files, grad, vmap, rows, generate)": [
        name for name in CHECKS if not name.startswith(("prompt", "prefix"))
    ],
    "prompts": [name for name in CHECKS if name.startswith("prompt")],
    "prefixes": [name for name in CHECKS if name.startswith("prefix")],
}


def _worst(checks: Any, names: list[str]) -> str | None:
    verdicts = {checks[name]["verdict"] for name in names if name in checks}
    return next((verdict for verdict in (*BAD, RIGHT) if verdict in verdicts), None)


def _totals(found: Found) -> list[str]:
    cells: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for checks in found.values():
        for check, one in checks.items():
            cells[one["family"], check][one["verdict"]] += 1
            cells["all", check][one["verdict"]] += 1
    names = [name for name in CHECKS if any(check == name for _, check in cells)]
    lines = ["| family | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for family in [*FAMILIES, "all"]:
        row = [" / ".join(str(cells[family, name][v]) for v in (RIGHT, *BAD)) for name in names]
        lines.append(f"| {family} | " + " | ".join("" if cell == "0 / 0 / 0 / 0" else cell for cell in row) + " |")
    return lines


def _bad(found: Found) -> list[str]:
    """What is not right, under its reason: the most frequent first, what nobody explained at the top."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, checks in found.items():
        for check, one in checks.items():
            if one["verdict"] in BAD:
                said = explained(name, check, checks)
                groups[said].append(
                    f"| {name} | {check} | {one['verdict']} | {_numbers(one)} | {_short(one['reason'])} |"
                )
    lines: list[str] = []
    for said in sorted(groups, key=lambda one: (one != UNEXPLAINED, -len(groups[one]))):
        lines += [
            f"**{said}** ({len(groups[said])})",
            "",
            "| class | check | verdict | off / effect | said |",
            "|---|---|---|---|---|",
        ]
        lines += [*groups[said], ""]
    return lines or ["Nothing."]


def _numbers(one: Any) -> str:
    numbers = one["numbers"]
    shown = [numbers[name] for name in ("off", "func.grad", "effect", "scale") if name in numbers][:2]
    return " / ".join(f"{value:.2g}" for value in shown)


def _short(text: str) -> str:
    return text.replace("|", "\\|")[:200]


def _unbuilt(found: Found) -> list[str]:
    return [f"- {name}: {_short(checks['build']['reason'])}" for name, checks in found.items() if "build" in checks]
