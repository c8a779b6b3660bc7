"""Writing one file of a merged folder: the next tensor is read and the last one written while one is computed."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn import shards
from peftfn.folder_plan import Unit
from peftfn.shards import Entry, Item

_AHEAD = 1  # tensors that wait to be written while the next one is computed

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
    left = job.items if done < len(job.header) else [one for one in job.items if one.start + one.size > done]
    bar.update(job.size - sum(item.size for item in left))
    paths = {item.source.path for item in left if item.source}
    paths |= {entries[key].path for item in left if not item.source for key in units[item.name].keys}
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(FileIO(job.part, "r+b" if done else "w+b"))
        # Each thread has files of its own, and with them positions of its own.
        read, copied = ({path: stack.enter_context(FileIO(path)) for path in paths} for _ in range(2))
        if done < len(job.header):
            target.write(job.header)
        reader, writer = stack.enter_context(ThreadPoolExecutor(1)), stack.enter_context(ThreadPoolExecutor(1))
        values = _values([item for item in left if item.source is None], units, entries, read, reader, safe)
        waiting: deque[Future[None]] = deque()
        for run in _runs(left):
            tensor = next(values) if run[0].source is None else None
            waiting.append(writer.submit(_put, waiting[-1] if waiting else None, target, copied, run, tensor, bar))
            tensor = None
            while len(waiting) > _AHEAD:
                waiting.popleft().result()
        for one in waiting:
            one.result()
        os.fsync(target.fileno())
    job.part.rename(job.path)


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
    before: Future[None] | None,
    target: FileIO,
    sources: Files,
    run: Sequence[Item],
    tensor: Tensor | None,
    bar: Any,
) -> None:
    if before is not None:
        before.result()  # nothing is written after what could not be: the file's size says how much of it is right
    first, source = run[0], run[0].source
    if source is None:
        assert tensor is not None, "a tensor without a source is made"
        shards.write(target, first.start, tensor)
        bar.update(first.size)
    else:
        size = sum(item.size for item in run)
        shards.copy_range(sources[source.path], target, source.start, first.start, size, bar.update)


def _values(
    items: Sequence[Item],
    units: Mapping[str, Unit],
    entries: Mapping[str, Entry],
    sources: Files,
    reader: Executor,
    safe: bool,
) -> Iterator[Tensor]:
    """The tensors of the items, in order; those of the unit after are read meanwhile."""
    order = [units[item.name] for item in items]
    order = [unit for unit, before in zip(order, [None, *order], strict=False) if unit is not before]

    def load(unit: Unit) -> dict[str, Tensor]:
        return {key: shards.read(sources[entries[key].path], entries[key]) for key in unit.keys}

    upcoming = iter([*(reader.submit(load, unit) for unit in order[:1]), *order[1:], None])
    ahead: Any = next(upcoming)
    current, made = None, dict[str, Tensor]()
    for item in items:
        unit = units[item.name]
        if unit is not current:
            tensors: dict[str, Tensor] = ahead.result()
            after: Any = next(upcoming)
            ahead = reader.submit(load, after) if after is not None else None
            with torch.no_grad():
                current, made = unit, unit.make(tensors)
            del tensors
        yield _checked(item, made.pop(item.name), safe)


def _checked(item: Item, tensor: Tensor, safe: bool) -> Tensor:
    tensor = tensor.to(shards.CODES[item.code])
    if tuple(tensor.shape) != item.shape:
        raise ValueError(f"{item.name}: the adapter makes it {tuple(tensor.shape)}; its layer has {item.shape}.")
    if safe and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{item.name} would have {count} of {tensor.numel()} values that are NaN or infinite, as merged in "
            f"{str(tensor.dtype).removeprefix('torch.')}; a wider dtype holds more, or the base has them already."
        )
    return tensor
