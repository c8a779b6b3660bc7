"""Modules that transformers renamed: a config may say `query` where the layer is now called `q_proj`.

transformers 5 gave the layers of ViT, DINOv2, SegFormer and others new names, and knows how the keys of published
checkpoints map to them. peft 0.21 does not follow: its first example, a ViT with `target_modules=["query", "value"]`,
finds no module there.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from peftfn.models import layers


def old_paths(model: nn.Module) -> dict[str, str]:
    """The path in published checkpoints of every module that is called otherwise now, by its path in the model."""
    renamings = _renamings(model)
    found: dict[str, str] = {}
    for path, module in layers.named_modules(model) if renamings else ():
        # The renamings are for tensors; some of them look for what comes after the module's name.
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if names:
            key = f"{path}.{names[0]}"
            for renaming in renamings:
                key, _ = renaming.rename_source_key(key)
            if key.endswith(f".{names[0]}") and key != f"{path}.{names[0]}":
                found[path] = key.removesuffix(f".{names[0]}")
    return found


def _renamings(model: nn.Module) -> list[Any]:
    """transformers' own renamings from the model's names to its checkpoints', in the order in which they apply."""
    try:
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        loading: Any = importlib.import_module("transformers.core_model_loading")
    except ImportError:  # transformers 4: the model has the checkpoint's names
        return []
    if not hasattr(model, "base_model_prefix"):
        return []
    every = mapping.get_model_conversion_mapping(model, add_legacy=False)
    return [one.reverse_transform() for one in reversed(every) if type(one) is loading.WeightRenaming]
