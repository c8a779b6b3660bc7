"""Which examples each optimizer step sees: a pure function of the lengths, the settings and the step number.

So a resumed run needs no saved position in the data: step 40 is step 40.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

_POOL = 32
"""Batches that are sorted by length together: enough to pad little, few enough to stay shuffled."""


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, each example once, examples of like length together, in shuffled order.

    Args:
        lengths: tokens in each example; the indices returned are into it.
        batch_size: examples in a batch (the last may have fewer).
        seed: with `epoch`, decides the order.
        epoch: counted from 0.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = _shuffled(len(lengths), generator)
    pool = _POOL * batch_size
    by_length = [
        index
        for start in range(0, len(order), pool)
        for index in sorted(order[start : start + pool], key=lengths.__getitem__)
    ]
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    return [batches[i] for i in _shuffled(len(batches), generator)]


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    return [int(i) for i in torch.randperm(count, generator=generator)]


def steps_per_epoch(examples: int, batch_size: int, accumulation: int) -> int:
    """Optimizer steps in one pass over the data."""
    return math.ceil(math.ceil(examples / batch_size) / accumulation)


def steps(
    lengths: Sequence[int], batch_size: int, accumulation: int, seed: int, start: int, total: int
) -> Iterator[tuple[int, list[list[int]]]]:
    """Number and batches of each optimizer step from `start` (counted from 0) to `total`.

    A step has `accumulation` batches, fewer at the end of an epoch. What it has does not depend on `start`.
    """
    per_epoch = steps_per_epoch(len(lengths), batch_size, accumulation)
    drawn, batches = -1, list[list[int]]()
    for step in range(start, total):
        epoch, offset = divmod(step, per_epoch)
        if epoch != drawn:
            drawn, batches = epoch, epoch_batches(lengths, batch_size, seed, epoch)
        yield step, batches[offset * accumulation : (offset + 1) * accumulation]


def in_order(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches for measuring: each example once, sorted by length to pad little."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """The rate of step `step` (from 0): linearly up to `peak` in the warm-up, then linearly down to 0.

    `warmup` is a number of steps, or below 1 their share of `total`.
    """
    rising = math.ceil(warmup * total) if warmup < 1 else int(warmup)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (total - step) / max(total - rising, 1)
