"""Why a case does not hold: by hand, for classes, checks and what was said. The first rule that fits is the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

UNEXPLAINED = "unexplained"


class Rule(NamedTuple):
    """A reason, and of what: expressions for names of checks, classes, verdicts, and for part of what was said."""

    reason: str
    check: str = ".*"
    said: str = ""
    classes: str = ".*"
    verdict: str = ".*"


RULES: list[Rule] = []


def explained(name: str, check: str, finding: Mapping[str, Any]) -> str:
    """The reason of a finding, or that it has none yet."""
    for rule in RULES:
        if (
            re.fullmatch(rule.classes, name)
            and re.fullmatch(rule.check, check)
            and re.fullmatch(rule.verdict, finding["verdict"])
            and re.search(rule.said, finding["reason"])
        ):
            return rule.reason
    return UNEXPLAINED
