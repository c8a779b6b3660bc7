"""A base with many adapters, in both libraries and by hand."""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import peftfn as pf
from lib import setting


class Crowd(NamedTuple):
    """A base, adapters for it, the same in one stack, and in a peft model."""

    base: Any
    adapters: list[pf.Adapter]
    stacked: pf.Adapter
    theirs: Any


def crowd(sizes: setting.Sizes, count: int, device: torch.device, targets: Any = setting.LINEAR) -> Crowd:
    """Adapters in both libraries."""
    base = setting.llama(sizes).eval().requires_grad_(False)  # as peft makes its copy
    config = pf.LoraConfig(r=sizes.r, target_modules=targets, task_type="CAUSAL_LM")
    adapters = [setting.trained(base, config, torch.Generator().manual_seed(number)) for number in range(count)]
    theirs = setting.in_peft(base, adapters, trainable=True)
    made = Crowd(base, adapters, pf.stack(adapters), theirs.eval())
    return Crowd(*(setting.moved(one, device) for one in made))


def ids(made: Crowd, rows: int, tokens: int) -> Tensor:
    """Random words, where the base is."""
    words = torch.randint(0, setting.VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return words.to(made.base.device)


def by_hand(made: Crowd, order: Tensor, members: pf.Adapter) -> Any:
    """A copy of the base that runs three kernels at each site, or six where rows are sorted, and asks nothing.

    What is left of the time when all that a library does is left out: no check, no dropout, no transform, one rank.
    """
    model, back = copy.deepcopy(made.base), order.argsort()
    in_order = order.equal(torch.arange(len(order)))
    for path, leaf in members.params.items():
        layer = model.get_submodule(path)
        scaling = float(members.buffers[path]["scaling"][0])
        run = functools.partial(_kernels, layer.weight, leaf["lora_A"].mT, leaf["lora_B"].mT, scaling)
        layer.forward = run if in_order else functools.partial(_sorted, run, back, order)
    return model


def _kernels(weight: Tensor, a: Tensor, b: Tensor, scaling: float, x: Tensor) -> Tensor:
    return torch.baddbmm(F.linear(x, weight), torch.bmm(x, a), b, alpha=scaling)


def _sorted(run: functools.partial[Tensor], back: Tensor, order: Tensor, x: Tensor) -> Tensor:
    return run(x.index_select(0, back)).index_select(0, order)
