"""The Laplace approximation, against the whole matrices and against draws of the parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import trained
from test_curvature import ROUNDING, Small, close, flat, product, unflat
from torch import Tensor
from torch.func import jacrev

import peftfn as pf
from peftfn.analysis import curvature, laplace

FORMS = pytest.mark.parametrize("form", [curvature.diagonal, curvature.kronecker])


def whole(found: Any) -> Tensor:
    """A Fisher as the matrix that it stands for."""
    blocks = [product(f) if isinstance(f, curvature.Kronecker) else f.flatten().diag() for f in leaves(found)]
    return torch.block_diag(*blocks)


def leaves(tree: Any) -> list[Any]:
    return [one for leaf in tree.values() for one in leaf.values()]


def slopes(small: Small) -> Tensor:
    """(rows, classes, numbers)."""
    return small.whole(
        lambda tree, at: torch.stack([jacrev(lambda v, x=x: small.logits(tree(v), x))(at) for x in small.x])
    )


@FORMS
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_covariances_are_those_of_the_whole_matrix(form: Any, chunk: int | None) -> None:
    small = Small()
    found = laplace.fisher(form, small.logits, small.params, small.x, chunk=chunk)
    close(whole(found), whole(form(curvature.scores(small.logits, small.params, small.x))))
    belief = laplace.predict(small.logits, small.params, found, small.x, [0.1, 5.0], chunk=chunk)
    jacobian, matrix = slopes(small), whole(found)
    close(belief.mean, torch.stack([small.logits(small.params, x) for x in small.x]))
    for number, precision in enumerate((0.1, 5.0)):
        inverse = torch.linalg.inv(matrix + precision * torch.eye(len(matrix), dtype=torch.float64))
        close(belief.covariance[number], jacobian @ inverse @ jacobian.mT)
        alone = laplace.predict(small.logits, small.params, found, small.x, precision, chunk=chunk)
        close(alone.covariance, belief.covariance[number])


@FORMS
def test_probabilities_are_means_over_draws_of_the_parameters_where_logits_are_linear(form: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])), size=0.5)
    # linear in B, with A held: what is left out of the tree is taken as it is
    params = {"0": {"lora_B": adapter.params["0"]["lora_B"]}}
    fixed = adapter.params["0"]["lora_A"]

    def logits(tree: Any, x: Tensor) -> Tensor:
        return pf.apply(model, adapter.replace(params={"0": {**tree["0"], "lora_A": fixed}}), x[None])[0]

    x = torch.randn(5, 4, dtype=torch.float64)
    found = laplace.fisher(form, logits, params, x)
    belief = laplace.predict(logits, params, found, x, 2.0)
    chances = laplace.probabilities(belief, torch.Generator().manual_seed(0), draws=4000)
    covariance = torch.linalg.inv(whole(found) + 2.0 * torch.eye(6, dtype=torch.float64))
    noise = torch.randn(400, 6, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    drawn = [torch.stack([logits(unflat(flat(params) + one, params), row) for row in x]) for one in noise]
    expected = torch.stack(drawn).softmax(-1).mean(0)
    # 400 draws of numbers in [0, 1] with a deviation of 0.2 at most: their mean is known to 0.01
    torch.testing.assert_close(chances, expected, rtol=0, atol=0.04)
    torch.testing.assert_close(chances.sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=ROUNDING)
    assert (chances.max(-1).values < belief.mean.softmax(-1).max(-1).values).all()


def test_without_any_doubt_probabilities_are_those_of_the_logits() -> None:
    small = Small()
    found = laplace.fisher(curvature.diagonal, small.logits, small.params, small.x)
    belief = laplace.predict(small.logits, small.params, found, small.x, 1e12)
    # a deviation of the logits of about |J|·1e-6
    chances = laplace.probabilities(belief, torch.Generator().manual_seed(0))
    torch.testing.assert_close(chances, belief.mean.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", [0.0, -1.0, [1.0, 0.0], float("nan")])
def test_a_prior_without_precision_is_refused(precision: Any) -> None:
    small = Small()
    found = laplace.fisher(curvature.diagonal, small.logits, small.params, small.x)
    with pytest.raises(ValueError, match="expected positive numbers"):
        laplace.predict(small.logits, small.params, found, small.x, precision)


@FORMS
def test_a_fisher_of_other_parameters_is_refused(form: Any) -> None:
    small = Small()
    found = laplace.fisher(form, small.logits, small.params, small.x)
    missing = {path: {f"{name}_x": one for name, one in leaf.items()} for path, leaf in found.items()}
    with pytest.raises(ValueError, match="the parameters have no such tensor"):
        laplace.predict(small.logits, small.params, missing, small.x, 1.0)
    exchanged = {"0": {"lora_B": found["2"]["weight"]}}
    with pytest.raises(ValueError, match=r"15 numbers at 0\.lora_B, .* have 10 numbers there"):
        laplace.predict(small.logits, small.params, exchanged, small.x, 1.0)
