"""Weighted sums of tensors, which may be pruned first (magnitude, DARE) or have their signs elected (TIES).

Sources: TIES https://arxiv.org/abs/2306.01708 (section 3), DARE https://arxiv.org/abs/2311.03099 (section 3.2). The
formulas are those of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = (
    *("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)
"""The ways to combine adapters, by PEFT's names."""

PRUNED = tuple(name for name in NAMES if name.startswith(("ties", "dare", "magnitude")))
"""Those that take a density."""

SIGNS = ("total", "frequency")
"""How TIES elects a sign: by the sum of values, or by their number."""


class Recipe(NamedTuple):
    """How to combine adapters; see `peftfn.combine` for each field.

    Attributes:
        weights: one 0-d tensor for each adapter.
    """

    method: str
    weights: tuple[Tensor, ...]
    rank: int | None
    clamp: float | None
    full_matrices: bool
    driver: str | None
    density: float | None
    majority_sign_method: str
    generator: torch.Generator


def mixed(tensors: Sequence[Tensor], weights: Sequence[Tensor], recipe: Recipe) -> Tensor:
    """Σ w·t over the tensors t of one shape, with the values that pruning and the elected signs leave."""
    if recipe.density is not None and recipe.density < 1:
        tensors = [_pruned(tensor, recipe, recipe.density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    weighted = stacked * torch.stack(list(weights)).to(stacked.dtype).view(-1, *(1 for _ in stacked.shape[1:]))
    if "ties" not in recipe.method:
        return weighted.sum(0)
    agrees = _agrees(stacked, recipe.majority_sign_method)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _pruned(tensor: Tensor, recipe: Recipe, density: float) -> Tensor:
    if recipe.method.startswith("dare"):
        # Drawn on the generator's device, by default the CPU, so that every device gets the same numbers.
        chances = torch.full(tensor.shape, density, dtype=tensor.dtype, device=recipe.generator.device)
        return tensor * torch.bernoulli(chances, generator=recipe.generator).to(tensor.device) / density
    flat = tensor.flatten()
    largest = flat.abs().topk(int(density * flat.numel())).indices
    mask = torch.zeros_like(flat).scatter(0, largest, 1.0)
    return tensor * mask.view(tensor.shape)


def _agrees(stacked: Tensor, how: str) -> Tensor:
    """Where a value has the sign that most of them have, by weight or by number; a zero never has."""
    signs = stacked.sign()
    votes = stacked.sum(0) if how == "total" else signs.sum(0)
    return signs == torch.where(votes >= 0, 1.0, -1.0).to(signs.dtype)
