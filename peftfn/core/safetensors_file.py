"""The format of safetensors files: a header, held against the file before anything in it is believed; and the tensors.

The format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, the header as JSON, and
the tensors one after the other without holes. Here each file is opened once, so that header and tensors are of the same
one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peftfn.core import files

CODES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of tensors that can be read; a tensor of another one can still be copied."""

_BITS = {
    **{code: 8 * dtype.itemsize for code, dtype in CODES.items()},
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_LONGEST_HEADER = 100_000_000  # as the format's own reader has it


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


def described(file: FileIO, path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata of a file and where its tensors are, by name.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
    size, first = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8:
        raise broken(path, "header too small: it has less than 8 bytes")
    if not 2 <= length <= _LONGEST_HEADER:
        raise broken(path, f"invalid header length {length:,}")
    if length > size - 8:
        raise broken(path, f"incomplete: its header has {length:,} bytes, the file {size:,}")
    try:
        header: Any = json.loads(file.read(length).decode())
    except (ValueError, RecursionError) as error:
        raise broken(path, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise broken(path, "its header is no JSON object")
    named = cast("dict[str, Any]", header)
    metadata: Any = named.pop("__metadata__", {}) or {}
    if not _is_text(metadata):
        raise broken(path, "its metadata are not texts by name")
    entries = {name: _entry(path, name, one, 8 + length) for name, one in named.items()}
    _check(path, entries, 8 + length, size)
    return metadata, entries


def _is_text(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(one, str) for one in cast("dict[Any, Any]", metadata).values())


def _entry(path: Path, name: str, one: Any, begin: int) -> Entry:
    said = cast("Mapping[str, Any]", one if isinstance(one, dict) else {})
    code, shape, offsets = said.get("dtype"), said.get("shape"), said.get("data_offsets")
    if not isinstance(code, str) or code not in _BITS:
        raise broken(path, f"{name} has the dtype {code!r}, which the format does not have")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(cast("list[int]", offsets)) != 2:
        raise broken(path, f"{name} has shape {shape} at {offsets}")
    start, end = cast("list[int]", offsets)
    if 8 * (end - start) != math.prod(cast("list[int]", shape)) * _BITS[code]:
        raise broken(path, f"{name} has {end - start:,} bytes for {shape} of {code}")
    return Entry(code, tuple(cast("list[int]", shape)), path, begin + start, begin + end)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(one) is int and one >= 0 for one in cast("list[Any]", found))


def _check(path: Path, entries: Mapping[str, Entry], begin: int, size: int) -> None:
    """Refuse tensors that overlap, leave holes, or end elsewhere than the file."""
    ordered = sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].end))
    for (_, one), (name, other) in pairwise(ordered):
        if other.start != one.end:
            raise broken(path, f"{name} {'overlaps another tensor' if other.start < one.end else 'follows a hole'}")
    first, last = (ordered[0][1].start, ordered[-1][1].end) if ordered else (begin, begin)
    if first != begin or last != size:
        raise broken(path, f"incomplete: its tensors end at byte {last:,} of {size:,}")


def broken(path: Path, why: str) -> ValueError:
    """The error about a file that is not what it should be."""
    with path.open("rb") as file:
        pointer = file.read(len(files.POINTER)) == files.POINTER
    return ValueError(
        f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` there."
        if pointer
        else f"{path} is not a whole safetensors file ({why}); it is truncated or corrupt: fetch it again."
    )


def tensor(file: FileIO, path: Path, entry: Entry, room: Tensor | None = None) -> Tensor:
    """The tensor, in memory of its own or at the start of `room`, which are bytes.

    Raises:
        ValueError: its dtype is not one that torch can compute with; or the file was cut meanwhile.
    """
    dtype, size = _dtype(path, entry), entry.end - entry.start
    room = torch.empty(size, dtype=torch.uint8, device="cpu") if room is None else room[:size]
    made = room.view(dtype).view(entry.shape)
    view, done = memoryview(cast("Any", room.numpy())), 0
    file.seek(entry.start)
    while done < size:
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{path} ends before its tensors do; it was changed while it was read.")
        done += count
    return made


def _dtype(path: Path, entry: Entry) -> torch.dtype:
    if entry.code not in CODES:
        raise ValueError(f"{path} has a tensor of dtype {entry.code}, which cannot be read here.")
    return CODES[entry.code]


def mapped(file: FileIO, path: Path) -> torch.UntypedStorage:
    """The file in memory; what is written there does not reach it."""
    own = Path(f"/proc/self/fd/{file.fileno()}")  # by the path, it may be another file by now
    size = os.fstat(file.fileno()).st_size
    storage: Any = torch.UntypedStorage
    return storage.from_file(str(own if own.exists() else path), False, size)


def within(held: torch.UntypedStorage, path: Path, entry: Entry) -> Tensor:
    """The tensor where it is in a file in memory; a copy of it, where it does not lie as its dtype needs it."""
    dtype = _dtype(path, entry)
    empty: Any = torch.empty(0, dtype=torch.uint8, device="cpu")
    raw: Tensor = empty.set_(held, entry.start, (entry.end - entry.start,))
    return (raw if entry.start % dtype.itemsize == 0 else raw.clone()).view(dtype).view(entry.shape)
