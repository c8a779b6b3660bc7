"""Adapters from before transformers renamed the modules that they are for (`peftfn.models.renamed_modules`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftfn.checkpoints import keys
from peftfn.core.config import PeftConfig, patterns_of
from peftfn.models import layers, renamed_modules, targets


def in_present_names(
    tensors: Mapping[str, Tensor], config: PeftConfig, model: nn.Module, source: str
) -> tuple[Mapping[str, Tensor], PeftConfig]:
    """A file's tensors and config with the modules called what they are called in this model.

    Raises:
        ValueError: the config has patterns for the names of before.
    """
    present = {path for path, _ in layers.named_modules(model)}
    now = {before: path for path, before in renamed_modules.old_paths(model).items() if before not in present}
    found = {_renamed(key, now): tensor for key, tensor in tensors.items()}
    if found.keys() == tensors.keys():
        return tensors, config
    given: Any = config
    for field, patterns in patterns_of(config).items():
        if patterns:
            raise ValueError(
                f"{source} is for this model as an older transformers names its modules, and so is its {field}; write "
                "the present names into adapter_config.json, or load it with that version."
            )
    changes = {
        field: targets.in_present_names(model, getattr(given, field))
        for field in ("target_modules", "exclude_modules", "feedforward_modules")
        if hasattr(given, field)
    }
    return found, dataclasses.replace(given, **changes)


def _renamed(key: str, now: Mapping[str, str]) -> str:
    """The key, if it is one of a module that has another name now, with that name."""
    path = key.removeprefix(keys.PREFIX)
    while path and path not in now:
        path = path.rpartition(".")[0]
    return key.replace(f"{keys.PREFIX}{path}", f"{keys.PREFIX}{now[path]}", 1) if path else key
