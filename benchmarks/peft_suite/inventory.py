"""Every check that peft's tests make: its file, class, function and parameters, with `parametrize` multiplied out."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Case(NamedTuple):
    """One check.

    Attributes:
        file: the module, `test_custom_models`.
        group: the class, empty for a function outside one.
        test: the function.
        params: what it is called with, by name.
        label: a name that tells it from the other cases of its function.
        skipped: why peft itself skips it, as its marks say.
    """

    file: str
    group: str
    test: str
    params: Mapping[str, Any]
    label: str
    skipped: str | None

    @property
    def name(self) -> str:
        """A name that no other case has."""
        where = f"{self.file}.{self.group}" if self.group else self.file
        return f"{where}.{self.test}[{self.label}]"


def cases(modules: Mapping[str, types.ModuleType | str]) -> list[Case]:
    """All of them, in the order of the files; a file that skips itself whole is one."""
    found: list[Case] = []
    for name, module in modules.items():
        found += [Case(name, "", "*", {}, "", module)] if isinstance(module, str) else _of_module(name, module)
    return found


def _of_module(file: str, module: types.ModuleType) -> Iterator[Case]:
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) and name.startswith("Test"):
            for method, function in inspect.getmembers(value, inspect.isfunction):
                if method.startswith("test_"):
                    yield from _of_function(file, name, method, _marks(value) + _marks(function))
        elif inspect.isfunction(value) and name.startswith("test_"):
            yield from _of_function(file, "", name, _marks(value))


def _marks(value: Any) -> list[Any]:
    found = getattr(value, "pytestmark", [])
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _of_function(file: str, group: str, test: str, marks: list[Any]) -> Iterator[Case]:
    skipped = _skipped(marks)
    tables = [_rows(mark) for mark in marks if mark.name == "parametrize"]
    for number, chosen in enumerate(itertools.product(*tables)):
        params = {name: value for row, _ in chosen for name, value in row.items()}
        why = next((reason for _, reason in chosen if reason), skipped)
        yield Case(file, group, test, params, f"{number}" + _label(params), why)


def _rows(mark: Any) -> list[tuple[dict[str, Any], str | None]]:
    """The rows of one `parametrize`: names to values, and why a row is skipped."""
    names, values = (*mark.args, *[mark.kwargs[name] for name in ("argnames", "argvalues") if name in mark.kwargs])[:2]
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows: list[tuple[dict[str, Any], str | None]] = []
    for value in values:
        marks = list(getattr(value, "marks", ()))
        plain = getattr(value, "values", value) if hasattr(value, "marks") else value
        one = plain if len(names) > 1 else (plain[0] if hasattr(value, "marks") else plain,)
        rows.append((dict(zip(names, one, strict=True)), _skipped(marks)))
    return rows


def _skipped(marks: list[Any]) -> str | None:
    for mark in marks:
        if mark.name == "skip" or (mark.name == "skipif" and bool(mark.args and mark.args[0])):
            return str(mark.kwargs.get("reason", mark.args[-1] if mark.args else "skipped"))
    return None


def _label(params: Mapping[str, Any]) -> str:
    """What can be read of the parameters."""
    words = [value.__name__ if inspect.isclass(value) else str(value) for value in params.values()]
    return "".join(f" {word}" for word in words if len(word) < 60)


def groups(cases: Sequence[Case], size: int = 40) -> list[list[Case]]:
    """The cases of one model and one config together, which share what they make; no group is larger than `size`."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        about = [case.params.get(name) for name in ("model_id", "config_cls", "config_kwargs")]
        key = f"{case.file}.{case.group}" + (f" {about}" if about[1] is not None else f".{case.test}")
        found.setdefault(key, []).append(case)
    return [group[at : at + size] for group in found.values() for at in range(0, len(group), size)]
