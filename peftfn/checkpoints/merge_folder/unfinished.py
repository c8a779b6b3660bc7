"""A folder that is made beside its place and takes it in one rename; killed, the next run goes on where this one was.

What is unfinished lies in `.<name>.unfinished` beside the output: `folder/`, which becomes the output, and a note that
says what is being made there and since which start of the machine. A file is there under its own name when it is whole
and on disk, and as `<name>.part` before. What a part holds is trusted until the machine starts anew: a kill leaves
what was written, a power cut may leave less.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from peftfn.core import files, reading

_NOTE = "making.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD, of Linux' renameat2


class Unfinished(NamedTuple):
    """A folder that is being made.

    Attributes:
        output: where it goes.
        work: where everything about it lies until then.
    """

    output: Path
    work: Path

    @property
    def folder(self) -> Path:
        """What becomes the output."""
        return self.work / "folder"


@contextlib.contextmanager
def making(output: Path, what: str, overwrite: bool) -> Generator[Unfinished | None]:
    """The unfinished folder, with what an earlier run of the same has left; `None` if that run had finished.

    Where the block ends without an exception, it takes the output's place. An exception that comes from the input
    removes it; an interrupt, or a full disk, leaves it for the next run.

    Args:
        output: where the folder goes.
        what: what is being made, as a digest: other work than the same is thrown away.
        overwrite: whether it may take the place of another folder.

    Raises:
        FileExistsError: something is there already, or another process is making the same.
    """
    at = Unfinished(output, output.absolute().with_name(f".{output.name}.unfinished"))
    note = {"what": what, "boot": _boot()}
    before = _note(at.work)
    if before.get("what") == what and output.is_dir() and before.get("moved") == output.stat().st_ino:
        shutil.rmtree(at.work)  # killed between the rename and the end
        yield None
        return
    _check(output, overwrite)
    at.folder.mkdir(parents=True, exist_ok=True)
    with _locked(at.work):
        if before.get("what") != what:
            _empty(at.folder)
        elif note["boot"] is None or before.get("boot") != note["boot"]:
            for part in at.folder.glob("*.part"):
                part.unlink()
        _write_note(at.work, note)
        try:
            yield at
            files.sync_folder(at.folder)
            _write_note(at.work, {**note, "moved": at.folder.stat().st_ino})
            _move(at)
        except (OSError, KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException:
            shutil.rmtree(at.work, ignore_errors=True)
            raise
    shutil.rmtree(at.work)


def _check(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; expected a folder to write.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{output} is there already and not empty; give a new folder, or overwrite=True to replace it when the new "
            "one is whole."
        )


def _boot() -> str | None:
    return _BOOT.read_text().strip() if _BOOT.is_file() else None


def _note(work: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return reading.read_json(work / _NOTE)
    return {}


def _write_note(work: Path, note: dict[str, Any]) -> None:
    files.write_atomic(work / _NOTE, lambda path: path.write_text(json.dumps(note), encoding="utf-8"))


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@contextlib.contextmanager
def _locked(work: Path) -> Generator[None]:
    """A context in which no other process works in the folder; the system ends the lock with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is writing into {work}; wait for it, or end it.") from None
        yield


def _move(at: Unfinished) -> None:
    if not at.output.exists() or not any(at.output.iterdir()):
        if at.output.exists():
            at.output.rmdir()
        at.folder.rename(at.output)
    elif not _exchanged(at.folder, at.output):
        at.output.rename(at.work / "old")  # not in one step; a kill here is put right by the next run
        at.folder.rename(at.output)
    files.sync_folder(at.output.absolute().parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two folders could be exchanged in one step, as some systems can; then they are."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
