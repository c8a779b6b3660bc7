"""Tensor names in PEFT's files for a method that acts on the model itself: its prompt, and heads beside it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peftfn.core.adapter import Adapter, Tree, sorted_tree
from peftfn.core.config import PeftConfig
from peftfn.methods import Method

PREFIX = "base_model."
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""What a saved norm has beside its parameters."""


def to_keys(method: Method, adapter: Adapter) -> dict[str, Tensor]:
    """The keys of a method that acts on the model itself: PEFT wraps no layer for it, so they have no path."""
    keyed = dict(method.files.write(adapter.config, {**adapter.params.get("", {}), **adapter.buffers.get("", {})}))
    for tree in (adapter.params, adapter.buffers):
        for path in filter(None, tree):
            keyed |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in tree[path].items()}
    return keyed


def from_keys(method: Method, tensors: Mapping[str, Tensor], config: PeftConfig, source: str) -> Adapter:
    """The adapter whose tensors have these keys.

    Raises:
        KeyError: a key is missing, or unknown.
        ValueError: the prompt is not as long as the config says.
    """
    own = {name: tensor for name, tensor in tensors.items() if name in method.names}
    if "prompt_embeddings" not in own:
        raise KeyError(f"{source} has {sorted(tensors)[:4]}; expected prompt_embeddings, as PEFT writes them.")
    try:
        method.files.check(config, "", own)
    except ValueError as error:
        raise ValueError(f"{source} has {error}; expected a whole adapter.") from None
    trained, held = method.parted(config, "", method.files.read(config, own))
    params: Tree = {"": trained}
    buffers: Tree = {"": held} if held else {}
    for key in tensors.keys() - own.keys():
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or not path:
            raise KeyError(
                f"{source} has the key {key!r}, which {method.config.__name__} does not know: the file is another "
                "config's, or was not written by save_pretrained."
            )
        home = buffers if name in STATISTICS or not tensors[key].is_floating_point() else params
        home.setdefault(path, {})[name] = tensors[key]
    return Adapter(sorted_tree(params), sorted_tree(buffers), config)
