"""The verdict on one case."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from peft.config import PeftConfigMixin
from peft.utils.peft_types import PeftType

from peft_suite import promises, scope, verdicts
from peft_suite.inventory import Case
from peft_suite.promises import Left, Promise
from peft_suite.subject import Subject
from peft_suite.table import PROCEDURES, TESTS
from peft_suite.verdicts import Verdict
from peftfn.methods import TABLE

OFFERED = frozenset(method.config.peft_type for method in TABLE)

Laws = Callable[[Case, types.ModuleType], Verdict | None]


class Memory:
    """What the cases of one group share: subjects, and verdicts of a procedure that stands for several of peft's."""

    def __init__(self) -> None:
        self.subjects: dict[str, Subject] = {}
        self.verdicts: dict[tuple[Any, str], Verdict] = {}


def at_once(case: Case, module: types.ModuleType | str) -> Verdict | None:
    """The verdict on a case for which nothing has to be run: its method is not here, or its file skips itself."""
    if isinstance(module, str):
        return scope.of(case) or Verdict(verdicts.UNFIT, module or "its file skips itself")
    cls = config_class(case)
    if cls and method_of(cls) not in OFFERED:
        return Verdict(verdicts.NOT_OFFERED, f"method {method_of(cls)}")
    if lacks := scope.needs(case):
        return lacks
    if (case.file, case.test) in TESTS or {"model_id", "config_cls"} <= set(case.params):
        return None
    return scope.of(case)


def config_class(case: Case) -> type | None:
    """peft's class of the config that a case is about, `None` where its parameters name none."""
    for name in ("config_cls", "config_class", "cls"):
        found = case.params.get(name)
        if isinstance(found, type) and issubclass(found, PeftConfigMixin):
            return found
    for name in ("config", "config0", "peft_config"):
        if isinstance(case.params.get(name), PeftConfigMixin):
            return type(case.params[name])
    return None


def verdict(case: Case, module: types.ModuleType, memory: Memory, laws: Laws) -> Verdict:
    """What comes of a case; `laws` are asked of tests that have no counterpart of their own."""
    special = TESTS.get((case.file, case.test)) or TESTS.get(("", case.test))
    try:
        if special is not None:
            return _left(case) or _run(special, case, module)
        promise = promises.of(case, module)
        if isinstance(promise, Left):
            return Verdict(verdicts.LEFT, promise.reason)
        if promise is not None and promise.procedure in PROCEDURES:
            return _of_promise(promise, memory)
        out = scope.of(case)
        if out is None and promise is None:
            out = laws(case, module)
    except pytest.skip.Exception as skipped:
        return Verdict(verdicts.LEFT, str(skipped))
    except Exception as error:  # every exception is a verdict
        return verdicts.of(error)
    return out or Verdict(verdicts.UNWRITTEN)


def _left(case: Case) -> Verdict | None:
    return Verdict(verdicts.LEFT, case.skipped) if case.skipped else None


def _run(function: Any, *arguments: Any) -> Verdict:
    function(*arguments)
    return Verdict(verdicts.RIGHT)


def _of_promise(promise: Promise, memory: Memory) -> Verdict:
    """Run a procedure on its subject, both of which may have been asked for before."""
    function = PROCEDURES[promise.procedure]
    key = f"{promise.model_id} {promise.config_cls.__name__} {promise.kwargs}"
    call = (function, f"{key} {promise.extra}")
    if call not in memory.verdicts:
        made = Subject(promise.model_id, promise.config_cls, promise.kwargs, promise.tester)
        subject = memory.subjects.setdefault(key, made)
        try:
            subject.config  # noqa: B018  # what is not offered is said before anything is run
            memory.verdicts[call] = _run(function, subject, promise.extra)
        except Exception as error:  # every exception is a verdict
            memory.verdicts[call] = verdicts.of(error)
    return memory.verdicts[call]


def method_of(cls: type) -> str:
    """The `peft_type` of one of peft's classes of config, the nearest of them that is registered."""
    return _TYPES.get(cls, cls.__name__.removesuffix("Config").upper())


def _types() -> dict[type, str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {cls: PeftType(kind).value for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


_TYPES = _types()
