"""Syncs of a file to the disk while the rest of it is computed, so that little is left for the last `fsync`."""

from __future__ import annotations

import os
from concurrent.futures import Executor, Future
from io import FileIO

_OFTEN = 1 << 28  # bytes: 2 GB took 0.85 of the time that it takes without, and 0.90 with a fourth of this


class Flushing:
    """The syncs of one file, one at a time in a thread of their own.

    Args:
        target: the file.
        thread: where they run.
    """

    def __init__(self, target: FileIO, thread: Executor) -> None:
        self._target = target
        self._thread = thread
        self._bytes = 0
        self._running: Future[None] | None = None

    def after(self, size: int) -> None:
        """Count bytes that are written, and start a sync where many are; what an earlier sync raised is raised here."""
        self._bytes += size
        if self._bytes < _OFTEN or not (self._running is None or self._running.done()):
            return
        self._wait()
        self._bytes = 0
        self._running = self._thread.submit(os.fsync, self._target.fileno())

    def finish(self) -> None:
        """Wait until everything that was written is on the disk."""
        self._wait()
        os.fsync(self._target.fileno())

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()
