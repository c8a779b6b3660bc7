"""The versions between which pyproject.toml says that all of this runs, as pip takes them.

    python tests/bounds.py oldest    # constraints: each package at its lowest bound
    python tests/bounds.py newest    # requirements: each package without a bound, so that pip takes what is newest

Both are about what `.[cli,dev]` installs, and need nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRAS = ("cli", "dev")


class Bounds(NamedTuple):
    """A line of pyproject: `name[extra]>=lowest,<highest`.

    Attributes:
        name: the package, with the extras that are asked of it.
        lowest: the first version that was run.
        highest: the first version that was not; `None` where any newer one will do.
    """

    name: str
    lowest: str
    highest: str | None

    @property
    def package(self) -> str:
        """The name alone."""
        return self.name.partition("[")[0]


def bounds(*extras: str) -> list[Bounds]:
    """What the package depends on, and the extras too, sorted by name."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return sorted(set(read(lines)))


def read(lines: list[str]) -> Iterator[Bounds]:
    """The lines in parts.

    Raises:
        ValueError: a line has no lower bound, or is written in another way.
    """
    for line in lines:
        found = re.fullmatch(r"([\w.-]+(?:\[[\w,-]+\])?)>=([\d.]+)(?:,<([\d.]+))?", line.replace(" ", ""))
        if not found:
            raise ValueError(f"pyproject.toml asks for {line!r}; expected 'name>=version' or 'name>=version,<version'.")
        yield Bounds(*found.groups())


def numbers(version: str) -> tuple[int, ...]:
    """The version's numbers, to compare; `2.13.0+cpu` is 2.13.0."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


if __name__ == "__main__":
    which = sys.argv[1:]
    if which not in (["oldest"], ["newest"]):
        sys.exit(f"{' '.join(which) or 'nothing'}: expected oldest or newest")
    for one in bounds(*EXTRAS):
        print(f"{one.package}=={one.lowest}" if which == ["oldest"] else one.name)
