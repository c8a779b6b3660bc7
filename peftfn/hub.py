"""Adapter files in a folder or in a repository of the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


class Origin(NamedTuple):
    """Where an adapter is: a folder, or a hub id with how to reach it."""

    name: str
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None

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
        where = str(origin.folder) if Path(origin.name).exists() else f"the hub repository {origin.name!r}"
        raise FileNotFoundError(f"no {filename} in {where}; expected a folder or hub id that holds a PEFT adapter.")
    return path


def try_find(origin: Origin, filename: str) -> Path | None:
    """As `find`, but `None` where the folder or repository has no such file."""
    if Path(origin.name).exists():
        path = origin.folder / filename
        return path if path.is_file() else None
    try:
        return Path(
            hf_hub_download(
                origin.name,
                filename,
                subfolder=origin.subfolder,
                revision=origin.revision,
                token=origin.token,
                cache_dir=origin.cache_dir,
            )
        )
    except LocalEntryNotFoundError as error:
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


def push(
    repo_id: str,
    write: Callable[[Path], object],
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """Upload what `write(folder)` puts into a temporary folder; the commit's address."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=name, commit_message="Upload adapter", revision=revision
        )
    return str(commit.commit_url)
