"""docs/architecture.md says which folder imports which: the code does, and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from places import ROOT

PACKAGE = ROOT / "peftfn"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = {
    name: {one.strip() for one in imports.split(",") if one.strip()}
    for name, imports in re.findall(r"^\| `(\w+)` \| .* \| ?([\w, ]*) ?\|$", PAGE, flags=re.MULTILINE)
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(name: str) -> set[str]:
    """The modules that a module imports, anywhere in it."""
    return {found for found in _imported(ast.parse(FILES[name].read_text())) if found not in (name, "peftfn")}


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peftfn":
            for one in node.names:
                whole = f"{node.module}.{one.name}"
                yield whole if whole in FILES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name in FILES)


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_the_page_has_every_room_and_there_are_few() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.is_file() or any(path.rglob("*.py"))}
    entries = there - {"__init__.py", "__main__.py", "py.typed"}
    assert entries == set(ROOMS)
    assert len(entries) <= 12


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_the_page_says(name: str) -> None:
    inside = [module for module in FILES if room(module) == name]
    found = {room(other) for module in inside for other in imported(module)} - {name}
    assert found == ROOMS[name]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imported(name) for name in FILES if name not in ("peftfn", "peftfn.__main__")}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_files_that_the_page_names_are_there() -> None:
    named = [name for name in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", PAGE) if name.split("/")[0] in ROOMS]
    assert len(named) > 15
    assert [name for name in named if not (PACKAGE / name).exists()] == []


def test_the_longest_chain_of_rooms_is_short() -> None:
    def depth(name: str) -> int:
        return 1 + max((depth(other) for other in ROOMS[name]), default=0)

    assert max(map(depth, ROOMS)) <= 9
