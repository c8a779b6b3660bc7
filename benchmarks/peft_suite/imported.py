"""peft's test modules, imported from where they were unpacked, as the package `tests` that they take themselves for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

# What they import and their tables do not need: never called here.
UNUSED = ("diffusers", "parameterized", "scipy")


def modules(folder: Path) -> dict[str, types.ModuleType | str]:
    """Every test module by its name, in sorted order; of one that skips itself whole, its reason."""
    package = types.ModuleType("tests")
    package.__path__ = [str(folder)]
    sys.modules["tests"] = package
    absent = [name for name in UNUSED if importlib.util.find_spec(name) is None]
    stubs = {f"{name}{part}": _Absent(f"{name}{part}") for name in absent for part in ("", ".utils", ".stats")}
    sys.modules |= stubs
    try:
        with mock.patch("datasets.load_dataset"):  # one of them asks the hub for a picture when it is imported
            return {path.stem: _module(f"tests.{path.stem}") for path in sorted(folder.glob("test_*.py"))}
    finally:
        for name in stubs:  # or others, who ask what is installed, would find them
            del sys.modules[name]


def _module(name: str) -> types.ModuleType | str:
    try:
        return importlib.import_module(name)
    except pytest.skip.Exception as skipped:
        return str(skipped)


class _Absent(types.ModuleType):
    """Stands for a library that is not installed: every name in it is something that can be imported and subclassed."""

    __spec__ = None
    __version__ = "0"
    __path__: list[str] = []  # noqa: RUF012  # what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "parameterized":
            return types.SimpleNamespace(expand=expand)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


def expand(values: Any, **_: Any) -> Any:
    """What `parameterized.expand` says, as pytest says it; its functions take the values by position."""
    return pytest.mark.parametrize("values", list(values))
