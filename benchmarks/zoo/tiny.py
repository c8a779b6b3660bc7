"""A tiny model of any class of transformers, and a batch for it.

For another sweep:

    import sys; sys.path.insert(0, "benchmarks")
    from zoo.classes import entries                      # Entry(name, family, model_type), .task, .model_class
    from zoo.tiny import model_and_batch, batch_of
    from zoo.outputs import tensors, apart

    for one in entries():
        model, batch = model_and_batch(one.model_class)  # eval, seeded, float64 if it runs so; 2 rows, keywords
        alone = batch_of(model, rows=(1,))               # the second row by itself

A class that cannot be built or run raises `CannotBuild` with the reason. Import torch, transformers and peft in a
parent and fork a process for each class: importing them takes ten times what one class does.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils.import_utils import BACKENDS_MAPPING

from zoo.batches import row
from zoo.outputs import tensors
from zoo.tiny_config import tiny_config
from zoo.weights import scaled

# Some detectors ask for scipy when they are made, for a loss that no check calls.
_, ASKED = BACKENDS_MAPPING["scipy"]
BACKENDS_MAPPING["scipy"] = (lambda: True, ASKED)


class CannotBuild(RuntimeError):  # noqa: N818  # it says what cannot be done
    """The class has no tiny model here, for the reason given."""


def make(model_class: type[transformers.PreTrainedModel], dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model of that class: in evaluation, the same at each call."""
    torch.manual_seed(0)
    model = model_class(tiny_config(model_class))
    return scaled(model).to(dtype).eval()


def batch_of(model: Any, rows: tuple[int, ...] = (0, 1), **given: Any) -> dict[str, Tensor]:
    """Keyword arguments of a call: a row has the same content whichever rows are beside it."""
    each = [row(model, number, **(getattr(model, "zoo_given", {}) | given)) for number in rows]
    return {name: torch.cat([one[name] for one in each]) for name in each[0]}


def model_and_batch(model_class: type[transformers.PreTrainedModel]) -> tuple[Any, dict[str, Tensor]]:
    """The tiny model, in float64 if it runs so, and a batch of two rows that it was seen to run on.

    Raises:
        CannotBuild: it cannot be built, or runs in neither precision.
    """
    said = []
    for dtype in (torch.float64, torch.float32):
        for given in ({}, {"seen": False}):  # words alone where the pictures that a model takes are not known here
            try:
                model = make(model_class, dtype)
                model.zoo_given = given
                batch = batch_of(model)
                with torch.no_grad():
                    found = tensors(model(**batch))
                if not found:
                    raise ValueError("the output has no tensor")
                if not all(bool(tensor.isfinite().any()) for tensor in found.values()):
                    raise ValueError("the output is not finite")
            except Exception as error:  # noqa: BLE001  # whatever a model raises is its reason
                said.append(f"{type(error).__name__}: {error}")
            else:
                return model, batch
    raise CannotBuild(f"{model_class.__name__}: {' | '.join(dict.fromkeys(said[-2:]))}") from None
