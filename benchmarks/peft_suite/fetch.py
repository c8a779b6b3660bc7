"""Where peft's own tests are: the source distribution of the peft that is installed, unpacked under `build/`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build" / "peft-suite"


def version() -> str:
    """The version of the peft that is installed."""
    return importlib.metadata.version("peft")


def tests() -> Path:
    """The folder of peft's tests, downloaded and unpacked where it is missing; never part of this repository."""
    folder = BUILD / f"peft-{version()}"
    if not (folder / "tests").is_dir():
        _unpack(_download(), folder)
    return folder / "tests"


def _download() -> Path:
    archive = BUILD / f"peft-{version()}.tar.gz"
    if not archive.is_file():
        BUILD.mkdir(parents=True, exist_ok=True)
        command = ["download", "--quiet", "--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
        words = [sys.executable, "-m", "pip", *command, "--dest", BUILD, f"peft=={version()}"]
        subprocess.run(words, check=True)  # noqa: S603  # nothing in it comes from outside
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        members = [one for one in opened.getmembers() if one.name.startswith(f"{folder.name}/tests/")]
        opened.extractall(folder.parent, members=members, filter="data")
    if not (folder / "tests").is_dir():
        raise FileNotFoundError(f"{archive} has no folder {folder.name}/tests: this release of peft ships no tests.")
