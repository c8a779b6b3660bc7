"""Writing one file of a merged folder, piece by piece: the next one is read and the last one written meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn.checkpoints.merge_folder import shards
from peftfn.checkpoints.merge_folder.flushing import Flushing
from peftfn.checkpoints.merge_folder.planning import Unit
from peftfn.checkpoints.merge_folder.shards import Item
from peftfn.core import row_blocks
from peftfn.core.safetensors_file import CODES, Entry

_PIECE = 1 << 20  # values: a few MB stay in a processor's caches while one thread reads, one computes and one writes
_FREED = 1 << 24  # bytes
_ROOMS = 3  # for what is read, what is computed and what is written, whose result may be a view of what it came from

Files = Mapping[Path, FileIO]


class Job(NamedTuple):
    """One file to write: its place, its header, its tensors in order."""

    path: Path
    header: bytes
    items: list[Item]

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.header) + sum(item.size for item in self.items)

    @property
    def part(self) -> Path:
        """Where it lies until it is whole."""
        return self.path.with_name(f"{self.path.name}.part")


class Piece(NamedTuple):
    """What is written at once.

    Attributes:
        items: one that is made, or several that lie side by side in the same file already.
        rows: those of the one that are made at once; `None` for all.
    """

    items: list[Item]
    rows: slice | None

    @property
    def size(self) -> int:
        """In bytes."""
        return (
            sum(item.size for item in self.items)
            if self.rows is None
            else self._up_to(self.rows.stop - self.rows.start)
        )

    @property
    def start(self) -> int:
        """Its first byte in the new file."""
        return self.items[0].start + (0 if self.rows is None else self._up_to(self.rows.start))

    def _up_to(self, row: int) -> int:
        item = self.items[0]
        return row * (item.size // max(1, item.shape[0]))


def write(job: Job, units: Mapping[str, Unit], entries: Mapping[str, Entry], safe: bool, bar: Any) -> None:
    """Write the file, from where an earlier run left it: bytes are written in order, so its size says where that is.

    Args:
        job: the file.
        units: what makes a tensor that has no source.
        entries: the tensors that are read for it, by key.
        safe: whether to refuse what is not finite.
        bar: is told how many bytes are there.
    """
    if job.path.exists():
        bar.update(job.size)
        return
    done = job.part.stat().st_size if job.part.exists() else 0
    items = job.items if done < len(job.header) else [one for one in job.items if one.start + one.size > done]
    left = [piece for piece in _pieces(items, units) if done < len(job.header) or piece.start + piece.size > done]
    bar.update(job.size - sum(piece.size for piece in left))
    paths = {item.source.path for item in items if item.source}
    paths |= {entries[key].path for item in items if not item.source for key in units[item.name].keys}
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(FileIO(job.part, "r+b" if done else "w+b"))
        # Each thread has files of its own, and with them positions of its own.
        read, copied = ({path: stack.enter_context(FileIO(path)) for path in paths} for _ in range(2))
        if done < len(job.header):
            target.write(job.header)
        reader, writer, flusher = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        flushing = Flushing(target, flusher)
        values = _values([piece for piece in left if piece.items[0].source is None], units, entries, read, reader, safe)
        before: Future[None] | None = None
        for piece in left:
            tensor = next(values) if piece.items[0].source is None else None
            after = writer.submit(_put, before, target, copied, piece, tensor, bar)
            tensor = None
            if before is not None:
                before.result()
            before = after
            flushing.after(piece.size)
        if before is not None:
            before.result()
        flushing.finish()
    job.part.rename(job.path)


def _pieces(items: Sequence[Item], units: Mapping[str, Unit]) -> Iterator[Piece]:
    for run in _runs(items):
        item = run[0]
        if item.source is None and units[item.name].by_rows:
            every = row_blocks.pieces(item.shape[0], math.prod(item.shape[1:]), _PIECE)
            yield from (Piece(run, rows) for rows in every)
        else:
            yield Piece(run, None)


def _runs(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items that are written at once: one that is made, or several that lie side by side in the same file already."""
    run: list[Item] = []
    for item in items:
        last = run[-1].source if run else None
        if run and not (last and item.source and (last.path, last.end) == (item.source.path, item.source.start)):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _put(
    before: Future[None] | None, target: FileIO, sources: Files, piece: Piece, tensor: Tensor | None, bar: Any
) -> None:
    if before is not None:
        before.result()  # nothing is written after what could not be: the file's size says how much of it is right
    source = piece.items[0].source
    if source is None:
        assert tensor is not None, "a tensor without a source is made"
        shards.write(target, piece.start, tensor)
        bar.update(piece.size)
    else:
        shards.copy_range(sources[source.path], target, source.start, piece.start, piece.size, bar.update)


