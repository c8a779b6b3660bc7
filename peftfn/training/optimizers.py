"""Optimizers as pure functions on trees: parameters and gradients in, new parameters out.

Each is written for one adapter whose hyperparameters are numbers or 0-d tensors. So `torch.vmap` makes of it an
optimizer of a stack with a learning rate of its own for each adapter, which is what `peftfn.sweep` does.

```python
state = pf.optimizers.ADAMW.init(adapter.params)
params, state = pf.optimizers.ADAMW.update(params, grads, state, lr=1e-3)
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Tree

Number = float | Tensor
"""A hyperparameter: a number, or a 0-d tensor."""


class Optimizer(NamedTuple):
    """One way to change parameters by gradients.

    Attributes:
        init: `params -> state` before the first step: a NamedTuple of trees like the parameters and of 0-d tensors.
        update: `(params, grads, state, *, lr, ...) -> (params, state)`; the keywords are its hyperparameters.

    Example:
        >>> import torch, peftfn as pf
        >>> params = {"0": {"w": torch.ones(2)}}
        >>> state = pf.optimizers.SGD.init(params)
        >>> pf.optimizers.SGD.update(params, params, state, lr=0.5)[0]
        {'0': {'w': tensor([0.5000, 0.5000])}}
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]


class Moments(NamedTuple):
    """The state of AdamW.

    Attributes:
        step: how many steps were taken, 0-d and float64.
        first: the moving average of the gradient.
        second: the moving average of its square.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.optimizers.adamw_init({"0": {"w": torch.ones(2)}}).first
        {'0': {'w': tensor([0., 0.])}}
    """

    step: Tensor
    first: Tree
    second: Tree


class Momentum(NamedTuple):
    """The state of SGD.

    Attributes:
        step: how many steps were taken, 0-d and float64.
        velocity: the decaying sum of gradients.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.optimizers.sgd_init({"0": {"w": torch.ones(2)}}).velocity
        {'0': {'w': tensor([0., 0.])}}
    """

    step: Tensor
    velocity: Tree


def adamw_init(params: Tree) -> Moments:
    """The state of AdamW before the first step: zeros.

    Args:
        params: what is to be trained, at least one tensor.

    Raises:
        ValueError: there is none.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.optimizers.adamw_init({"0": {"w": torch.ones(2)}}).step
        tensor(0., dtype=torch.float64)
    """
    return Moments(_none_taken(params), _zeros(params), _zeros(params))


