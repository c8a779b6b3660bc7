"""Adapters as PEFT's two files: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`, read only).

The key of a tensor is `base_model.model.<site path>.<name>`; names that differ between versions of PEFT are read in
each spelling and written in the latest one.

Both files are written whole, and the weights file also carries the config and a digest of the config file that it
was written over: so one rename makes the new adapter. Whatever a kill leaves behind loads as the old one or the new
one, and so does a folder that is written while it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from peftfn import methods
from peftfn.checkpoints import keys, model_card, prompt_encoder, renamed_keys, site_notes
from peftfn.core import files, hub, reading
from peftfn.core.adapter import Adapter
from peftfn.core.config import PeftConfig
from peftfn.core.transforms import is_traced
from peftfn.models import fused_projections, layers
from peftfn.ops import validate

# Names in files that people have: they never change, whatever the modules here are called.
_CONFIG_KEY = "peftfn.config"
_REPLACES_KEY = "peftfn.replaces"
_PARTS_KEY = "peftfn.parts"
_BUFFERS_KEY = "peftfn.buffers"
_TRIES = 100  # of reading a folder that somebody writes all the time


def save(adapter: Adapter, folder: str | Path) -> Path:
    """The folder, with the adapter written into it as PEFT's two files and a model card.

    PEFT's files hold the prompt that P-tuning and projected prefixes make, not the network that makes it: that goes
    into a file of its own beside them, so that training can go on.

    Args:
        adapter: a single adapter; tensors are written as they are, bit for bit.
        folder: made if missing; an adapter that is there is replaced, other files are left alone.

    Raises:
        TypeError: it is not an adapter, or it is a stack.
        ValueError: a tensor has no values to write (it is on the meta device, or inside a `torch.func` transform).
        NotADirectoryError: `folder` is a file.
        OSError: the disk is full, or the folder cannot be written to; what was there stays.

    Example:
        >>> import tempfile, torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> folder = pf.save(adapter, tempfile.mkdtemp())
        >>> torch.equal(pf.load(folder).params["0"]["lora_A"], adapter.params["0"]["lora_A"])
        True
    """
    folder = Path(folder)
    _check_single(adapter)
    plain = {key: _plain(key, tensor) for key, tensor in keys.to_keys(adapter).items()}
    config = methods.of(adapter.config).files.config(adapter)
    text = fused_projections.whole_config(adapter.replace(config=config)).to_json()
    with files.locked(folder):  # two writers at once would leave the weights of the one with the config of the other
        old = folder / files.CONFIG
        metadata = {
            "format": "pt",
            _CONFIG_KEY: text,
            _REPLACES_KEY: _digest(old.read_bytes()) if old.is_file() else "",
            _PARTS_KEY: site_notes.written(adapter),
        }
        if (
            fixed := []
            if methods.of(adapter.config).whole
            else [key for key in keys.fixed_keys(adapter) if key in plain]
        ):
            metadata[_BUFFERS_KEY] = json.dumps(fixed)
        encoder = prompt_encoder.writes(adapter, plain, _plain)
        writes: dict[str, files.Write] = {
            **encoder,
            files.WEIGHTS: lambda path: safetensors.torch.save_file(plain, path, metadata),
            files.CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        }
        if not (folder / files.CARD).exists():
            writes[files.CARD] = lambda path: path.write_text(model_card.card(adapter), encoding="utf-8")
        files.write_together(folder, writes)
        (folder / files.PICKLE).unlink(
            missing_ok=True
        )  # an older file of the same adapter, which readers would find too
        prompt_encoder.remove_others(folder, encoder)
    return folder


def _check_single(adapter: object) -> None:
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"save was given a {type(adapter).__name__}; expected a peftfn.Adapter (several go into a folder each)."
        )
    if adapter.members is not None:
        raise TypeError("save was given a stack; save its adapters one by one: for a in peftfn.unstack(stacked): ...")


def _plain(key: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta or is_traced(tensor):
        where = "on the meta device" if tensor.is_meta else "inside a torch.func transform or torch.compile"
        raise ValueError(f"save: {key} is {where} and has no values to write; save the adapter outside of it.")
    # A copy, because safetensors refuses tensors that share memory (one leaf at two sites).
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


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
    mmap: bool = False,
) -> Adapter:
    """The adapter in a folder or hub repository that peftfn or PEFT (0.5.0 to 0.21) wrote.

    Args:
        folder_or_hub_id: a folder, or a hub id.
        model: the base. With it the adapter is held against it at once: sites that are missing or too many, and
            shapes. Without it, that happens where the adapter is used. An adapter from before transformers gave
            this model's modules new names (ViT, DINOv2, ... in 5.0) needs it.
        adapter_name: an adapter that PEFT saved under a name of its own, in a sub-folder.
        subfolder: where in the folder or repository the files are.
        revision: for the hub: a branch, a tag or a commit.
        token: for the hub, as `huggingface_hub` has it.
        cache_dir: for the hub: where downloads are kept.
        device: where the tensors go.
        mmap: leave the tensors in their file until they are used: hundreds of adapters then cost little memory. What
            is written to such a tensor does not reach the file. `save` and PEFT put a new file in the old one's place,
            which changes nothing here; code that writes into the file itself does.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is truncated, corrupt, or a pickle that holds more than tensors; or the config asks for
            what is not supported, or is not the weights' own; or, with `model`, something does not fit.
        KeyError: a key is unknown or missing.
        TypeError: `model` is no module, or the first argument no path.

    Example:
        >>> import tempfile, torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> folder = pf.save(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])), tempfile.mkdtemp())
        >>> pf.load(folder, model)
        Adapter(LoraConfig, 1 sites)
          0: lora_A 2×4, lora_B 2×2
    """
    _check_types(folder_or_hub_id, model)
    device = torch.device(device)
    where = "/".join(part for part in (subfolder, adapter_name) if part and part != "default") or None
    origin = reading.settled(reading.Origin(str(folder_or_hub_id), where, revision, token, cache_dir))
    tensors, metadata, source, config = read(origin, device, mmap=mmap)
    if model is not None and not _has_modules_of(tensors, model):
        tensors, config = renamed_keys.in_present_names(tensors, config, model, str(source))
    noted, named = site_notes.read(metadata.get(_PARTS_KEY, ""), str(source))
    fixed = site_notes.names(metadata.get(_BUFFERS_KEY, ""), str(source))
    ours = _CONFIG_KEY in metadata
    adapter = keys.from_keys(tensors, config, str(source), ordered=ours, model=model, noted=noted, fixed=fixed)
    if methods.of(config).on_call is not None:
        adapter = prompt_encoder.restored(adapter, origin, device)
    adapter = site_notes.with_targets(adapter)
    if noted and named != cast("Any", adapter.config).target_modules:
        adapter = adapter.replace(config=site_notes.named_config(adapter, named))
    if model is not None:
        validate.against(adapter, model, str(source))
    return adapter


def _has_modules_of(tensors: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether each key is that of a module of the model, as far as can be told at once."""
    present = {path for path, _ in layers.named_modules(model)}
    owners = (key.removeprefix(keys.PREFIX).rpartition(".")[0] for key in tensors)
    return all(owner in present or owner.rpartition(".")[0] in present for owner in owners)


