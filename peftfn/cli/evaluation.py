"""Loss and accuracy, or loss and perplexity, of a base with or without an adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import peftfn as pf
from peftfn.cli.bases import Base, mode
from peftfn.cli.data import batches
from peftfn.cli.data.tasks import TASKS, Examples, suited


class Score(NamedTuple):
    """Mean loss over all examples (or tokens), and the share of right labels (a language model has none)."""

    loss: float
    accuracy: float | None

    @property
    def perplexity(self) -> float:
        """exp(loss): the number of tokens among which a uniform guess would have this loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp(710) overflows a double

    @property
    def named(self) -> dict[str, float]:
        """The numbers that the task is judged by, by name."""
        if self.accuracy is None:
            return {"loss": self.loss, "perplexity": self.perplexity}
        return {"loss": self.loss, "accuracy": self.accuracy}

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in self.named.items())


def evaluate(
    base: Base,
    task: str,
    examples: Examples,
    adapter: pf.Adapter | None,
    batch_size: int,
    index: Sequence[int] | None = None,
) -> Score:
    """The score on `examples`, in eval mode and without gradients; the base alone where `adapter` is None.

    Of a stack, `index` has the number of each example's adapter.
    """
    how = TASKS[task]
    losses, terms, right = 0.0, 0, 0
    with mode(base.model, training=False), torch.no_grad():
        for chosen in batches.in_order([len(ids) for ids in examples.ids], batch_size):
            batch = suited(how.batch(examples, chosen, base.pad), base.model, adapter)
            weight = how.weight(batch)
            batch = {name: tensor.to(base.model.device) for name, tensor in batch.items()}
            own = None if index is None else [index[number] for number in chosen]
            output = pf.apply(base.model, adapter if adapter is not None else (), batch, index=own)
            losses += float(output.loss) * weight
            terms += weight
            if examples.labels:
                right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return Score(losses / terms, right / terms if examples.labels else None)


def evaluate_stack(base: Base, task: str, examples: Examples, stacked: pf.Adapter, batch_size: int) -> list[Score]:
    """The score of each adapter of a stack, all of them in one pass over `examples`."""
    how, adapters = TASKS[task], pf.unstack(stacked)
    losses, right, terms = torch.zeros(len(adapters), dtype=torch.float64), torch.zeros(len(adapters)), 0
    with mode(base.model, training=False), torch.no_grad():
        for chosen in batches.in_order([len(ids) for ids in examples.ids], batch_size):
            made = suited(how.batch(examples, chosen, base.pad), base.model, adapters[0])
            weight = how.weight(made)
            batch = {name: tensor.to(base.model.device) for name, tensor in made.items()}

            def one(adapter: pf.Adapter, batch: dict[str, Tensor] = batch) -> tuple[Tensor, Tensor]:
                output = pf.apply(base.model, adapter, batch)
                return output.loss, output.logits

            loss, logits = torch.vmap(one)(stacked)
            losses += loss.double().cpu() * weight
            terms += weight
            if examples.labels:
                right += (logits.argmax(-1) == batch["labels"]).sum(1).cpu()
    shares = [float(one) / terms if examples.labels else None for one in right]
    return [Score(float(loss) / terms, share) for loss, share in zip(losses, shares, strict=True)]