def _values(
    pieces: Sequence[Piece],
    units: Mapping[str, Unit],
    entries: Mapping[str, Entry],
    sources: Files,
    reader: Executor,
    safe: bool,
) -> Iterator[Tensor]:
    """The tensors of the pieces, in order; what the next one is made from is read meanwhile."""

    def load(unit: Unit, rows: slice | None) -> dict[str, Tensor]:
        if rows is None:
            return {key: shards.read(sources[entries[key].path], entries[key]) for key in unit.keys}
        (key,) = unit.keys
        entry = entries[key].of_rows(rows)
        return {key: shards.read(sources[entry.path], entry, next(rooms))}

    _keep_freed_memory()
    # The same memory for every piece: malloc would keep blocks that are freed in another order, and not reuse them.
    size = _largest(pieces, units, entries)
    rooms = itertools.cycle([torch.empty(size, dtype=torch.uint8, device="cpu") for _ in range(_ROOMS)])
    order = [(units[piece.items[0].name], piece.rows) for piece in pieces]
    order = [one for one, before in zip(order, [None, *order], strict=False) if one != before]
    upcoming = iter([*(reader.submit(load, *one) for one in order[:1]), *order[1:], None])
    ahead: Any = next(upcoming)
    current, made = None, dict[str, Tensor]()
    for piece in pieces:
        item, rows = piece.items[0], piece.rows
        unit = units[item.name]
        if (unit, rows) != current:
            tensors: dict[str, Tensor] = ahead.result()
            after: Any = next(upcoming)
            ahead = reader.submit(load, *after) if after is not None else None
            with torch.no_grad():
                current, made = (unit, rows), unit.make(tensors, rows)
            del tensors
        yield _checked(piece, made.pop(item.name), safe)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: up to twice the largest block that was freed, which is this one, never touched.

    A process that had freed little gave the memory of every few pieces back to the system, and took it again page by
    page: a merge of 2 GB then had up to a million page faults more, and took twice as long.
    """
    torch.empty(_FREED, dtype=torch.uint8, device="cpu")


def _largest(pieces: Sequence[Piece], units: Mapping[str, Unit], entries: Mapping[str, Entry]) -> int:
    """The bytes of the largest piece that is read for these, of those that are some rows."""
    read = [
        entries[key].of_rows(piece.rows)
        for piece in pieces
        if piece.rows is not None
        for key in units[piece.items[0].name].keys
    ]
    return max((entry.end - entry.start for entry in read), default=0)


def _checked(piece: Piece, tensor: Tensor, safe: bool) -> Tensor:
    item, rows = piece.items[0], piece.rows
    shape = item.shape if rows is None else (rows.stop - rows.start, *item.shape[1:])
    tensor = tensor.to(CODES[item.code])
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{item.name}: the adapter makes it {tuple(tensor.shape)}; its layer has {shape}.")
    if safe and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        where = f", in rows {rows.start} to {rows.stop - 1}," if rows is not None else ""
        raise ValueError(
            f"{item.name} would have {count} of {tensor.numel()} values{where} that are NaN or infinite, as merged in "
            f"{str(tensor.dtype).removeprefix('torch.')}; a wider dtype holds more, or the base has them already."
        )
    return tensor
