"""pyproject's bounds are versions that were run: docs/tested.md has the runs."""

from __future__ import annotations

import re
from pathlib import Path

import bounds
import pytest
import record

PINNED = dict(
    re.findall(r"^([\w.-]+)==([\w.]+)", (bounds.PROJECT.parent / "constraints.txt").read_text(), re.MULTILINE)
)
NEEDED = bounds.bounds("cli", "bitsandbytes")
each = pytest.mark.parametrize("bound", NEEDED, ids=[bound.package for bound in NEEDED])


def ran(libraries: str, package: str) -> tuple[int, ...]:
    """The version in the last run with these libraries."""
    found = record.read().versions.get(package, {}).get(libraries)
    if not found:
        pytest.skip(f"docs/tested.md has no run with the {libraries} libraries")
    return bounds.numbers(found)


@each
def test_the_pinned_version_is_within_the_bounds(bound: bounds.Bounds) -> None:
    pinned = bounds.numbers(PINNED[bound.package])
    assert bound.highest, f"{bound.package} has no upper bound"
    assert bounds.numbers(bound.lowest) <= pinned < bounds.numbers(bound.highest)


@each
def test_the_lower_bound_is_the_version_that_test_oldest_ran(bound: bounds.Bounds) -> None:
    lowest = bounds.numbers(bound.lowest)
    version = ran("oldest", bound.package)
    assert version[: len(lowest)] == lowest
    assert not any(version[len(lowest) :])


@each
def test_the_upper_bound_is_one_step_beyond_what_test_newest_ran(bound: bounds.Bounds) -> None:
    newest, pinned = ran("newest", bound.package), bounds.numbers(PINNED[bound.package])
    assert bound.highest
    highest = bounds.numbers(bound.highest)
    if bound.package == "torch":  # a newer one than the pinned ran with `make test-gptqmodel`
        newest = max(newest, bounds.numbers(gptqmodel()))
    steps = [(newest[0] + 1,), (newest[0], newest[1] + 1)]
    assert max(newest, pinned) < highest
    assert highest in steps, f"{bound.package}: {highest} is not one step beyond {newest}"


def gptqmodel() -> str:
    """The torch of `make test-gptqmodel`."""
    lines = (bounds.PROJECT.parent / "gptqmodel-requirements.txt").read_text()
    return next(line.removeprefix("torch==") for line in lines.splitlines() if line.startswith("torch=="))


def test_pip_is_told_the_lowest_versions_and_the_names_alone() -> None:
    one = bounds.Bounds("pyright[nodejs]", "1.1.400", None)
    assert list(bounds.read(["pyright[nodejs] >= 1.1.400"])) == [one]
    assert one.package == "pyright"
    assert bounds.numbers("2.13.0+cpu") == (2, 13, 0) < bounds.numbers("2.14")
    with pytest.raises(ValueError, match=r"'torch'; expected 'name>=version'"):
        list(bounds.read(["torch"]))


def test_a_run_is_kept_once_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PAGE", tmp_path / "tested.md")
    cells = dict.fromkeys(record.RUNS_HEAD, "x") | {"Libraries": "oldest", "Failed": "1"}
    record.keep({"torch": "2.6.0"}, cells)
    record.keep({"torch": "2.13.0+cpu"}, cells | {"Libraries": "newest"})
    record.keep({"torch": "2.6.1"}, cells | {"Failed": "0"})
    page = record.read()
    assert [(row["Libraries"], row["Failed"]) for row in page.rows] == [("newest", "1"), ("oldest", "0")]
    assert page.versions == {"torch": {"newest": "2.13.0+cpu", "oldest": "2.6.1"}}


def test_a_library_newer_than_what_was_run_is_named() -> None:
    assert record.newer({"torch": "99.1", "numpy": "1.26.0"}) == [
        next(line for line in record.newer({"torch": "99.1"}) if line.startswith("torch 99.1 is newer than"))
    ]


def test_the_three_runs_have_three_orders_one_thread_and_two_other_sums_and_both_lesser_cpus() -> None:
    words = [run.options for run in record.MACHINES]
    assert [one[0] for one in words] == ["--order=1", "--order=2", "--order=3"]
    assert {"--threads=2" in one for one in words} == {False, True}
    assert any("--sums=1" in one for one in words)
    assert {run.environment.get("ATEN_CPU_CAPABILITY") for run in record.MACHINES} == {None, "avx2", "default"}
    names = {"ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "TORCHINDUCTOR_CACHE_DIR"}
    assert all(run.environment.keys() in (names, set()) for run in record.MACHINES)
