"""Safetensors files as byte ranges: read one tensor, write a file piece by piece, copy ranges inside the kernel.

The format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, the header as JSON, and
the tensors one after the other without holes. Nothing here maps a file: what is read is held by the tensor that it
became, and no more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peftfn.core import files, reading

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

CODES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of tensors that can be read; a tensor of another one can still be copied."""

NAMES = {dtype: code for code, dtype in CODES.items()}
_LONGEST_HEADER = 100_000_000  # as the format's own reader has it
_CHUNK = 1 << 26  # bytes between two steps of a progress bar


class Entry(NamedTuple):
    """Where a tensor is: its dtype's code, its shape, the file, and its bytes there."""

    code: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    def of_rows(self, rows: slice) -> Entry:
        """Where those rows of it are."""
        each = (self.end - self.start) // max(1, self.shape[0])
        shape = (rows.stop - rows.start, *self.shape[1:])
        return self._replace(shape=shape, start=self.start + rows.start * each, end=self.start + rows.stop * each)


class Shard(NamedTuple):
    """One safetensors file, as its header describes it."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]


def is_floating(code: str) -> bool:
    """Whether a change of dtype concerns such a tensor: packed and 8-bit weights stay as they are."""
    return code in ("F64", "F32", "F16", "BF16")


def read_shard(path: Path) -> Shard:
    """The header of a file.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise _broken(path)
        header = reading.parse_json(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    try:
        entries = {name: _entry(path, one, 8 + length) for name, one in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path) from error
    if any(entry.end > size for entry in entries.values()):
        raise _broken(path)
    return Shard(path, metadata, entries)


def _entry(path: Path, one: Mapping[str, Any], begin: int) -> Entry:
    code, shape, (start, end) = str(one["dtype"]), tuple(map(int, one["shape"])), map(int, one["data_offsets"])
    if code in CODES and end - start != math.prod(shape) * CODES[code].itemsize:
        raise ValueError(f"{shape} in {end - start} bytes")
    return Entry(code, shape, path, begin + start, begin + end)


def _broken(path: Path) -> ValueError:
    with path.open("rb") as file:
        pointer = file.read(len(files.POINTER)) == files.POINTER
    why = "is a git-lfs pointer: run `git lfs pull` there" if pointer else "is truncated or corrupt: fetch it again"
    return ValueError(f"{path} is not a whole safetensors file; it {why}.")


def find(folder: Path) -> list[Shard]:
    """The headers of a model folder's weights, in the order of their names: one file, or those of an index.

    Raises:
        FileNotFoundError: the folder has none, or one that the index names is missing.
        ValueError: a file is not whole, or not what the index says.
    """
    if (folder / SINGLE).is_file():
        return [read_shard(folder / SINGLE)]
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise FileNotFoundError(
            f"{folder} has no {SINGLE} and no {INDEX}{', only ' + ', '.join(others[:3]) if others else ''}; expected a "
            "model's folder with safetensors weights. Others can be loaded and written again: "
            "from_pretrained(...).save_pretrained(...)."
        )
    where = reading.read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{folder / INDEX} has no weight_map; it may be truncated: fetch it again.")
    names: dict[str, str] = {str(key): str(name) for key, name in where.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    shards = [read_shard(folder / name) for name in sorted(set(names.values()))]
    for shard in shards:
        lost = [key for key, name in names.items() if name == shard.path.name and key not in shard.entries]
        if lost:
            raise ValueError(f"{shard.path} lacks {lost[0]!r}, which {INDEX} says is there; fetch both again.")
    return shards


def read(file: FileIO, entry: Entry, room: Tensor | None = None) -> Tensor:
    """The tensor, in memory of its own or at the start of `room`, which are bytes.

    Raises:
        ValueError: its dtype is not one that torch can compute with.
    """
    if entry.code not in CODES:
        raise ValueError(f"{file.name} has a tensor of dtype {entry.code}, which cannot be read here.")
    dtype, size = CODES[entry.code], entry.end - entry.start
    room = torch.empty(size, dtype=torch.uint8, device="cpu") if room is None else room[:size]
    made = room.view(dtype).view(entry.shape)
    view, done = as_bytes(made), 0
    file.seek(entry.start)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name} ends before its tensors do; it was changed while it was read.")
        done += count
    return made


def write(file: FileIO, offset: int, tensor: Tensor) -> None:
    """Write the tensor's bytes at an offset."""
    view = as_bytes(tensor)
    file.seek(offset)
    while view:
        view = view[file.write(view) :]


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes; those of its own memory, if it is contiguous and on CPU."""
    return memoryview(cast("Any", tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()))


class Item(NamedTuple):
    """One tensor of a file that is to be written.

    Attributes:
        name: its key.
        code: its dtype's.
        shape: its shape.
        source: where its bytes are as they are to be; `None` for one that is to be computed.
        start: its first byte in the new file.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    source: Entry | None
    start: int = 0

    @property
    def size(self) -> int:
        """In bytes."""
        return self.source.end - self.source.start if self.source else math.prod(self.shape) * CODES[self.code].itemsize


def layout(items: Iterable[Item], metadata: Mapping[str, str]) -> tuple[bytes, list[Item]]:
    """The header of a file with these tensors, and where each one starts."""
    # Wide dtypes first, as the format's own writer has it: so each tensor starts at a multiple of its item size.
    ordered = sorted(items, key=lambda item: -(CODES[item.code].itemsize if item.code in CODES else 1))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for item in ordered:
        header[item.name] = {"dtype": item.code, "shape": item.shape, "data_offsets": [end, end := end + item.size]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    placed: list[Item] = []
    start = 8 + len(text)
    for item in ordered:
        placed.append(item._replace(start=start))
        start += item.size
    return len(text).to_bytes(8, "little") + text, placed


def copy_range(
    source: FileIO, target: FileIO, start: int, offset: int, size: int, tell: Callable[[int], object]
) -> None:
    """Copy `size` bytes from `start` of one file to `offset` of another, inside the kernel where it can.

    `tell` is told how many bytes were copied, every now and then.
    """
    done = 0
    for way in _WAYS:
        while done < size:
            count = way(source, target, start + done, offset + done, min(_CHUNK, size - done))
            if count is None:
                break  # not between these files: the next way goes on from here
            if not count:
                raise ValueError(f"{source.name} ends before its tensors do; it was changed while it was read.")
            tell(count)
            done += count


def _in_kernel(source: FileIO, target: FileIO, start: int, offset: int, size: int) -> int | None:
    copy: Callable[..., int] | None = getattr(os, "copy_file_range", None)  # Linux
    try:
        return copy(source.fileno(), target.fileno(), size, start, offset) if copy else None
    except OSError:  # not between these file systems; an error of another kind comes again with the other way
        return None


def _through_memory(source: FileIO, target: FileIO, start: int, offset: int, size: int) -> int:
    source.seek(start)
    block = memoryview(source.read(min(size, 1 << 23)))
    target.seek(offset)
    written = len(block)
    while block:
        block = block[target.write(block) :]
    return written


_WAYS: tuple[Callable[[FileIO, FileIO, int, int, int], int | None], ...] = (_in_kernel, _through_memory)
