"""The kept table: what each check found on each class with one version of transformers, as compact JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch

from zoo.verdicts import NOT_APPLICABLE, RIGHT

RESULTS = Path(__file__).parent.parent / "results"
Found = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Class to check to its finding: verdict, reason, numbers."""


def path_of(version: str) -> Path:
    return RESULTS / f"zoo-{version}.json"


def write(found: Found, version: str, names: Iterable[str]) -> None:
    """Writes the table: each reason once, what is right by its name alone."""
    reasons: list[str] = []
    classes: dict[str, Any] = {}
    for name in (one for one in names if one in found):
        checks = found[name]
        line: dict[str, Any] = {"family": next(iter(checks.values()))["family"]}
        line["right"] = [check for check, one in checks.items() if one["verdict"] == RIGHT]
        for check, one in checks.items():
            if one["verdict"] != RIGHT:
                line.setdefault(one["verdict"], {})[check] = _entry(one, reasons)
        classes[name] = line
    about = {"transformers": version, "peft": peft.__version__, "torch": torch.__version__}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(line)}" for name, line in classes.items())
    said = ",\n".join(json.dumps(one) for one in reasons)
    path_of(version).write_text(
        f'{{"about": {json.dumps(about)},\n"reasons": [\n{said}\n],\n"classes": {{\n{rows}\n}}}}\n'
    )


def _entry(one: Mapping[str, Any], reasons: list[str]) -> list[Any]:
    if one["reason"] not in reasons:
        reasons.append(one["reason"])
    number = reasons.index(one["reason"])
    return [number] if one["verdict"] == NOT_APPLICABLE else [number, one["numbers"]]


def read(version: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The kept table as it was found.

    Raises:
        FileNotFoundError: none is kept for that version.
    """
    kept = json.loads(path_of(version).read_text())
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, line in kept["classes"].items():
        about = {"family": line["family"], "numbers": {}, "reason": ""}
        checks = {check: {**about, "verdict": RIGHT} for check in line["right"]}
        for verdict, entries in line.items():
            if verdict not in ("family", "right"):
                for check, (reason, *numbers) in entries.items():
                    said = {"verdict": verdict, "reason": kept["reasons"][reason]}
                    checks[check] = {**about, **said, "numbers": numbers[0] if numbers else {}}
        found[name] = checks
    return found


def versions() -> list[str]:
    """The versions of which a table is kept, the newest first."""
    found = [path.stem.removeprefix("zoo-") for path in RESULTS.glob("zoo-*.json")]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".") if part.isdigit()], reverse=True)
