"""The network that makes a prompt, kept beside PEFT's files, which hold nothing but the prompt.

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
    """The file to write beside the tensors of an adapter, by name; none where it has no network.

    Args:
        adapter: what is saved.
        tensors: what PEFT's file will hold.
        plain: gives a tensor of the adapter as a file can hold it.
    """
    leaf = adapter.params.get("", {})
    if methods.of(adapter.config).on_call is None or _PROMPT in leaf:
        return {}
    own = {name: plain(name, tensor) for name, tensor in leaf.items()}
    return {_name(tensors[_PROMPT]): lambda path: safetensors.torch.save_file(own, path, {"format": "pt"})}


def restored(adapter: Adapter, origin: reading.Origin, device: torch.device) -> Adapter:
    """An adapter of a prompt with the network that made it, if that was saved along."""
    prompt = adapter.params.get("", {}).get(_PROMPT)
    if prompt is None or len(methods.of(adapter.config).names) == 1:
        return adapter
    path = reading.try_find(origin, _name(prompt))
    if path is None:
        return adapter
    leaf = safetensors.torch.load_file(path, device=str(device))
    return adapter.replace(params=sorted_tree({**adapter.params, "": leaf}))


def remove_others(folder: Path, kept: Mapping[str, object]) -> None:
    """Remove the networks of prompts that are no longer there."""
    for path in folder.glob(f"{_PREFIX}*.safetensors"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _name(prompt: Tensor) -> str:
    data = prompt.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{_PREFIX}{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
