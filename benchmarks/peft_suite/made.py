"""A subject whose base is a module that a test has made, and whose config is an object of peft's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_suite.subject import Subject, cast


class Made(Subject):
    """A base and a config as they are; the base's class says which of peft's faults are to be looked past."""

    def __init__(self, model: nn.Module, config: Any, inputs: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        attends = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        super().__init__("MHA" if attends else type(model).__name__, type(config), {}, None, seed)
        self._model, self._config = copy.deepcopy(model), copy.deepcopy(config)
        fields = vars(config) if config is not None else {}
        self.kwargs = {name: value for name, value in fields.items() if not name.startswith("_")}
        self.inputs = dict(inputs) if inputs is not None else {"X": torch.arange(90).view(9, 10)}

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The base, a new one, always the same."""
        return cast(copy.deepcopy(self._model).eval(), dtype)

    def peft_config(self) -> Any:
        """peft's config, a new one: peft writes into it."""
        return copy.deepcopy(self._config)

    def with_(self, *, seed: int | None = None, **changes: Any) -> Made:
        """The same with another seed, or other fields of the config."""
        config = copy.deepcopy(self._config)
        for name, value in changes.items():
            setattr(config, name, value)
        return Made(self._model, config, self.inputs, self.seed if seed is None else seed)

    def beside(self, config: Any, seed: int = 1) -> Made:
        """Another config on the same base."""
        return Made(self._model, config, self.inputs, seed)


def seeded(build: Any, *args: Any, **kwargs: Any) -> nn.Module:
    """A module with seeded weights."""
    torch.manual_seed(0)
    return build(*args, **kwargs)
