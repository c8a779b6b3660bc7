"""Per-sample gradients and curvature, against brute force: a loop over rows, and the whole Hessian or Fisher."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from bases import BASES
from cases import trained
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, vmap

import peftfn as pf
from peftfn.analysis import curvature

# torch's fused attention has no rule for vmap on the CPU; it runs one by one, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

# float64 throughout: what is left is the order of sums.
ROUNDING = 1e-10


def close(one: Any, other: Any, bound: float = ROUNDING) -> None:
    torch.testing.assert_close(one, other, rtol=bound, atol=bound)


class Small:
    """An adapted network of three classes in float64, few enough numbers for a whole Hessian."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        config = pf.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
        self.adapter = trained(pf.init(self.model, config), size=0.5)
        self.params = self.adapter.params
        self.x = torch.randn(7, 4, dtype=torch.float64)
        self.labels = torch.randint(0, 3, (7,))

    def logits(self, params: Any, x: Tensor) -> Tensor:
        return pf.apply(self.model, self.adapter.replace(params=params), x[None])[0]

    def loss(self, params: Any, row: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.logits(params, row[0]), row[1])

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.labels

    def one_by_one(self) -> Tensor:
        """(rows, numbers)."""
        return torch.stack([flat(grad(self.loss)(self.params, row)) for row in zip(*self.batch, strict=True)])

    def whole(self, function: Any) -> Tensor:
        """A function of the parameters as one of their flat vector, and its derivative there: what `function` says."""
        start = flat(self.params)
        return function(lambda vector: unflat(vector, self.params), start)


def flat(tree: Any) -> Tensor:
    return torch.cat([tensor.flatten() for leaf in tree.values() for tensor in leaf.values()])


def unflat(vector: Tensor, like: Any) -> Any:
    tensors = [tensor for leaf in like.values() for tensor in leaf.values()]
    parts = iter(vector.split([tensor.numel() for tensor in tensors]))
    return {
        path: {name: next(parts).view(tensor.shape) for name, tensor in leaf.items()} for path, leaf in like.items()
    }


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_norms_and_clipped_sums_are_those_of_a_loop_over_the_rows(chunk: int | None) -> None:
    small = Small()
    each = small.one_by_one()
    lengths = each.norm(dim=1)
    limit = float(lengths.median())
    close(curvature.norms(small.loss, small.params, small.batch, chunk=chunk), lengths)
    total, found = curvature.clipped_sum(small.loss, small.params, small.batch, limit, chunk=chunk)
    close(found, lengths)
    close(flat(total), sum(row * min(1.0, limit / float(row.norm())) for row in each))
    assert (lengths > limit).any()
    assert (lengths < limit).any()


def test_a_sample_without_a_gradient_is_no_division_by_zero() -> None:
    params = {"0": {"w": torch.zeros(2)}}
    total, found = curvature.clipped_sum(lambda p, x: p["0"]["w"] @ x, params, torch.zeros(3, 2), 1.0)
    assert not total["0"]["w"].any()
    assert not found.any()


def test_private_gradients_are_the_clipped_mean_and_noise_of_the_stated_size() -> None:
    small = Small()
    total, _ = curvature.clipped_sum(small.loss, small.params, small.batch, 0.3)
    draw = torch.Generator().manual_seed(0)
    still = curvature.private_gradient(small.loss, small.params, small.batch, 0.3, 0.0, draw)
    close(flat(still), flat(total) / 7)
    many = torch.stack(
        [
            flat(curvature.private_gradient(small.loss, small.params, small.batch, 0.3, 2.0, draw)) - flat(still)
            for _ in range(200)
        ]
    )
    # 200 draws of 36 numbers each: the standard deviation is known to 1 %
    assert float(many.std()) == pytest.approx(2.0 * 0.3 / 7, rel=0.05)
    assert abs(float(many.mean())) < 0.01


@pytest.mark.parametrize("chunk", [None, 2])
def test_influence_is_the_products_of_gradients_and_what_a_small_step_does(chunk: int | None) -> None:
    small = Small()
    each = small.one_by_one()
    first, second = ((small.x[:3], small.labels[:3]), (small.x[3:], small.labels[3:]))
    found = curvature.influence(small.loss, small.params, first, second, chunk=chunk)
    close(found, each[:3] @ each[3:].T)
    rate = 1e-6
    moved = unflat(flat(small.params) - rate * each[5], small.params)
    for number in range(3):
        row = (small.x[number], small.labels[number])
        fell = small.loss(small.params, row) - small.loss(moved, row)
        # what is left out is of second order in the rate
        torch.testing.assert_close(fell / rate, found[number, 2], rtol=1e-3, atol=1e-5)


