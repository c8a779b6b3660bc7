"""Files of repositories of the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path


def download(
    name: str,
    filename: str,
    *,
    subfolder: str | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    is_pinned: bool,
) -> Path | None:
    """The local path of a file of a repository, or `None` where it has no such file.

    Args:
        name: the repository's.
        filename: the file's.
        subfolder: where in the repository it is.
        revision: a branch, a tag or a commit.
        token: as `huggingface_hub` has it.
        cache_dir: where downloads are kept.
        is_pinned: whether another file of this commit is here already: then a file that the cache has not is none of
            this commit's, where there is no connection.

    Raises:
        FileNotFoundError: the repository is not to be had.
    """
    # Where it is used: a folder needs none of it, and it takes a third of the time of `import peftfn`.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            HfApi().hf_hub_download(
                name, filename, subfolder=subfolder, revision=revision, token=token, cache_dir=cache_dir
            )
        )
    except LocalEntryNotFoundError as error:
        if is_pinned:
            return None  # offline: what the cache has of this commit is all there is
        raise FileNotFoundError(
            f"{name!r} is no folder here, and {filename} could not be fetched from the hub (offline, or no "
            "connection) and is not in its cache; give a folder, or fetch the repository first."
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder that exists nor a valid hub id.") from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{filename} could not be read from the hub repository {name!r}: {error}") from error


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
