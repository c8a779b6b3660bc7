"""Weights that make a tiny model's output tell something: what a fresh model leaves near nothing is drawn again."""

from __future__ import annotations

import math

import torch
from torch import nn

GAIN = 0.8  # of the standard deviation that keeps the size of what passes
EMBEDDED = 0.5


def scaled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model itself, its small weights drawn again from the seed; weights of a sensible size stay."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if parameter.is_floating_point() and parameter.numel():
                _scale(parameter, id(parameter) in embeddings, generator)
    return model


def _scale(parameter: nn.Parameter, embedded: bool, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim >= 2:
        fan = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
        wanted = EMBEDDED if embedded else GAIN / math.sqrt(max(fan, 1))
        if float(parameter.float().std(unbiased=False)) < wanted and not _constant(parameter):
            parameter.copy_(noise * wanted)
        return
    if float(parameter.abs().max()) < 0.02:  # biases at 0, layer scales and gates that a fresh model keeps shut
        parameter.copy_(noise * 0.1 if _constant(parameter) and not parameter.any() else 0.5 + noise * 0.1)
    else:
        parameter.add_(noise * 0.05)


def _constant(parameter: nn.Parameter) -> bool:
    """Whether all its numbers are one, which is not 0: a norm's or a gate's start, that says something."""
    first = parameter.flatten()[0]
    return bool((parameter == first).all()) and (parameter.ndim < 2 or bool(first != 0))
