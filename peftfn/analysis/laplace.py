"""The Laplace approximation: a Gaussian over trained parameters, and the predictions that follow from it.

θ ~ N(θ*, (F + λ)⁻¹), where F is the Fisher of the training rows at the trained θ* and λ the precision of a Gaussian
prior. Logits are taken as linear in θ, so those of a row are Gaussian too: around what the model gives, with covariance
J·(F + λ)⁻¹·Jᵀ, J their Jacobian (Immer et al. 2021, https://arxiv.org/abs/2008.08400, section 3; for LoRA: Yang et al.
2023, https://arxiv.org/abs/2308.13111). Mean probabilities over that Gaussian are less sure where the training rows
have left θ open.

```python
def logits(params, row):
    return pf.apply(model, adapter.replace(params=params), {name: t[None] for name, t in row.items()}).logits[0]


found = pf.laplace.fisher(pf.curvature.kronecker, logits, adapter.params, train, chunk=32)
belief = pf.laplace.predict(logits, adapter.params, found, test, precision=10.0, chunk=32)
chances = pf.laplace.probabilities(belief, torch.Generator().manual_seed(0))
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from peftfn.analysis import curvature
from peftfn.analysis.curvature import Kronecker
from peftfn.core.adapter import Tree

Logits = Callable[[Tree, Any], Tensor]
"""`(params, row) -> (classes,)`; the row is the batch without its first axis."""

Fisher = Mapping[str, Mapping[str, Any]]
"""A Fisher as `curvature.diagonal` or `curvature.kronecker` gives it."""


class Belief(NamedTuple):
    """A Gaussian over the logits of each row.

    Attributes:
        mean: (rows, classes), the logits at the trained parameters.
        covariance: (rows, classes, classes); of P precisions, (P, rows, classes, classes).

    Example:
        >>> import torch, peftfn as pf
        >>> belief = pf.laplace.Belief(mean=torch.zeros(1, 2), covariance=torch.zeros(1, 2, 2))
        >>> pf.laplace.probabilities(belief, torch.Generator())
        tensor([[0.5000, 0.5000]])
    """

    mean: Tensor
    covariance: Tensor


class _Spectrum(NamedTuple):
    """A Fisher of one tensor in its eigenbasis left ⊗ right: where those are `None`, in the basis that it has."""

    values: Tensor  # (m, n)
    left: Tensor | None = None  # (m, m), eigenvectors in the columns
    right: Tensor | None = None  # (n, n)


def fisher(form: Callable[[Tree], Any], logits: Logits, params: Tree, batch: Any, *, chunk: int | None = None) -> Any:
    """The Fisher of the model's predictions on a batch, summed over its rows, in the form asked for.

    `form(curvature.scores(...))`, of `chunk` rows at a time, added up.

    Args:
        form: `curvature.diagonal` or `curvature.kronecker`.
        logits: of one row.
        params: where, and in which parameters.
        batch: tensors with the row on axis 0, nested in any way.
        chunk: for how many rows scores are held at a time; all by default.

    Example:
        >>> import torch, peftfn as pf
        >>> params, rows = {"0": {"w": torch.zeros(2)}}, torch.tensor([[1.0], [2.0]])  # probabilities of a half
        >>> pf.laplace.fisher(pf.curvature.diagonal, lambda p, x: p["0"]["w"] * x, params, rows, chunk=1)
        {'0': {'w': tensor([1.2500, 1.2500])}}
    """
    total: Any = None
    for rows in curvature.chunks(batch, chunk):
        found = form(curvature.scores(logits, params, rows))
        total = found if total is None else optree.tree_map(torch.add, total, found)
    return total


def predict(
    logits: Logits,
    params: Tree,
    found: Fisher,
    batch: Any,
    precision: float | Sequence[float] | Tensor,
    *,
    chunk: int | None = None,
) -> Belief:
    """The Gaussian of each row's logits: their mean, and J·(F + λ)⁻¹·Jᵀ.

    Args:
        logits: of one row.
        params: the trained parameters.
        found: F, as `fisher` returns it for the training rows. Tensors that it lacks are taken as certain.
        batch: tensors with the row on axis 0, nested in any way.
        precision: λ > 0, or P of them, for which the Jacobians are computed once.
        chunk: for how many rows Jacobians are held at a time; all by default.

    Raises:
        ValueError: a precision is not positive, or the Fisher is of other parameters than these.

    Example:
        >>> import torch, peftfn as pf
        >>> params, rows = {"0": {"w": torch.eye(2)}}, torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> seen = pf.laplace.fisher(pf.curvature.diagonal, lambda p, x: p["0"]["w"] @ x, params, rows[:1])
        >>> belief = pf.laplace.predict(lambda p, x: p["0"]["w"] @ x, params, seen, rows, precision=1.0)
        >>> belief.covariance.diagonal(dim1=1, dim2=2)  # the second row's direction was never seen: |x|²/λ
        tensor([[0.8357, 0.8357],
                [9.0000, 9.0000]])
    """
    asked = torch.as_tensor(precision, dtype=torch.float64)
    if not bool((asked > 0).all()):
        raise ValueError(f"precision is {precision}; expected positive numbers, the precision of the prior.")
    _refuse_other(found, params)

    def both(params: Tree, row: Any) -> tuple[Tensor, Tensor]:
        values = logits(params, row)
        return values, values

    spectra = {path: {name: _spectrum(one) for name, one in leaf.items()} for path, leaf in found.items()}
    means: list[Tensor] = []
    covariances: list[Tensor] = []
    with torch.no_grad():
        for rows in curvature.chunks(batch, chunk):
            slopes, values = vmap(jacrev(both, has_aux=True), (None, 0), randomness="different")(params, rows)
            parts = [
                _spread(slopes[path][name], one, asked.flatten())
                for path, leaf in spectra.items()
                for name, one in leaf.items()
            ]
            means.append(values)
            covariances.append(torch.stack(parts).sum(0))
    covariance = torch.cat(covariances, 1)
    return Belief(torch.cat(means), covariance if asked.dim() else covariance[0])


def probabilities(belief: Belief, generator: torch.Generator, draws: int = 500) -> Tensor:
    """The mean of softmax over draws of the logits, (rows, classes) or (P, rows, classes).

    Args:
        belief: as `predict` returns it.
        generator: where the draws come from, on the device of the belief; every row and every precision gets the same
            ones.
        draws: how many.

    Example:
        >>> import torch, peftfn as pf
        >>> mean, spread = torch.tensor([[4.0, 0.0]]), torch.eye(2)[None]
        >>> sure, unsure = (
        ...     pf.laplace.probabilities(pf.laplace.Belief(mean, size * spread), torch.Generator().manual_seed(0))
        ...     for size in (0.0, 100.0)
        ... )
        >>> bool(sure[0, 0] > 0.9 > unsure[0, 0])
        True
    """
    mean, covariance = belief
    normal = torch.randn(draws, mean.shape[-1], generator=generator, dtype=mean.dtype, device=mean.device)
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(covariance))  # rounding may leave it semidefinite
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    total = torch.zeros_like(mean.expand(covariance.shape[:-1]))
    for drawn in normal:
        total += (mean + root @ drawn).softmax(-1)
    return total / draws


def _refuse_other(found: Fisher, params: Tree) -> None:
    for path, leaf in found.items():
        for name, one in leaf.items():
            numbers = one.left.shape[0] * one.right.shape[0] if isinstance(one, Kronecker) else one.numel()
            tensor = params.get(path, {}).get(name)
            if tensor is None or tensor.numel() != numbers:
                has = "no such tensor" if tensor is None else f"{tensor.numel()} numbers there"
                raise ValueError(
                    f"the Fisher is of {numbers} numbers at {path}.{name}, and the parameters have {has}; expected "
                    "what peftfn.laplace.fisher returned for the same parameters, or a part of it."
                )


def _spectrum(found: Any) -> _Spectrum:
    if not isinstance(found, Kronecker):
        return _Spectrum(found.reshape(found.shape[0] if found.dim() > 1 else 1, -1))
    trace = found.left.trace().clamp(min=torch.finfo(found.left.dtype).tiny)
    lefts, left = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(found.left))
    rights, right = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(found.right))
    # a sum of squares: what is below zero is rounding
    return _Spectrum(torch.outer(lefts.clamp(min=0), rights.clamp(min=0)) / trace, left, right)


def _spread(slopes: Tensor, of: _Spectrum, precisions: Tensor) -> Tensor:
    """What one tensor adds to the covariance, (P, rows, classes, classes)."""
    turned = slopes.reshape(*slopes.shape[:2], *of.values.shape)  # (rows, classes, m, n)
    if of.left is not None and of.right is not None:
        turned = of.left.T @ turned @ of.right
    turned = turned.flatten(2)
    each = [(turned / (of.values.flatten() + one)) @ turned.mT for one in precisions.to(turned)]
    return torch.stack(each)
