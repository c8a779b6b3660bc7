"""Reading: the files of an adapter, in a folder or in a repository of the hub; JSON; tensors."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peftfn.core import files, hub, safetensors_file


class Origin(NamedTuple):
    """Where an adapter is: a folder, or a hub id with how to reach it."""

    name: str
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    commit: str | None = None  # see `pinned`

    @property
    def folder(self) -> Path:
        """The folder, if the name is one."""
        return Path(self.name) / self.subfolder if self.subfolder else Path(self.name)


def find(origin: Origin, filename: str) -> Path:
    """The local path of a file of the adapter, downloaded if `origin` is a hub id.

    Raises:
        FileNotFoundError: it is not there; the message says where it was looked for.
    """
    path = try_find(origin, filename)
    if path is None:
        raise missing(origin, filename)
    return path


def missing(origin: Origin, filename: str) -> FileNotFoundError:
    """The error that says that a file was not found, and where it may be."""
    if not exists(origin.name):
        where = f"the hub repository {origin.name!r}" + (f", folder {origin.subfolder!r}" if origin.subfolder else "")
        return FileNotFoundError(f"no {filename} in {where}; expected a repository that holds a PEFT adapter.")
    if Path(origin.name).is_file():
        return FileNotFoundError(f"{origin.name} is a file; expected the folder of an adapter, or a hub id.")
    below = sorted(path.parent.name for path in origin.folder.glob(f"*/{files.CONFIG}"))
    hint = f" Its sub-folders {', '.join(below)} hold one: adapter_name={below[0]!r}." if below else ""
    return FileNotFoundError(f"no {filename} in {origin.folder}; expected a folder that holds a PEFT adapter.{hint}")


def settled(origin: Origin) -> Origin:
    """The origin with the folder that links lead to, so that all files come from that one, if a link is changed."""
    if not exists(origin.name):
        return origin
    real = origin.folder.resolve()
    return origin if real == origin.folder.absolute() else origin._replace(name=str(real), subfolder=None)


def exists(name: str) -> bool:
    """Whether there is a file or folder of that name; no system has one whose name is too long."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def try_find(origin: Origin, filename: str) -> Path | None:
    """As `find`, but `None` where the folder or repository has no such file."""
    if exists(origin.name):
        path = origin.folder / filename
        return path if path.is_file() else None
    return hub.download(
        origin.name,
        filename,
        subfolder=origin.subfolder,
        revision=origin.commit or origin.revision,
        token=origin.token,
        cache_dir=origin.cache_dir,
        is_pinned=origin.commit is not None,
    )


def pinned(origin: Origin, found: Path | None) -> Origin:
    """The origin with the commit that the file `found` came from, so that the next file is read from it too."""
    if found is None or exists(origin.name):
        return origin
    snapshot = found.parents[len(Path(origin.subfolder or "").parts)]  # <cache>/models--<name>/snapshots/<commit>
    return origin._replace(commit=snapshot.name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a `ValueError` that names the file."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in a text, or a `ValueError` that names its source."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of more digits than Python reads is no JSONDecodeError
        raise ValueError(
            f"{source} is not valid JSON ({error}); it may be truncated: write or fetch it again."
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{source} holds a JSON {type(data).__name__}; expected an object with a config's fields.")
    return cast("dict[str, Any]", data)


def safetensors_of(path: Path, device: torch.device, mmap: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; with `mmap`, tensors that are the file in memory.

    All of it comes from one opening of the file: another one may be put in its place meanwhile.

    Raises:
        ValueError: the file is truncated or corrupt.
    """
    with path.open("rb", buffering=0) as file:
        metadata, entries = safetensors_file.described(file, path)
        held = safetensors_file.mapped(file, path) if mmap else None
        found = {
            name: safetensors_file.tensor(file, path, one) if held is None else safetensors_file.within(held, path, one)
            for name, one in entries.items()
        }
    return {name: tensor.to(device) for name, tensor in found.items()}, metadata


def pickled(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors in a file of `torch.save`; nothing else is unpickled.

    Raises:
        ValueError: the file is truncated or corrupt, or holds more than tensors.
    """
    try:
        found: Any = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # corrupt bytes make torch's unpickler raise whatever they happen to hit
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} holds more than tensors ({asked[1]}) and was not unpickled: a pickle can run code. Get the "
                f"adapter as {files.WEIGHTS}."
            ) from error
        raise ValueError(
            f"{path} is not a whole PyTorch file ({type(error).__name__}); it is truncated or corrupt: fetch it again."
        ) from error
    items: dict[Any, Any] = {**found} if isinstance(found, dict) else {None: found}
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in items.items()):
        raise ValueError(f"{path} holds no mapping from names to tensors alone; it is not the weights of an adapter.")
    return {key: tensor.detach() for key, tensor in items.items()}