def adamw(
    params: Tree,
    grads: Tree,
    state: Moments,
    *,
    lr: Number,
    beta1: Number = 0.9,
    beta2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.01,
) -> tuple[Tree, Moments]:
    """Parameters and state after one step of AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101).

    m ← β₁·m + (1-β₁)·g, v ← β₂·v + (1-β₂)·g², and with t steps taken
    p ← (1 - lr·λ)·p - lr · m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε). Names and defaults are those of `torch.optim.AdamW`, and so
    are the numbers, but for rounding.

    Args:
        params: what is trained.
        grads: the gradient of each tensor, nested the same way.
        state: as `adamw_init` or the step before returned it.
        lr: the learning rate, a number or a 0-d tensor as all of these.
        beta1: how much of m stays.
        beta2: how much of v stays.
        eps: added to the denominator.
        weight_decay: λ.

    Example:
        >>> import torch, peftfn as pf
        >>> params = {"0": {"w": torch.ones(2)}}
        >>> params, state = pf.optimizers.adamw(params, params, pf.optimizers.adamw_init(params), lr=0.1)
        >>> params["0"]["w"]
        tensor([0.8990, 0.8990])
    """
    step = state.step + 1
    fall1, fall2, rate = _wide(beta1, step), _wide(beta2, step), _wide(lr, step)
    kept, root = 1 - rate * _wide(weight_decay, step), (1 - fall2**step).sqrt()
    size, least = rate * root / (1 - fall1**step), _wide(eps, step) * root

    def moved(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # As few passes over memory as there are, which is what a stack's step costs; in place on what is new here.
        m = torch.lerp(m, g, (1 - fall1).to(m.dtype))
        v = torch.lerp(v, g * g, (1 - fall2).to(v.dtype))
        change = (m / v.sqrt().add_(least.to(v.dtype))).mul_(size.to(p.dtype))
        return (p * kept.to(p.dtype)).sub_(change), m, v

    params, first, second = _mapped(moved, params, grads, state.first, state.second)
    return params, Moments(step, first, second)


def sgd_init(params: Tree) -> Momentum:
    """The state of SGD before the first step: zeros.

    Args:
        params: what is to be trained, at least one tensor.

    Raises:
        ValueError: there is none.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.optimizers.sgd_init({"0": {"w": torch.ones(2)}}).step
        tensor(0., dtype=torch.float64)
    """
    return Momentum(_none_taken(params), _zeros(params))


def sgd(
    params: Tree,
    grads: Tree,
    state: Momentum,
    *,
    lr: Number,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
) -> tuple[Tree, Momentum]:
    """Parameters and state after one step of gradient descent with momentum μ: u ← μ·u + g + λ·p, p ← p - lr·u.

    Names, defaults and numbers are those of `torch.optim.SGD`, but for rounding.

    Args:
        params: what is trained.
        grads: the gradient of each tensor, nested the same way.
        state: as `sgd_init` or the step before returned it.
        lr: the learning rate, a number or a 0-d tensor as all of these.
        momentum: μ.
        weight_decay: λ, which here is a part of the gradient.

    Example:
        >>> import torch, peftfn as pf
        >>> params = {"0": {"w": torch.ones(2)}}
        >>> pf.optimizers.sgd(params, params, pf.optimizers.sgd_init(params), lr=0.5)[0]["0"]["w"]
        tensor([0.5000, 0.5000])
    """
    step = state.step + 1
    rate, stays, decay = _wide(lr, step), _wide(momentum, step), _wide(weight_decay, step)

    def moved(p: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        u = (u * stays.to(u.dtype)).add_(g).add_(p * decay.to(p.dtype))
        return p - u * rate.to(p.dtype), u

    params, velocity = _mapped(moved, params, grads, state.velocity)
    return params, Momentum(step, velocity)


def norm(tree: Tree) -> Tensor:
    """The Euclidean norm of all numbers of a tree together, 0-d; 0 where there is none.

    Args:
        tree: tensors by site path and name, as `adapter.params` or its gradients.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.optimizers.norm({"0": {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}})
        tensor(5.)
    """
    each = [cast("Tensor", torch.linalg.vector_norm(tensor)) for leaf in tree.values() for tensor in leaf.values()]
    if not each:
        return torch.zeros(())
    return cast("Tensor", torch.linalg.vector_norm(torch.stack(each)))


def clipped(grads: Tree, max_norm: Number) -> Tree:
    """The gradients, scaled down where their norm is above `max_norm`: as `torch.nn.utils.clip_grad_norm_` does it.

    Args:
        grads: tensors by site path and name.
        max_norm: the largest norm of all of them together, a number or a 0-d tensor.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.optimizers.clipped({"0": {"w": torch.tensor([3.0, 4.0])}}, max_norm=1.0)
        {'0': {'w': tensor([0.6000, 0.8000])}}
    """
    scale = (max_norm / (norm(grads) + 1e-6)).clamp(max=1.0)

    def shorter(g: Tensor) -> tuple[Tensor]:
        return (g * scale.to(g.dtype),)

    return _mapped(shorter, grads)[0]


ADAMW = Optimizer(adamw_init, adamw)
"""AdamW, the default of `peftfn.sweep`."""

SGD = Optimizer(sgd_init, sgd)
"""Gradient descent, with momentum where it is asked for."""


def _wide(value: Number, like: Tensor) -> Tensor:
    """A hyperparameter in float64, so that what is computed from it is rounded once, at its use."""
    return torch.as_tensor(value, dtype=torch.float64, device=like.device)


def _none_taken(params: Tree) -> Tensor:
    one = next((tensor for leaf in params.values() for tensor in leaf.values()), None)
    if one is None:
        raise ValueError(
            "the optimizer was given a tree without tensors; expected adapter.params, what is to be trained."
        )
    return torch.zeros((), dtype=torch.float64, device=one.device)


def _zeros(params: Tree) -> Tree:
    def zero(tensor: Tensor) -> tuple[Tensor]:
        return (torch.zeros_like(tensor, requires_grad=False),)

    return _mapped(zero, params)[0]


def _mapped(change: Callable[..., tuple[Tensor, ...]], *trees: Tree) -> list[Tree]:
    """One tree for each tensor that `change` returns. Leaf after leaf, so that what is read again is still cached."""
    first, rest = trees[0], cast("Sequence[Tree]", trees[1:])
    found = {
        (path, name): change(tensor, *(tree[path][name] for tree in rest))
        for path, leaf in first.items()
        for name, tensor in leaf.items()
    }
    count = len(next(iter(found.values()))) if found else 1  # nothing is trained: one empty tree
    return [
        {path: {name: found[path, name][number] for name in leaf} for path, leaf in first.items()}
        for number in range(count)
    ]
