"""Adapters as PEFT's two files: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`, read only).

The key of a tensor is `base_model.model.<site path>.<name>`; names that differ between versions of PEFT are read in
each spelling and written in the latest one. Both files are written whole; the weights file also carries the config,
so that one rename makes the new adapter: whatever a kill leaves behind loads as the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from peftfn import files, hub, keys, stacking
from peftfn.adapter import Adapter
from peftfn.config import PeftConfig

_CONFIG_KEY = "peftfn.config"
_REPLACES_KEY = "peftfn.replaces"


def save(adapter: Adapter, folder: str | Path) -> Path:
    """Write the adapter into `folder` (made if missing) as PEFT's two files and a model card; the folder.

    Args:
        adapter: a single adapter; tensors are written as they are, bit for bit.
        folder: an adapter that is there is replaced, other files are left alone.

    Raises:
        TypeError: it is a stack.
        NotADirectoryError: `folder` is a file.

    Example:
        >>> import tempfile, torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> folder = pf.save(adapter, tempfile.mkdtemp())
        >>> torch.equal(pf.load(folder).params["0"]["lora_A"], adapter.params["0"]["lora_A"])
        True
    """
    folder = Path(folder)
    if isinstance(adapter.config, stacking.Stacked):
        raise TypeError("save was given a stack; save its adapters one by one: for a in peftfn.unstack(stacked): ...")
    tensors = keys.to_keys(adapter)
    text = adapter.config.to_json()
    old = folder / files.CONFIG
    metadata = {
        "format": "pt",
        _CONFIG_KEY: text,
        _REPLACES_KEY: _digest(old.read_text()) if old.is_file() else "",
    }
    plain = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    files.write_atomic(folder / files.WEIGHTS, lambda path: safetensors.torch.save_file(plain, path, metadata))
    adapter.config.save_pretrained(folder)
    (folder / files.PICKLE).unlink(missing_ok=True)  # an older file of the same adapter, which readers would find too
    if not (folder / files.CARD).exists():
        files.write_atomic(folder / files.CARD, lambda path: path.write_text(card(adapter)))
    return folder


def load(
    folder_or_hub_id: str | Path,
    model: nn.Module | None = None,
    *,
    adapter_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Adapter:
    """The adapter in a folder or hub repository that peftfn or PEFT (0.5.0 to 0.21) wrote.

    Args:
        folder_or_hub_id: a folder, or a hub id.
        model: the base. With it the adapter is held against it at once: sites that are missing or too many, and
            shapes. Without it, that happens where the adapter is used.
        adapter_name: an adapter that PEFT saved under a name of its own, in a sub-folder.
        subfolder: where in the folder or repository the files are.
        revision, token, cache_dir: for the hub, as `huggingface_hub` has them.
        device: where the tensors go.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is truncated, corrupt, or a pickle that holds more than tensors; or the config asks for
            what is not supported; or, with `model`, something does not fit.
        KeyError: a key is unknown, or one of a pair is missing.
    """
    where = "/".join(part for part in (subfolder, adapter_name) if part and part != "default") or None
    origin = hub.Origin(str(folder_or_hub_id), where, revision, token, cache_dir)
    tensors, metadata, source = _read_weights(origin, device)
    config = _read_config(origin, metadata)
    adapter = keys.from_keys(tensors, config, str(source), ordered=_CONFIG_KEY in metadata, model=model)
    if model is not None:
        keys.check_against(adapter, model, str(source))
    return adapter


def _read_config(origin: hub.Origin, metadata: Mapping[str, str]) -> PeftConfig:
    path = hub.try_find(origin, files.CONFIG)
    inside = metadata.get(_CONFIG_KEY)
    # The weights were replaced and the process died before the config was: the config beside them is the old one.
    if inside and (path is None or _digest(path.read_text()) == metadata.get(_REPLACES_KEY)):
        return PeftConfig.from_dict(json.loads(inside), source=str(origin.folder))
    path = path or hub.find(origin, files.CONFIG)
    return PeftConfig.from_dict(files.read_json(path), source=str(path))


def _read_weights(origin: hub.Origin, device: str | torch.device) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    path = hub.try_find(origin, files.WEIGHTS)
    if path is not None:
        return *_read_safetensors(path, device), path
    path = hub.try_find(origin, files.PICKLE)
    if path is not None:
        return _read_pickle(path, device), {}, path
    hub.find(origin, files.CONFIG)  # a folder with neither file is better told so
    return *_read_safetensors(hub.find(origin, files.WEIGHTS), device), origin.folder


def _read_safetensors(path: Path, device: str | torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:  # type: ignore[no-untyped-call]
            opened = cast("Any", file)
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it is truncated or corrupt: fetch it again."
        ) from error


def _read_pickle(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is corrupt, and was not unpickled: a pickle can run code. Get the adapter "
            "as adapter_model.safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole PyTorch file ({error}); it is truncated or corrupt: fetch it again."
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(one, Tensor) for one in cast("dict[Any, Any]", found).values()
    ):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a mapping from names to tensors.")
    return cast("dict[str, Tensor]", found)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def push_to_hub(
    adapter: Adapter,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
) -> str:
    """Upload the adapter's files and its model card to a hub repository (made if missing); the commit's address."""
    return hub.push(repo_id, lambda folder: save(adapter, folder), token=token, private=private, revision=revision)


def card(adapter: Adapter) -> str:
    """A model card: what the adapter is, what it goes with, and how to use it."""
    config: Any = adapter.config
    base = config.base_model_name_or_path
    hub_id = base if base and re.fullmatch(r"[\w.\-]+/[\w.\-]+", base) else None
    head = ["---", "library_name: peft", *([f"base_model: {hub_id}"] if hub_id else []), "tags:", "- peftfn", "---"]
    trained = sum(tensor.numel() for leaf in adapter.params.values() for tensor in leaf.values())
    facts = [f"Method: {config.peft_type}", f"sites: {len(adapter.params)}", f"trained parameters: {trained:,}"]
    if base:
        facts.append(f"base: `{base}`")
    use = [
        "```python",
        "import peftfn as pf",
        "",
        'adapter = pf.load("path/or/hub-id")',
        "output = pf.apply(model, adapter, batch)",
        "```",
        "",
        "It is in PEFT's format: `peft.PeftModel.from_pretrained(model, ...)` reads it too.",
    ]
    return "\n".join([*head, "", "# Adapter", "", "; ".join(facts) + ".", "", *use, ""])
