"""The network that makes a prompt, or what it is the sum of, kept beside PEFT's files, which hold the prompt alone.

So training goes on where it was saved. The file's name has a digest of the prompt that its network makes: another
writer's prompt leaves it behind unread, and a kill in the middle of a save finds the old one still there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from peftfn import methods
from peftfn.core import files, reading
from peftfn.core.adapter import Adapter, sorted_tree

_PROMPT = "prompt_embeddings"
_PREFIX = "peftfn_encoder-"


def writes(
    adapter: Adapter, tensors: Mapping[str, Tensor], plain: Callable[[str, Tensor], Tensor]
) -> dict[str, files.Write]:
    """The file to write beside the tensors of an adapter, by name; none where they say all of it.

    Args:
        adapter: what is saved.
        tensors: what PEFT's file will hold.
        plain: gives a tensor of the adapter as a file can hold it.
    """
    method, leaf = methods.of(adapter.config), adapter.params.get("", {})
    if method.on_call is None or not leaf:
        return {}
    buffers = adapter.buffers.get("", {})
    read = method.files.read(adapter.config, method.files.write(adapter.config, {**leaf, **buffers}))
    again, held = method.parted(adapter.config, "", read)
    if _are_same({**leaf, **buffers}, {**again, **held}):
        return {}
    said = method.constants(adapter.config, "", leaf)
    whole = {**leaf, **{name: tensor for name, tensor in buffers.items() if name not in said}}
    own = {name: plain(name, tensor) for name, tensor in whole.items()}
    return {_name(tensors[_PROMPT]): lambda path: safetensors.torch.save_file(own, path, {"format": "pt"})}


def restored(adapter: Adapter, origin: reading.Origin, device: torch.device) -> Adapter:
    """An adapter of a prompt with the network that made it, if that was saved along."""
    method = methods.of(adapter.config)
    if method.on_call is None or method.on_call.encoded is None or "" not in adapter.params:
        return adapter
    prompt = method.files.write(adapter.config, {**adapter.params[""], **adapter.buffers.get("", {})})[_PROMPT]
    path = reading.try_find(origin, _name(prompt))
    if path is None:
        return adapter
    params, held = method.parted(adapter.config, "", safetensors.torch.load_file(path, device=str(device)))
    buffers = {**adapter.buffers, "": held} if held else adapter.buffers
    return adapter.replace(params=sorted_tree({**adapter.params, "": params}), buffers=sorted_tree(buffers))


def remove_others(folder: Path, kept: Mapping[str, object]) -> None:
    """Remove the networks of prompts that are no longer there."""
    for path in folder.glob(f"{_PREFIX}*.safetensors"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _are_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _name(prompt: Tensor) -> str:
    data = prompt.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{_PREFIX}{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