class Read(NamedTuple):
    """What an adapter's files hold: tensors by key, the notes beside them, the weights file, and the config."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    source: Path
    config: PeftConfig


def read(origin: reading.Origin, device: torch.device, *, mmap: bool = False, tries: int = _TRIES) -> Read:
    """Both files of an adapter, as they are; with `mmap`, tensors that are the file in memory."""
    beside = reading.try_find(origin, files.CONFIG)
    text = beside.read_bytes() if beside else None  # before the weights: see _config
    pinned = reading.pinned(origin, beside)
    tensors, metadata, source = _read_weights(pinned, text is None, device, mmap)
    is_other = beside is not None and text is not None and not _goes_with(metadata, text)
    if is_other and tries and beside is not None and beside.read_bytes() != text:  # saved more than once meanwhile
        return read(origin, device, mmap=mmap, tries=tries - 1)
    return Read(tensors, metadata, source, _config(pinned, beside, text, metadata))


def _goes_with(metadata: Mapping[str, str], text: bytes) -> bool:
    """Whether a config is the one that the weights were saved with, or the one that they replace."""
    return text == metadata.get(_CONFIG_KEY, "").encode() or _digest(text) == metadata.get(_REPLACES_KEY)


def _check_types(folder: object, model: object) -> None:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"load was given a {type(folder).__name__}; expected a folder or a hub id.")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"load: model is a {type(model).__name__}; expected the base, an nn.Module.")


def _config(origin: reading.Origin, beside: Path | None, text: bytes | None, metadata: Mapping[str, str]) -> PeftConfig:
    """The config beside the weights, or the one inside them if what is beside them is the one that they replace.

    The weights are renamed before the config and read after it: a config beside them that is neither theirs nor the
    one that they replace was put there by hand, and counts.
    """
    inside = metadata.get(_CONFIG_KEY)
    if inside and (text is None or _digest(text) == metadata.get(_REPLACES_KEY)):
        source = f"the config inside {origin.folder / files.WEIGHTS}"
        return PeftConfig.from_dict(reading.parse_json(inside, source), source=source)
    if beside is None or text is None:
        raise reading.missing(origin, files.CONFIG)
    return PeftConfig.from_dict(reading.parse_json(text, str(beside)), source=str(beside))


def _read_weights(
    origin: reading.Origin, alone: bool, device: torch.device, mmap: bool
) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    path = reading.try_find(origin, files.WEIGHTS)
    if path is not None:
        return *reading.safetensors_of(path, device, mmap), path
    path = reading.try_find(origin, files.PICKLE)
    if path is not None:
        return reading.pickled(path, device), {}, path
    raise reading.missing(origin, files.CONFIG if alone else f"{files.WEIGHTS} or {files.PICKLE}")


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def push_to_hub(
    adapter: Adapter,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
) -> str:
    """The address of the commit that puts the adapter's files and its model card into a hub repository.

    Args:
        adapter: as for `save`.
        repo_id: the repository, `user/name`; made if missing.
        revision: the branch, made if missing; by default the main one.
        token: as `huggingface_hub` has it; by default the one of `hf auth login`.
        private: whether a repository that is made is private; by default what the account says.

    Raises:
        TypeError: as `save`.
        ValueError: as `save`, or `repo_id` is no valid name (`HFValidationError`).
        OSError: the hub cannot be reached, or refuses (`HfHubHTTPError`).

    Example:
        >>> import peftfn as pf
        >>> pf.push_to_hub(pf.load("path/of/an/adapter"), "user/name")  # doctest: +SKIP
        'https://huggingface.co/user/name/commit/...'
    """
    return hub.push(repo_id, lambda folder: save(adapter, folder), token=token, private=private, revision=revision)
