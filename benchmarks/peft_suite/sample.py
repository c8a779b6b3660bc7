"""A sample for every change: some cases of each test, method and kind of base, always the same ones."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

from peft_suite import kept
from peft_suite.inventory import Case


def of(cases: Sequence[Case], size: int, before: kept.Kept) -> list[Case]:
    """At most `size` cases: first one of each test and method, then of each base with them, and so on.

    Only of tests that the kept run had a counterpart for: of the others nothing can become worse.
    """
    strata: dict[tuple[str, str], list[Case]] = {}
    for case in sorted(cases, key=_order):
        key = (kept.test(case), kept.method(case))
        if not before.counts or any(word in kept.RUN for word in before.counts.get(key, {})):
            strata.setdefault(key, []).append(case)
    rounds = itertools.zip_longest(*[_by_base(strata[key]) for key in sorted(strata)])
    chosen = [case for one in rounds for case in one if case is not None][:size]
    names = {case.name for case in chosen}
    return [case for case in cases if case.name in names]


def _by_base(cases: Sequence[Case]) -> list[Case]:
    """The cases with one of each base first, then a second of each."""
    bases: dict[str, list[Case]] = {}
    for case in cases:
        bases.setdefault(str(case.params.get("model_id")), []).append(case)
    return [case for one in itertools.zip_longest(*bases.values()) for case in one if case is not None]


def _order(case: Case) -> str:
    """An order that has nothing to do with the tables' own, and is the same everywhere."""
    return hashlib.sha256(case.name.encode()).hexdigest()
