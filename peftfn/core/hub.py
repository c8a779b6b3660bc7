"""Adapter files in a folder or in a repository of the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from peftfn.core import files


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
    if not Path(origin.name).exists():
        where = f"the hub repository {origin.name!r}" + (f", folder {origin.subfolder!r}" if origin.subfolder else "")
        return FileNotFoundError(f"no {filename} in {where}; expected a repository that holds a PEFT adapter.")
    if Path(origin.name).is_file():
        return FileNotFoundError(f"{origin.name} is a file; expected the folder of an adapter, or a hub id.")
    below = sorted(path.parent.name for path in origin.folder.glob(f"*/{files.CONFIG}"))
    hint = f" Its sub-folders {', '.join(below)} hold one: adapter_name={below[0]!r}." if below else ""
    return FileNotFoundError(f"no {filename} in {origin.folder}; expected a folder that holds a PEFT adapter.{hint}")


def try_find(origin: Origin, filename: str) -> Path | None:
    """As `find`, but `None` where the folder or repository has no such file."""
    if Path(origin.name).exists():
        path = origin.folder / filename
        return path if path.is_file() else None
    # Where it is used: a folder needs none of it, and it takes a third of the time of `import peftfn`.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            HfApi().hf_hub_download(
                origin.name,
                filename,
                subfolder=origin.subfolder,
                revision=origin.commit or origin.revision,
                token=origin.token,
                cache_dir=origin.cache_dir,
            )
        )
    except LocalEntryNotFoundError as error:
        if origin.commit:
            return None  # offline: what the cache has of this commit is all there is
        raise FileNotFoundError(
            f"{origin.name!r} is no folder here, and {filename} could not be fetched from the hub (offline, or no "
            "connection) and is not in its cache; give a folder, or fetch the repository first."
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise FileNotFoundError(f"{origin.name!r} is neither a folder that exists nor a valid hub id.") from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"{filename} could not be read from the hub repository {origin.name!r}: {error}"
        ) from error


_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja", "*.py")


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself, or where the hub's client keeps its files.

    Raises:
        FileNotFoundError: it is neither a folder nor to be had from the hub.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(HfApi().snapshot_download(name, revision=revision, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"the base {name!r} is no folder here and could not be fetched from the hub; give its folder, or fetch it "
            "first."
        ) from error


def pinned(origin: Origin, found: Path | None) -> Origin:
    """The origin with the commit that the file `found` came from, so that the next file is read from it too."""
    if found is None or Path(origin.name).exists():
        return origin
    snapshot = found.parents[len(Path(origin.subfolder or "").parts)]  # <cache>/models--<name>/snapshots/<commit>
    return origin._replace(commit=snapshot.name)


def push(
    repo_id: str,
    write: Callable[[Path], object],
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """The address of the commit that uploads what `write(folder)` puts into a temporary folder."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=name, commit_message="Upload adapter", revision=revision
        )
    return str(commit.commit_url)
