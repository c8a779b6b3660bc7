"""Gradients of each sample, and second-order quantities of a loss in an adapter's parameters.

These are functions of a loss and a tree of parameters, by `torch.func`. A loss of one sample is

```python
def loss(params, row):  # row: the batch without its first axis
    return pf.apply(model, adapter.replace(params=params), {name: t[None] for name, t in row.items()}).loss
```

and `torch.vmap(torch.func.grad(loss), (None, 0))(adapter.params, batch)` is the gradient of each sample. The functions
here hold `chunk` of them at a time. Fishers are made of `scores`, and are sums over rows: add those of several batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from peftfn.core.adapter import Tree
from peftfn.training import optimizers

RowLoss = Callable[[Tree, Any], Tensor]
"""`(params, row) -> loss`, 0-d; the row is the batch without its first axis."""


class Kronecker(NamedTuple):
    """A Fisher of one tensor, seen as a matrix (m, n) of its first axis and all others: F ≈ left ⊗ right / tr left.

    Attributes:
        left: (m, m), summed over the rows; its trace is F's.
        right: (n, n), the same of the other side.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.curvature.kronecker({"0": {"w": torch.ones(1, 2, 1)}})["0"]["w"].right
        tensor([[2.]])
    """

    left: Tensor
    right: Tensor


def norms(loss: RowLoss, params: Tree, batch: Any, *, chunk: int | None = None) -> Tensor:
    """The norm of each sample's gradient over all parameters together, (rows,).

    Args:
        loss: of one row.
        params: what it is differentiated in.
        batch: tensors with the row on axis 0, nested in any way.
        chunk: how many gradients are held at a time; all by default.

    Example:
        >>> import torch, peftfn as pf
        >>> params = {"0": {"w": torch.tensor([1.0, 0.0])}}
        >>> pf.curvature.norms(lambda p, x: p["0"]["w"] @ x, params, torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([5., 2.])
    """

    def one(row: Any) -> Tensor:
        return optimizers.norm(grad(loss)(params, row))

    return vmap(one, randomness="different", chunk_size=chunk)(batch)


def clipped_sum(
    loss: RowLoss, params: Tree, batch: Any, max_norm: float, *, chunk: int | None = None
) -> tuple[Tree, Tensor]:
    """Σᵢ gᵢ · min(1, C/‖gᵢ‖) over the samples' gradients, and their norms (rows,).

    The sum of DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, algorithm 1): no sample moves it by more
    than C = `max_norm`.

    Args:
        loss: of one row.
        params: what it is differentiated in.
        batch: tensors with the row on axis 0, nested in any way.
        max_norm: C.
        chunk: how many gradients are held at a time; all by default.

    Example:
        >>> import torch, peftfn as pf
        >>> params = {"0": {"w": torch.tensor([1.0, 0.0])}}
        >>> batch = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
        >>> pf.curvature.clipped_sum(lambda p, x: p["0"]["w"] @ x, params, batch, 1.0)
        ({'0': {'w': tensor([0.6000, 1.3000])}}, tensor([5.0000, 0.5000]))
    """
    found: list[Tensor] = []
    total: Any = None
    for rows in chunks(batch, chunk):
        grads = vmap(grad(loss), (None, 0), randomness="different")(params, rows)
        lengths = vmap(optimizers.norm)(grads)
        share = (max_norm / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).clamp(max=1.0)

        def weighted(each: Tensor, share: Tensor = share) -> Tensor:
            return torch.einsum("n,n...->...", share.to(each.dtype), each)

        some: Any = optree.tree_map(weighted, grads)
        total = some if total is None else optree.tree_map(torch.add, total, some)
        found.append(lengths)
    return total, torch.cat(found)


def private_gradient(
    loss: RowLoss,
    params: Tree,
    batch: Any,
    max_norm: float,
    noise: float,
    generator: torch.Generator,
    *,
    chunk: int | None = None,
) -> Tree:
    """The gradient that a step of DP-SGD takes: (Σᵢ clip(gᵢ, C) + σ·C·N(0, 1)) / rows.

    Any optimizer takes it. The privacy that it gives depends on how batches are drawn and on the number of steps.

    Args:
        loss: of one row.
        params: what it is differentiated in.
        batch: tensors with the row on axis 0, nested in any way.
        max_norm: C.
        noise: σ, the noise multiplier.
        generator: where the noise comes from.
        chunk: how many gradients are held at a time; all by default.

    Example:
        >>> import torch, peftfn as pf
        >>> params, batch = {"0": {"w": torch.zeros(2)}}, torch.tensor([[3.0, 4.0], [0.0, 0.4]])
        >>> pf.curvature.private_gradient(lambda p, x: p["0"]["w"] @ x, params, batch, 1.0, 0.0, torch.Generator())
        {'0': {'w': tensor([0.3000, 0.6000])}}
    """
    total, found = clipped_sum(loss, params, batch, max_norm, chunk=chunk)

    def noisy(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=generator.device).to(
            tensor.device
        )
        return (tensor + drawn * (noise * max_norm)) / len(found)

    return {path: {name: noisy(tensor) for name, tensor in leaf.items()} for path, leaf in total.items()}


def influence(loss: RowLoss, params: Tree, first: Any, second: Any, *, chunk: int | None = None) -> Tensor:
    """gᵢ·gⱼ for each sample i of one batch and j of another, (rows of first, rows of second).

    To first order, a step of gradient descent on sample j with rate η lowers the loss of sample i by η·gᵢ·gⱼ (TracIn,
    Pruthi et al. 2020, https://arxiv.org/abs/2002.08484, section 3.2). The gradients of `second` are held whole.

    Args:
        loss: of one row.
        params: what it is differentiated in.
        first: a batch, for instance held-out rows.
        second: a batch, for instance training rows.
        chunk: how many gradients of `first` are held at a time; all by default.

    Example:
        >>> import torch, peftfn as pf
        >>> params = {"0": {"w": torch.tensor([1.0, 0.0])}}
        >>> first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
        >>> pf.curvature.influence(lambda p, x: p["0"]["w"] @ x, params, first, second)
        tensor([[ 3., -2.]])
    """
    of_second = _flat(vmap(grad(loss), (None, 0), randomness="different")(params, second))

    def one(row: Any) -> Tensor:
        return of_second @ torch.cat([tensor.flatten() for tensor in _tensors(grad(loss)(params, row))])

    return vmap(one, randomness="different", chunk_size=chunk)(first)


def hvp(loss: Callable[[Tree], Tensor], params: Tree, vector: Tree) -> Tree:
    """H·v, the Hessian of a loss times a vector, at the cost of about two gradients and without H.

    The forward derivative of the gradient along v (Pearlmutter 1994, https://doi.org/10.1162/neco.1994.6.1.147).

    Args:
        loss: `params -> loss`, 0-d, of a whole batch.
        params: where.
        vector: v, a tree like the parameters.

    Example:
        >>> import torch, peftfn as pf
        >>> params = {"0": {"w": torch.tensor([1.0, 2.0])}}
        >>> pf.curvature.hvp(lambda p: p["0"]["w"].pow(3).sum(), params, {"0": {"w": torch.tensor([1.0, 0.0])}})
        {'0': {'w': tensor([6., 0.])}}
    """
    return jvp(grad(loss), (params,), (vector,))[1]


def scores(logits: Callable[[Tree, Any], Tensor], params: Tree, batch: Any) -> Tree:
    """√p_c · ∂log p_c/∂θ for each row and each class c, a tree with (rows · classes, ...) in place of (...).

    F = Σ s·sᵀ over them is the Fisher of the model's own predictions, summed over the rows: the expectation over the
    label is taken exactly, not sampled. For a softmax it is the Gauss-Newton matrix too (Martens 2014,
    https://arxiv.org/abs/1412.1193, section 9.2). Gradients of the loss with the given labels, one for each row, give
    the empirical Fisher instead.

    Args:
        logits: `(params, row) -> (classes,)`; the row is the batch without its first axis.
        params: what they are differentiated in.
        batch: tensors with the row on axis 0, nested in any way.

    Example:
        >>> import torch, peftfn as pf
        >>> params, batch = {"0": {"w": torch.zeros(2)}}, torch.tensor([[1.0], [2.0]])  # probabilities of a half
        >>> pf.curvature.scores(lambda p, x: p["0"]["w"] * x, params, batch)["0"]["w"].shape  # 2 rows · 2 classes
        torch.Size([4, 2])
    """

    def one(row: Any) -> Tree:
        def logs(params: Tree) -> tuple[Tensor, Tensor]:
            found = logits(params, row).log_softmax(-1)
            return found, found

        slopes, values = jacrev(logs, has_aux=True)(params)
        roots = (values / 2).exp().detach()  # √p

        def weighted(each: Tensor) -> Tensor:
            return torch.einsum("c,c...->c...", roots.to(each.dtype), each)

        return cast("Tree", optree.tree_map(weighted, slopes))

    found = vmap(one, randomness="different")(batch)
    return {path: {name: tensor.flatten(0, 1) for name, tensor in leaf.items()} for path, leaf in found.items()}


def diagonal(found: Tree) -> Tree:
    """The diagonal of F = Σ s·sᵀ, a tree like the parameters.

    Args:
        found: as `scores` returns them, or gradients with the row on axis 0.

    Example:
        >>> import torch, peftfn as pf
        >>> pf.curvature.diagonal({"0": {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}})
        {'0': {'w': tensor([10., 20.])}}
    """
    return {path: {name: tensor.square().sum(0) for name, tensor in leaf.items()} for path, leaf in found.items()}


def kronecker(found: Tree) -> dict[str, dict[str, Kronecker]]:
    """F = Σ s·sᵀ of each tensor alone as one Kronecker product: left = Σ S·Sᵀ, right = Σ Sᵀ·S, F ≈ left ⊗ right / tr F.

    S is the score as a matrix of the tensor's first axis and all others. These are F's partial traces, so the product
    has F's trace, and is F where that is a Kronecker product at all (Morwani et al. 2024,
    https://arxiv.org/abs/2406.17748, section 3). KFAC (Martens & Grosse 2015, https://arxiv.org/abs/1503.05671) has the
    same for independent rows of one token, up to a factor, but needs a layer's inputs and output gradients for it.

    Args:
        found: as `scores` returns them, or gradients with the row on axis 0.

    Example:
        >>> import torch, peftfn as pf
        >>> [factor.trace() for factor in pf.curvature.kronecker({"0": {"w": torch.ones(4, 2, 3)}})["0"]["w"]]
        [tensor(24.), tensor(24.)]
    """
    return {path: {name: _factors(tensor) for name, tensor in leaf.items()} for path, leaf in found.items()}


def _factors(tensor: Tensor) -> Kronecker:
    matrix = tensor.reshape(tensor.shape[0], tensor.shape[1] if tensor.dim() > 1 else 1, -1)  # (scores, m, n)
    left = torch.einsum("sij,skj->ik", matrix, matrix)
    return Kronecker(left, torch.einsum("sij,sik->jk", matrix, matrix))


def chunks(batch: Any, size: int | None) -> Iterator[Any]:
    """The batch in pieces of so many rows.

    Args:
        batch: tensors with the row on axis 0, nested in any way.
        size: rows of a piece; all of them by default. The last piece has what is left.

    Example:
        >>> import torch, peftfn as pf
        >>> [piece["x"].shape[0] for piece in pf.curvature.chunks({"x": torch.zeros(5, 2)}, 2)]
        [2, 2, 1]
    """
    tensors: list[Tensor] = cast("Any", optree.tree_leaves(batch))
    rows = tensors[0].shape[0]
    for start in range(0, rows, size or rows):

        def some(tensor: Tensor, start: int = start) -> Tensor:
            return tensor[start : start + (size or rows)]

        yield optree.tree_map(some, batch)


def _tensors(tree: Tree) -> list[Tensor]:
    return [tensor for leaf in tree.values() for tensor in leaf.values()]


def _flat(tree: Tree) -> Tensor:
    """All tensors of a tree side by side, (rows, numbers)."""
    return torch.cat([tensor.flatten(1) for tensor in _tensors(tree)], 1)
