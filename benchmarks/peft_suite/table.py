"""The table of procedures: a name of peft's, and the pure function that is its counterpart here."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from peft_suite.inventory import Case
from peft_suite.subject import Subject

Procedure = Callable[[Subject, Mapping[str, Any]], None]
PROCEDURES: dict[str, Procedure] = {}


def procedure(*names: str) -> Callable[[Procedure], Procedure]:
    """Enters a function under the names of the procedures that it stands for."""

    def enter(function: Procedure) -> Procedure:
        PROCEDURES.update(dict.fromkeys(names, function))
        return function

    return enter


Test = Callable[[Case, types.ModuleType], None]
TESTS: dict[tuple[str, str], Test] = {}


def test(file: str, *names: str) -> Callable[[Test], Test]:
    """Enters a function for tests that are no case of one model and one config; `""` is every file."""

    def enter(function: Test) -> Test:
        TESTS.update(dict.fromkeys(((file, name) for name in names), function))
        return function

    return enter
