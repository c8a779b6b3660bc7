"""Embeddings with other rows than the base on disk has: tokens were added to it before training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from peftfn.models import layers

_CONFIG = "config.json"


def copies(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Copies of the tables of input and output that have another number of rows than the base's config says, by path.

    A file without them would leave the new tokens with rows at random when it is read; PEFT writes them too
    (`save_embedding_layers="auto"`). The config is that of the folder, or of the cached files, that the model is from.
    """
    rows = _rows_of_base(model)
    if rows is None:
        return {}
    named = ("get_input_embeddings", "get_output_embeddings")
    tables = [getattr(model, name)() for name in named if hasattr(model, name)]
    found: dict[str, dict[str, Tensor]] = {}
    for path, module in layers.named_modules(model):
        weight = module._parameters.get("weight")
        if any(module is one for one in tables) and weight is not None and weight.shape[0] != rows:
            found[path] = {"weight": weight.detach().clone()}
    return found


def _rows_of_base(model: nn.Module) -> int | None:
    name = getattr(model, "name_or_path", None)
    config = getattr(model, "config", None)
    if not isinstance(name, str) or not name or not hasattr(config, "vocab_size"):
        return None
    path = Path(name) / _CONFIG
    if not path.is_file():
        path = _cached(name)
    try:
        said: Any = None if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    rows: Any = cast("Mapping[str, Any]", said).get("vocab_size") if isinstance(said, dict) else None
    now: Any = getattr(config, "vocab_size", None)
    return rows if type(rows) is int and rows != now else None


def _cached(name: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        found: Any = try_to_load_from_cache(name, _CONFIG)
    except (ImportError, ValueError):  # it is no name of the hub's
        return None
    return Path(found) if isinstance(found, str) else None
