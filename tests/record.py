"""Run the tests as other machines would, and keep in docs/tested.md what came of it.

    python tests/record.py pinned --runs machines --keep -- --numprocesses 2

`pinned` names the libraries that this Python has; what follows `--` goes to pytest. A run that has passed already, of
the same code with the same libraries, is not run again: a series that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import datetime as dt
import getpass
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import bounds

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tested.md"
HEAD = """# What was run

`make test-machines`, `make test-newest`, `make test-oldest` and `make test-python` write this page: how the tests
ended with these libraries, in these orders, with so many threads, and with the kernels of other CPUs. *Sums n* is a
CPU that adds up each product of matrices in an order of its own (tests/helpers/sums.py). *Code* is a digest of peftfn/,
tests/ and the libraries' versions.
"""
RUNS_HEAD = ["Libraries", "Python", "Run", "Passed", "Failed", "Skipped", "Minutes", "On", "Code"]
PACKAGE = "Package"


class Run(NamedTuple):
    """One way to run the tests: pytest's options, and the environment of its processes."""

    name: str
    options: tuple[str, ...]
    environment: dict[str, str]


def kernels(aten: str, mkl: str, onednn: str) -> dict[str, str]:
    """What torch, MKL and oneDNN are to take the CPU for.

    torch keeps what it has compiled for a CPU and would take it for another one, of other vectors: silently wrong.
    """
    compiled = str(Path(tempfile.gettempdir()) / f"torchinductor-{getpass.getuser()}-{aten}")
    own = {"ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl, "ONEDNN_MAX_CPU_ISA": onednn}
    return own | {"TORCHINDUCTOR_CACHE_DIR": compiled}


AS_IT_IS = (Run("as it is", (), {}),)
# Three orders, one thread and two, sums in another order, and the kernels of two lesser CPUs.
MACHINES = (
    Run("order 1, 1 thread, AVX2", ("--order=1",), kernels("avx2", "AVX2", "AVX2")),
    Run("order 2, 2 threads, sums 1", ("--order=2", "--threads=2", "--sums=1"), {}),
    Run("order 3, 2 threads, SSE4", ("--order=3", "--threads=2"), kernels("default", "SSE4_2", "SSE41")),
)


class Page(NamedTuple):
    """What the page says.

    Attributes:
        rows: of the runs, each under its head.
        versions: package -> libraries -> version.
    """

    rows: list[dict[str, str]]
    versions: dict[str, dict[str, str]]


def read() -> Page:
    """The page, or an empty one."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    tables: dict[str, list[dict[str, str]]] = {}
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        tables[head[0]] = [dict(zip(head, line, strict=True)) for line in lines]
    versions = {row.pop(PACKAGE): row for row in tables.get(PACKAGE, [])}
    return Page(tables.get(RUNS_HEAD[0], []), versions)


def write(page: Page) -> None:
    """Keep the page, its rows in the order of their names."""
    columns = sorted({name for row in page.versions.values() for name in row})
    places = {run.name: number for number, run in enumerate(AS_IT_IS + MACHINES)}
    rows = sorted(page.rows, key=lambda row: (row["Libraries"], row["Python"], places.get(row["Run"], -1)))
    names = [[name, *(found.get(column, "") for column in columns)] for name, found in sorted(page.versions.items())]
    tables = [
        table(RUNS_HEAD, [[row[name] for name in RUNS_HEAD] for row in rows]),
        table([PACKAGE, *columns], names),
    ]
    PAGE.write_text("\n".join([HEAD, *tables]), encoding="utf-8")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def installed() -> dict[str, str]:
    """The versions of what pyproject asks for, where it is installed."""
    found: dict[str, str] = {}
    for one in bounds.bounds(*bounds.EXTRAS):
        try:
            found[one.package] = importlib.metadata.version(one.package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest(versions: dict[str, str]) -> str:
    """A name for the code that is run, with its libraries."""
    made = hashlib.sha256(repr(sorted(versions.items())).encode())
    for path in sorted(path for folder in ("peftfn", "tests") for path in (ROOT / folder).rglob("*.py")):
        made.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return made.hexdigest()[:8]


def test(run: Run, options: list[str]) -> dict[str, int]:
    """Run the tests, show what pytest shows, and return what its last line counts.

    Raises:
        SystemExit: pytest ended without counting.
    """
    command = [sys.executable, "-m", "pytest", *run.options, *options]
    print(f"\n### {run.name}", *(f"{name}={value}" for name, value in run.environment.items()), flush=True)
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | run.environment, stdout=subprocess.PIPE, text=True) as of:
        assert of.stdout is not None
        last = ""
        for line in of.stdout:
            print(line, end="", flush=True)
            last = line if re.search(r"\d+ [a-z]+.* in [\d.]+s", line) else last
    counts = {what.rstrip("s"): int(number) for number, what in re.findall(r"(\d+) ([a-z]+)", last.split(" in ")[0])}
    if of.returncode not in (0, 1) or not counts:
        sys.exit(f"{run.name}: pytest ended with {of.returncode} and counted nothing.")
    return counts


def newer(versions: dict[str, str]) -> list[str]:
    """Which libraries are newer than those that pyproject says were run, each in a sentence."""
    said = []
    for one in bounds.bounds(*bounds.EXTRAS):
        found = versions.get(one.package)
        if found and one.highest and bounds.numbers(found) >= bounds.numbers(one.highest):
            said.append(
                f"{one.package} {found} is newer than pyproject.toml's <{one.highest}: if all passes, raise it."
            )
    return said


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """What comes before `--`, and what after it."""
    where = words.index("--") if "--" in words else len(words)
    return words[:where], words[where + 1 :]


def main() -> None:
    """Run what the command line asks for; the exit status is 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "libraries", help="what this environment is called: pinned, newest, oldest; -- OPTIONS: pytest's"
    )
    parser.add_argument("--runs", choices=["once", "machines"], default="once")
    parser.add_argument("--keep", action="store_true", help="write the page")
    ours, theirs = split(sys.argv[1:])
    given = parser.parse_args(ours)
    versions = installed()
    code, failed = digest(versions), 0
    for run in AS_IT_IS if given.runs == "once" else MACHINES:
        own = {"Libraries": given.libraries, "Python": platform.python_version(), "Run": run.name}
        before = [row for row in read().rows if own.items() <= row.items()]
        if given.keep and any((row["Code"], row["Failed"]) == (code, "0") for row in before):
            print(f"{run.name}: has passed")
            continue
        began = time.monotonic()
        counts = test(run, theirs)
        wrong = counts.get("failed", 0) + counts.get("error", 0)
        failed += wrong
        if given.keep:
            keep(versions, own | outcome(counts, wrong, (time.monotonic() - began) / 60) | {"Code": code})
    print(*newer(versions), sep="\n")
    sys.exit(int(failed > 0))


def outcome(counts: dict[str, int], failed: int, minutes: float) -> dict[str, str]:
    """The cells that say how a run ended."""
    said = {"Passed": counts.get("passed", 0), "Failed": failed, "Skipped": counts.get("skipped", 0)}
    day = dt.datetime.now(dt.UTC).date().isoformat()
    return {name: str(number) for name, number in said.items()} | {"Minutes": f"{minutes:.0f}", "On": day}


def keep(versions: dict[str, str], row: dict[str, str]) -> None:
    """Write the row in place of the one of the same run."""
    page = read()
    same = [(row[name]) for name in RUNS_HEAD[:3]]
    rows = [one for one in page.rows if [one[name] for name in RUNS_HEAD[:3]] != same]
    kept = {name: dict(found) for name, found in page.versions.items()}
    for name, version in versions.items():
        kept.setdefault(name, {})[row["Libraries"]] = version
    write(Page([*rows, row], kept))


if __name__ == "__main__":
    main()
