"""Rows of a layer as runs, [start, end) pairs: plain numbers, so that they are static for every transform."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]


def union(runs: Iterable[tuple[int, int]]) -> Runs:
    """Every row that is in one of them, in order, in as few runs as possible."""
    made: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((start, end))
    return tuple(made)


def count(runs: Runs) -> int:
    """How many rows there are."""
    return sum(end - start for start, end in runs)


def numbers(runs: Runs, device: torch.device) -> Tensor:
    """The rows' numbers, (n,)."""
    made = [torch.arange(*run, device=device) for run in runs]
    return made[0] if len(made) == 1 else torch.cat(made)