def test_a_hessians_product_is_that_of_the_whole_hessian() -> None:
    small = Small()

    def mean(params: Any) -> Tensor:
        return vmap(small.loss, (None, 0))(params, small.batch).mean()

    whole = small.whole(lambda tree, at: hessian(lambda vector: mean(tree(vector)))(at))
    vector = torch.randn(whole.shape[0], dtype=torch.float64)
    close(flat(curvature.hvp(mean, small.params, unflat(vector, small.params))), whole @ vector)


def fisher(small: Small) -> Tensor:
    """JᵀHJ summed over the rows, with H = diag(p) - ppᵀ: the Gauss-Newton matrix, by another way than `scores`."""
    total = torch.zeros(())
    for x in small.x:
        slopes = small.whole(lambda tree, at, x=x: jacrev(lambda vector: small.logits(tree(vector), x))(at))
        p = small.logits(small.params, x).softmax(-1)
        total = total + slopes.T @ (p.diag() - torch.outer(p, p)) @ slopes
    return total


def test_scores_make_the_fisher_and_its_diagonal() -> None:
    small = Small()
    found = curvature.scores(small.logits, small.params, small.x)
    every = torch.cat([tensor.flatten(1) for leaf in found.values() for tensor in leaf.values()], 1)
    expected = fisher(small)
    assert every.shape == (21, expected.shape[0])
    close(every.T @ every, expected)
    close(flat(curvature.diagonal(found)), expected.diagonal())


def product(factors: curvature.Kronecker) -> Tensor:
    return torch.kron(factors.left, factors.right) / factors.left.trace()


def test_fishers_of_parts_of_a_batch_add_up_to_that_of_the_whole() -> None:
    small = Small()
    for form in (curvature.diagonal, curvature.kronecker):
        parts = [form(curvature.scores(small.logits, small.params, x)) for x in (small.x[:3], small.x[3:])]
        whole = form(curvature.scores(small.logits, small.params, small.x))
        close(optree.tree_leaves(optree.tree_map(torch.add, *parts)), optree.tree_leaves(whole))


def test_kronecker_factors_are_the_fishers_partial_traces_and_keep_its_trace() -> None:
    small = Small()
    factors = curvature.kronecker(curvature.scores(small.logits, small.params, small.x))
    whole, start = fisher(small), 0
    for path, leaf in small.params.items():
        for name, tensor in leaf.items():
            end = start + tensor.numel()
            m, n = (tensor.shape[0], tensor.numel() // tensor.shape[0])
            block = whole[start:end, start:end].view(m, n, m, n)
            found = factors[path][name]
            trace = whole[start:end, start:end].trace()
            close(found.left, torch.einsum("ijkj->ik", block))
            close(found.right, torch.einsum("ijil->jl", block))
            close(product(found).trace(), trace)
            start = end
    assert start == whole.shape[0]


def test_a_fisher_that_is_a_kronecker_product_is_found_exactly() -> None:
    a, b = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    # vec(a_i b_jᵀ) over all i and j: Σ (a_i⊗b_j)(a_i⊗b_j)ᵀ = (Σ a aᵀ) ⊗ (Σ b bᵀ)
    found = torch.einsum("si,tj->stij", a, b).flatten(0, 1)
    factors = curvature.kronecker({"0": {"w": found}})["0"]["w"]
    close(product(factors), torch.kron(a.T @ a, b.T @ b))


def test_padded_rows_of_a_transformer_are_those_of_each_alone() -> None:
    model = BASES["llama"].make()
    adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules="all-linear")), size=0.1)
    ids = torch.randint(3, 40, (3, 6))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def loss(params: Any, row: Any) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), {name: t[None] for name, t in row.items()}).loss

    found = curvature.norms(loss, adapter.params, batch, chunk=2)
    for number, length in enumerate(found):
        row = {name: t[number] for name, t in batch.items()}
        # float32: the same sums by another kernel
        close(length, flat(grad(loss)(adapter.params, row)).norm(), bound=1e-4)
