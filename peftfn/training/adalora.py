"""Training AdaLoRA: its regulariser, and which ranks are left after each step, as pure functions.

A step of training with `torch.func`:

```python
state = pf.adalora.init_state(adapter)
for step, batch in enumerate(batches):
    grads = torch.func.grad(loss)(adapter.params, batch)  # loss: pf.apply(...).loss + pf.adalora.regulariser(adapter)
    adapter = adapter.replace(params=update(adapter.params, grads))
    state, adapter = pf.adalora.allocate(state, adapter, grads, step)
```

and with a `torch.optim` optimizer, which holds the adapter's own tensors, so that the new values are copied into them:

```python
    (pf.apply(model, adapter, batch).loss + pf.adalora.regulariser(adapter)).backward()
    optimizer.step()
    grads = {path: {name: t.grad for name, t in leaf.items()} for path, leaf in adapter.params.items()}
    state, allocated = pf.adalora.allocate(state, adapter, grads, step)
    with torch.no_grad():
        for leaf, new in zip(pf.leaves(adapter), pf.leaves(allocated)):
            leaf.copy_(new)
    adapter = allocated.replace(params=adapter.params)
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Adapter, Leaf, Tree
from peftfn.core.transforms import is_traced
from peftfn.methods.adalora import NAMES
from peftfn.methods.adalora_config import AdaLoraConfig
from peftfn.ops.stacking import is_whole


class State(NamedTuple):
    """What allocation keeps from step to step: two moving averages for each number of P, Λ and Q.

    Attributes:
        sensitivity: of |value · gradient| (equation 9 of the paper).
        uncertainty: of how far |value · gradient| is from that (equation 10).

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapter = pf.init(model, pf.AdaLoraConfig(init_r=2, target_modules=["0"]))
        >>> {name: tuple(t.shape) for name, t in pf.adalora.init_state(adapter).sensitivity["0"].items()}
        {'lora_A': (2, 4), 'lora_B': (4, 2), 'lora_E': (2, 1)}
    """

    sensitivity: Tree
    uncertainty: Tree


def regulariser(adapter: Adapter) -> Tensor:
    """How far P and Q are from orthogonal, times `orth_reg_weight`: what PEFT adds to the loss.

    The mean of ‖PᵀP - I‖ and ‖QQᵀ - I‖ (Frobenius) over all sites. PEFT adds it to `outputs.loss` by itself; here it
    is the caller's to add.

    Args:
        adapter: an AdaLoRA adapter, or a stack that `torch.vmap` maps.

    Returns:
        A 0-d tensor, differentiable in the adapter.

    Raises:
        TypeError: the adapter is of another method.
        ValueError: it is a stack that nothing maps, or one of unlike configs or sites.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapter = pf.init(model, pf.AdaLoraConfig(init_r=2, target_modules=["0"]))
        >>> bool(pf.adalora.regulariser(adapter) > 0)
        True
    """
    config = _config(adapter)
    distances: list[Tensor] = []
    for leaf in _sites(adapter).values():
        for factor in (leaf["lora_A"], leaf["lora_B"].mT):  # (r, ...)
            identity = torch.eye(factor.shape[0], dtype=factor.dtype, device=factor.device)
            distances.append(cast("Tensor", torch.linalg.matrix_norm(factor @ factor.mT - identity)))
    return config.orth_reg_weight * torch.stack(distances).mean()


def init_state(adapter: Adapter) -> State:
    """The state before the first step: zeros.

    Args:
        adapter: the adapter to be trained.

    Raises:
        TypeError, ValueError: as `regulariser`.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapter = pf.init(model, pf.AdaLoraConfig(init_r=2, target_modules=["0"]))
        >>> pf.adalora.init_state(adapter).uncertainty["0"]["lora_E"].T
        tensor([[0., 0.]])
    """
    _config(adapter)
    zeros, again = (
        {path: {name: torch.zeros_like(leaf[name], requires_grad=False) for name in NAMES} for path, leaf in sites}
        for sites in (_sites(adapter).items(), _sites(adapter).items())
    )
    return State(zeros, again)


def budget(adapter: Adapter, step: int) -> tuple[int, bool]:
    """How many ranks are to be left in all sites together, and whether this step decides which.

    All of them up to `tinit`; then fewer by a cubic schedule, decided anew each `deltaT` steps (equation 12); from
    `total_step - tfinal` on, `target_r` for each site. The last decision is that of step `total_step - tfinal`.

    Args:
        adapter: the adapter in training.
        step: the number of the step, from 0.

    Raises:
        TypeError: as `regulariser`.
        ValueError: the config has no `total_step`; or as `regulariser`.

    Example:
        >>> import torch, peftfn as pf
        >>> config = pf.AdaLoraConfig(init_r=8, target_r=2, total_step=10, tinit=2, tfinal=2, target_modules=["0"])
        >>> adapter = pf.init(torch.nn.Sequential(torch.nn.Linear(8, 8)), config)
        >>> [pf.adalora.budget(adapter, step)[0] for step in range(10)]
        [8, 8, 8, 5, 3, 2, 2, 2, 2, 2]
    """
    config, sites = _config(adapter), len(_sites(adapter))
    first, last = config.init_r * sites, config.target_r * sites
    end = _total(config) - config.tfinal
    if step <= config.tinit:
        return first, False
    if step >= end:
        return last, step == end
    share = 1 - (step - config.tinit) / (end - config.tinit)
    return int((first - last) * share**3 + last), step % config.deltaT == 0


def allocate(
    state: State, adapter: Adapter, grads: Mapping[str, Mapping[str, Tensor | None]], step: int
) -> tuple[State, Adapter]:
    """The state and the adapter after a step of training, with zeros in Λ where a rank is given up.

    What PEFT's `update_and_allocate(step)` does in place, by the same numbers; call it as there, once after each step
    of the optimizer. A rank's score is the sum of sensitivity times uncertainty, of its number in Λ and averaged over
    its row of Q and its column of P (equation 11). Before `total_step - tfinal` a rank that is given up may come
    back; after it, ranks are kept at what they are.

    Args:
        state: from `init_state`, or from the last step.
        adapter: the adapter after the optimizer's step.
        grads: the gradients that the step was made from, nested as `adapter.params`.
        step: the number of the step.

    Returns:
        The new state and adapter. P and Q are the adapter's own tensors; Λ and the buffer `mask` are new ones.

    Raises:
        ValueError: the config has no `total_step`; or this is the last step to decide, and no step before it was
            counted; or the adapter comes from a file, where ranks are given up for good; or as `regulariser`.
        TypeError: as `regulariser`.
        KeyError: a gradient is missing.

    Example:
        >>> import torch, peftfn as pf
        >>> config = pf.AdaLoraConfig(init_r=2, target_r=1, total_step=3, tfinal=1, target_modules=["0"])
        >>> adapter = pf.init(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
        >>> state, grads = pf.adalora.init_state(adapter), adapter.params  # the gradient of half the sum of squares
        >>> for step in range(3):
        ...     state, adapter = pf.adalora.allocate(state, adapter, grads, step)
        >>> pf.adalora.ranks(adapter)
        {'0': 1}
    """
    config = _config(adapter)
    end = _total(config) - config.tfinal
    if step > end:
        return state, _masked(adapter, {path: adapter.buffers[path]["mask"] for path in _sites(adapter)})
    if config.rank_pattern is not None:
        raise ValueError(
            f"the adapter comes from a file whose rank_pattern gave ranks up for good, and step {step} is one that "
            f"decides about them; expected a step above total_step - tfinal = {end}."
        )
    if step < end:
        state = _updated(state, adapter, grads, config)
    left, decides = budget(adapter, step)
    if decides:
        if step == end:
            _refuse_unscored(state, step)
        adapter = _masked(adapter, _best(state, left))
    return (init_state(adapter) if step == end else state), adapter


def _config(adapter: Adapter) -> AdaLoraConfig:
    members = adapter.members
    given = (adapter.config,) if members is None else members.configs
    if not all(isinstance(one, AdaLoraConfig) for one in given):
        raise TypeError(f"the adapter's config is a {type(given[0]).__name__}; expected an AdaLoraConfig.")
    if is_whole(adapter):
        raise ValueError("the adapter is a stack; map over it with torch.vmap, or take it apart (peftfn.unstack).")
    if len(set(given)) > 1 or (members is not None and len(set(members.paths)) > 1):
        raise ValueError("the adapters of this stack have unlike configs or sites; train them one by one (unstack).")
    return cast("AdaLoraConfig", given[0])


def _total(config: AdaLoraConfig) -> int:
    if config.total_step is None:
        raise ValueError(
            "total_step is not set, and the schedule of ranks needs it: AdaLoraConfig(total_step=<number of training "
            "steps>), or adapter.replace(config=dataclasses.replace(adapter.config, total_step=...))."
        )
    return config.total_step


def _sites(adapter: Adapter) -> dict[str, Leaf]:
    return {path: leaf for path, leaf in adapter.params.items() if "lora_E" in leaf}


def _updated(
    state: State, adapter: Adapter, grads: Mapping[str, Mapping[str, Tensor | None]], config: AdaLoraConfig
) -> State:
    sensitivity: Tree = {}
    uncertainty: Tree = {}
    with torch.no_grad():
        for path, leaf in _sites(adapter).items():
            sensitivity[path], uncertainty[path] = {}, {}
            for name in NAMES:
                grad = grads.get(path, {}).get(name)
                if grad is None:
                    raise KeyError(f"grads has nothing for {path}.{name}; expected the gradients of adapter.params.")
                now = (leaf[name] * grad).abs()
                mean = config.beta1 * state.sensitivity[path][name] + (1 - config.beta1) * now
                away = config.beta2 * state.uncertainty[path][name] + (1 - config.beta2) * (now - mean).abs()
                sensitivity[path][name], uncertainty[path][name] = mean, away
    return State(sensitivity, uncertainty)


def _refuse_unscored(state: State, step: int) -> None:
    values = [tensor for leaf in state.sensitivity.values() for tensor in leaf.values()]
    if not is_traced(*values) and not any(bool(tensor.any()) for tensor in values):
        raise ValueError(
            f"step {step} decides for good which ranks are left, and the state has counted no step before it; call "
            "allocate after every step, with the state that it returned."
        )


def _best(state: State, left: int) -> dict[str, Tensor]:
    """Which ranks of each site, (r,), are among the best `left` of all."""
    scores: dict[str, Tensor] = {}
    for path, sensitivity in state.sensitivity.items():
        each = {name: sensitivity[name] * state.uncertainty[path][name] for name in NAMES}
        scores[path] = each["lora_E"][:, 0] + (each["lora_A"].mean(1) + each["lora_B"].mean(0))
    together = torch.cat(list(scores.values()))
    drop = together.shape[0] - left
    if drop <= 0:
        return {path: torch.ones_like(score, dtype=torch.bool) for path, score in scores.items()}
    threshold = torch.kthvalue(together, drop).values
    return {path: score > threshold for path, score in scores.items()}


def _masked(adapter: Adapter, masks: Mapping[str, Tensor]) -> Adapter:
    params, buffers = dict(adapter.params), dict(adapter.buffers)
    for path, mask in masks.items():
        e = params[path]["lora_E"].detach()
        params[path] = {**params[path], "lora_E": e.masked_fill(~mask[:, None], 0.0)}
        buffers[path] = {**buffers[path], "mask": mask}
    return adapter.replace(params=params, buffers=buffers)


def ranks(adapter: Adapter) -> dict[str, int]:
    """How many ranks are left at each site, by its path.

    Args:
        adapter: an AdaLoRA adapter; of another method there are no ranks to give up, and so no sites.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> pf.adalora.ranks(pf.init(model, pf.AdaLoraConfig(init_r=3, target_modules=["0"])))
        {'0': 3}
    """
    return {path: int(adapter.buffers[path]["mask"].sum()) for path in _sites(adapter)}


__all__ = ["State", "allocate", "budget", "init_state", "ranks", "regulariser"]
