"""Sweeps: K adapters trained at once over one base, each with its own learning rate, seed, rank, alpha and data.

A step is one program for all of them: what the base computes is computed in one batch, and each adapter's slice of the
stack gets the gradient of its own loss, since no other loss depends on it.

```python
adapters = [pf.init(model, pf.LoraConfig(r=r), torch.Generator().manual_seed(s)) for r, s in ((4, 0), (8, 0), (8, 1))]
losses = torch.vmap(lambda adapter, batch: pf.apply(model, adapter, batch).loss, randomness="different")

run = pf.sweep.begin(adapters)
for batches in data:  # each tensor (K, rows, ...): the batch of each adapter
    run, values = pf.sweep.step(run, losses, batches, lr=[1e-3, 1e-3, 3e-3])
trained = pf.unstack(run.adapter)
```

`losses` is any function of the stack and a batch that returns (K,) numbers. `torch.vmap` of one adapter's loss serves
every method and every loss. For LoRA with one row for each adapter, `pf.apply(model, stacked, batch, index=...)`,
reduced to a loss for each row, has fewer kernels: benchmarks/many.py, "training 32 adapters".

Randomness: dropout under `torch.vmap(..., randomness="different")`, or by rows, is drawn anew for each adapter from
torch's own generator. It is not what a run of one adapter alone would draw; without dropout the runs are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor

from peftfn.core.adapter import Adapter, Tree
from peftfn.ops import stacking
from peftfn.training import optimizers
from peftfn.training.optimizers import ADAMW, Optimizer

PerAdapter = float | Tensor | Sequence[float]
"""A hyperparameter: one number for all adapters, or K numbers."""

Losses = Callable[[Adapter, Any], Tensor]
"""`(stack, batch) -> (K,)`: the loss of each adapter, of which no one depends on another adapter."""


class Run(NamedTuple):
    """K adapters in training: a value, and a node for `torch.utils._pytree`.

    Attributes:
        adapter: the stack.
        state: the optimizer's, of which every tensor has a leading axis K too.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1))
        >>> run = pf.sweep.begin([pf.init(model, pf.LoraConfig(r=1, target_modules=["0"]))] * 3)
        >>> run.adapter.params["0"]["lora_A"].shape, run.state.step
        (torch.Size([3, 1, 4]), tensor([0., 0., 0.], dtype=torch.float64))
    """

    adapter: Adapter
    state: Any


def begin(adapters: Sequence[Adapter], optimizer: Optimizer = ADAMW) -> Run:
    """The adapters before their first step, in one stack.

    Args:
        adapters: as for `peftfn.stack`: of one method; ranks, alphas and sites may differ. Where an adapter has no
            site, its slice of the stack does nothing and has gradient 0, before training and after it.
        optimizer: the one that `step` will be given.

    Raises:
        TypeError, ValueError: the adapters cannot be stacked, as in `peftfn.stack`.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1))
        >>> adapters = [pf.init(model, pf.LoraConfig(r=r, target_modules=["0"])) for r in (1, 2)]
        >>> type(pf.sweep.begin(adapters, pf.optimizers.SGD).state).__name__
        'Momentum'
    """
    stacked = stacking.stack(adapters)
    return Run(stacked, torch.vmap(optimizer.init)(_detached(stacked.params)))


def gradients(stacked: Adapter, losses: Losses, batch: Any) -> tuple[Tree, Tensor]:
    """The gradient of each adapter's own loss, in one tree with the stack's shapes, and the losses (K,).

    One backward pass of the sum: ∂(L₁ + … + L_K)/∂θₖ = ∂Lₖ/∂θₖ. It is torch's ordinary one, so activation checkpointing
    works. A tensor that no loss depends on has gradient 0.

    Args:
        stacked: the stack, `run.adapter`.
        losses: `(stack, batch) -> (K,)`, the loss of each adapter.
        batch: what `losses` takes: as a rule each tensor is (K, rows, ...), the batch of each adapter.

    Raises:
        ValueError: `losses` does not return one number for each adapter.

    Example:
        >>> import torch, peftfn as pf
        >>> adapter = pf.init(torch.nn.Sequential(torch.nn.Linear(4, 1)), pf.LoraConfig(r=1, target_modules=["0"]))
        >>> losses = torch.vmap(lambda adapter, x: adapter.params["0"]["lora_B"].sum() * x)
        >>> pf.sweep.gradients(pf.stack([adapter] * 2), losses, torch.tensor([2.0, 3.0]))[0]["0"]["lora_B"].flatten()
        tensor([2., 3.])
    """
    params = {path: {n: t.detach().requires_grad_() for n, t in leaf.items()} for path, leaf in stacked.params.items()}
    with torch.enable_grad():
        values = losses(stacked.replace(params=params), batch)
    if values.shape != (stacking.size(stacked),):
        raise ValueError(
            f"losses returned shape {tuple(values.shape)}; expected ({stacking.size(stacked)},), one loss for each "
            "adapter of the stack, as torch.vmap of one adapter's loss gives."
        )
    flat = [tensor for leaf in params.values() for tensor in leaf.values()]
    found = iter(torch.autograd.grad(values.sum(), flat, materialize_grads=True))
    return {path: {name: next(found) for name in leaf} for path, leaf in params.items()}, values.detach()


def update(
    run: Run,
    grads: Tree,
    optimizer: Optimizer = ADAMW,
    *,
    active: Tensor | Sequence[bool] | None = None,
    max_norm: PerAdapter | None = None,
    **hyperparameters: PerAdapter,
) -> Run:
    """The run after one step of the optimizer, which `torch.vmap` maps over the adapters.

    Args:
        run: as `begin`, `update` or `keep` returned it.
        grads: as `gradients` returns them.
        optimizer: the one of `begin`.
        active: (K,), false for an adapter that has stopped: its tensors and its state stay as they are, bit for bit.
        max_norm: an adapter's gradient is scaled down to this norm (over all its tensors together).
        **hyperparameters: what the optimizer's `update` takes (`lr`, `weight_decay`, ...): a number, or K numbers.

    Raises:
        ValueError: a hyperparameter, `active` or `max_norm` has neither one value nor K.

    Example:
        >>> import torch, peftfn as pf
        >>> adapter = pf.init(torch.nn.Sequential(torch.nn.Linear(4, 1)), pf.LoraConfig(r=1, target_modules=["0"]))
        >>> run = pf.sweep.begin([adapter] * 2, pf.optimizers.SGD)
        >>> grads = {"0": {name: torch.ones_like(t) for name, t in run.adapter.params["0"].items()}}
        >>> pf.sweep.update(run, grads, pf.optimizers.SGD, lr=[0.5, 0.25]).adapter.params["0"]["lora_B"].flatten()
        tensor([-0.5000, -0.2500])
    """
    given = {name: _each(name, value, run.adapter) for name, value in hyperparameters.items()}
    runs = None if active is None else _each("active", active, run.adapter).bool()
    limit = None if max_norm is None else _each("max_norm", max_norm, run.adapter)

    def one(params: Tree, grads: Tree, state: Any, runs: Any, limit: Any, given: dict[str, Tensor]) -> Any:
        grads = grads if limit is None else optimizers.clipped(grads, limit)
        made: Any = optimizer.update(params, grads, state, **given)
        if runs is None:
            return made

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(runs, new, old)

        old: Any = (params, state)
        return optree.tree_map(chosen, made, old)

    axes = (0, 0, 0, None if runs is None else 0, None if limit is None else 0, 0)
    params, state = torch.vmap(one, axes)(_detached(run.adapter.params), grads, run.state, runs, limit, given)
    return Run(run.adapter.replace(params=params), state)


def step(
    run: Run,
    losses: Losses,
    batch: Any,
    optimizer: Optimizer = ADAMW,
    *,
    active: Tensor | Sequence[bool] | None = None,
    max_norm: PerAdapter | None = None,
    **hyperparameters: PerAdapter,
) -> tuple[Run, Tensor]:
    """The run after one training step of every adapter, and the losses (K,) before it.

    `gradients` and then `update`.

    Args:
        run: as `begin`, `step` or `keep` returned it.
        losses: `(stack, batch) -> (K,)`, the loss of each adapter.
        batch: what `losses` takes: as a rule each tensor is (K, rows, ...), the batch of each adapter.
        optimizer: the one of `begin`.
        active: as of `update`.
        max_norm: as of `update`.
        **hyperparameters: as of `update`.

    Raises:
        ValueError: `losses` does not return (K,) numbers, or as `update`.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1))
        >>> adapters = [pf.init(model, pf.LoraConfig(r=r, target_modules=["0"])) for r in (1, 2)]
        >>> losses = torch.vmap(lambda adapter, x: pf.apply(model, adapter, x).square().mean())
        >>> run, x = pf.sweep.begin(adapters), torch.ones(2, 8, 4)  # 8 rows for each of the two
        >>> for _ in range(20):
        ...     run, values = pf.sweep.step(run, losses, x, lr=[0.0, 0.1])
        >>> bool(values[1] < values[0])
        True
        >>> [one.config.r for one in pf.unstack(run.adapter)]
        [1, 2]
    """
    grads, values = gradients(run.adapter, losses, batch)
    return update(run, grads, optimizer, active=active, max_norm=max_norm, **hyperparameters), values


def keep(run: Run, numbers: Sequence[int]) -> Run:
    """The run of some of the adapters alone, as if it had begun without the others.

    So adapters that have stopped cost nothing more. Ranks are padded to the largest that is left.

    Args:
        run: as `begin` or `step` returned it.
        numbers: which adapters, from 0, in the order that is wanted.

    Raises:
        ValueError: there is no number, one comes twice, or is not that of an adapter.
        TypeError: one is no integer.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1))
        >>> run = pf.sweep.begin([pf.init(model, pf.LoraConfig(r=r, target_modules=["0"])) for r in (1, 2, 3)])
        >>> [one.config.r for one in pf.unstack(pf.sweep.keep(run, [0, 1]).adapter)]
        [1, 2]
    """
    numbers = _numbers(numbers, stacking.size(run.adapter))

    def some(tree: Any) -> Any:
        if isinstance(tree, dict):
            members = stacking.unstack(run.adapter.replace(params=cast("Tree", tree)))
            return stacking.stack([members[number] for number in numbers]).params
        return tree[list(numbers)]

    members = stacking.unstack(run.adapter)
    return Run(stacking.stack([members[number] for number in numbers]), type(run.state)(*map(some, run.state)))


def _numbers(given: Sequence[int], count: int) -> list[int]:
    found: Any = given
    numbers: list[Any] = [*(found.tolist() if isinstance(found, Tensor) else found)]
    if any(type(number) is not int for number in numbers):
        raise TypeError(f"keep was given {numbers}; expected integers, the numbers of adapters from 0 to {count - 1}.")
    if not numbers:
        raise ValueError("keep was given no number; expected at least one adapter to go on with.")
    if len(set(numbers)) < len(numbers) or not 0 <= min(numbers) <= max(numbers) < count:
        raise ValueError(f"keep was given {numbers}; this run has adapters 0 to {count - 1}, each of them once.")
    return numbers


def _each(name: str, value: Any, stacked: Adapter) -> Tensor:
    """(K,) in float64, where the adapters are."""
    count, home = stacking.size(stacked), next(iter(next(iter(stacked.params.values())).values()))
    found = torch.as_tensor(value, dtype=torch.float64, device=home.device)
    if found.dim() == 0:
        return found.expand(count)
    if found.shape != (count,):
        raise ValueError(
            f"{name} has shape {tuple(found.shape)}; expected one number, or {count}: one for each adapter."
        )
    return found


def _detached(tree: Tree) -> Tree:
    return {path: {name: tensor.detach() for name, tensor in leaf.items()} for path, leaf in tree.items()}
