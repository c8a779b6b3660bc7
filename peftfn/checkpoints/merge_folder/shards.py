"""Safetensors files as byte ranges: read one tensor, write a file piece by piece, copy ranges inside the kernel.

The format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, the header as JSON, and
the tensors one after the other without holes. Nothing here maps a file: what is read is held by the tensor that it
became, and no more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peftfn.core import reading, safetensors_file
from peftfn.core.safetensors_file import CODES, Entry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

NAMES = {dtype: code for code, dtype in CODES.items()}
_CHUNK = 1 << 26  # bytes between two steps of a progress bar


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
        FileNotFoundError: it is no file.
        ValueError: it is not a whole safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; expected weights in safetensors' format: fetch it again.")
    with FileIO(path) as file:
        metadata, entries = safetensors_file.described(file, path)
    return Shard(path, metadata, entries)


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
    elsewhere = [name for name in names.values() if Path(name).name != name or name in (".", "..", "")]
    if elsewhere:
        raise ValueError(
            f"{folder / INDEX} names {elsewhere[0]!r}; expected files of its own folder alone: fetch it again."
        )
    shards = [read_shard(folder / name) for name in sorted(set(names.values()))]
    _refuse_twice(shards)
    for shard in shards:
        lost = [key for key, name in names.items() if name == shard.path.name and key not in shard.entries]
        if lost:
            raise ValueError(f"{shard.path} lacks {lost[0]!r}, which {INDEX} says is there; fetch both again.")
    return shards


def _refuse_twice(shards: Sequence[Shard]) -> None:
    seen: dict[str, Path] = {}
    for shard in shards:
        for key in shard.entries:
            if key in seen:
                raise ValueError(
                    f"{key!r} is in {seen[key]} and in {shard.path.name} too, and which of the two a model gets "
                    "depends on who loads it; write the folder again: from_pretrained(...).save_pretrained(...)."
                )
            seen[key] = shard.path


def read(file: FileIO, entry: Entry, room: Tensor | None = None) -> Tensor:
    """The tensor, in memory of its own or at the start of `room`, which are bytes (`safetensors_file.tensor`)."""
    return safetensors_file.tensor(file, entry.path, entry, room)


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
