"""Names of PEFT's files, and atomic writes: a file is there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CARD = "README.md"
RUN = "training.json"
"""What `peftfn train` leaves beside an adapter: settings, task, columns, the names of the labels."""
POINTER = b"version https://git-lfs"
"""How a file begins that git-lfs has not fetched."""

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Errors of the system for a disk that is full, a quota, or a file that may not grow."""

Write = Callable[[Path], object]
"""Writes a file at the path that it is given."""


def write_atomic(path: Path, write: Write) -> None:
    """Put a file at `path` by `write(temporary)` and a rename: a kill leaves the old file or the new one."""
    write_together(path.parent, {path.name: write})


@contextlib.contextmanager
def naming_what_has_no_room(path: Path) -> Generator[None]:
    """A context that turns the errors of other libraries about a full disk into an `OSError` that names the path.

    torch raises a RuntimeError about positions in a stream then, and safetensors an exception of its own.
    """
    try:
        yield
    except Exception as error:
        number = _no_room(error)
        if number is None or (isinstance(error, OSError) and error.filename):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _no_room(error: BaseException | None) -> int | None:
    """The system's error number, if an error or what led to it says that there was no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error.errno
        said = re.search(r"\(os error (\d+)\)", str(error))  # as Rust writes it
        if said and int(said[1]) in NO_ROOM:
            return int(said[1])
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """A context in which nobody else who asks for it writes into the folder; the system ends it with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if folder.exists() and not folder.is_dir():
        yield  # what writes says so
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_together(folder: Path, writes: Mapping[str, Write]) -> None:
    """Put files into a folder (made if missing), each of them whole.

    All of them are on disk, under temporary names, before the first one is renamed: a full disk or a `write` that
    raises leaves everything as it was. Then they are renamed in the given order.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: the disk is full; it names the file that has no room.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder to write {', '.join(writes)} into.")
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: folder / f".{name}.{uuid.uuid4().hex}.tmp" for name in writes}
    try:
        for name, temporary in names.items():
            with naming_what_has_no_room(folder / name):
                writes[name](temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
        for name, temporary in names.items():
            temporary.replace(folder / name)
    except BaseException:
        for temporary in names.values():
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to disk, where the system can."""
    # A rename survives a power cut only when the folder itself is on disk; not every system can open or sync one.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
