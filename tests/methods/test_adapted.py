"""The Function that a linear layer and its delta run as: against plain operations, finite differences and peft."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from torch.func import grad

import peftfn as pf
from peftfn.core import transforms
from peftfn.methods.low_rank import dropout, linear_kernel
from peftfn.methods.low_rank.linear_kernel import Delta

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums in another order
WIDE = (1400, 130, 140)
SHAPES = [(40, 48, 32), WIDE, (300, 128, 400), (300, 400, 128), (16, 256, 256)]
"""(tokens, in, out): small; more tokens than either, in two blocks; than one of them; than neither."""


GROUPS = pytest.mark.parametrize("groups", [(), (4,)], ids=["", "groups"])
"""One pair A and B for all tokens, or one for each group of them."""


def made(shape: tuple[int, int, int], groups: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W, b, A, B and s."""
    tokens, inputs, outputs = shape
    torch.manual_seed(0)
    pair = [(*groups, 4, inputs), (*groups, outputs, 4), (*groups, *(1 for _ in groups), *(1 for _ in groups))]
    sizes = [(tokens, inputs), (outputs, inputs), (outputs,), *pair]
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]


def plain(tensors: Sequence[Tensor], keep: Tensor | None) -> Tensor:
    x, weight, bias, a, b, s = tensors
    seen = x if keep is None else x * keep
    each = seen.unflatten(0, (len(a), -1)) if a.dim() > 2 else seen
    return F.linear(x, weight, bias) + (s * each @ a.mT @ b.mT).view(len(x), -1)


def bits_of(shape: tuple[int, int, int], drops: bool) -> tuple[Tensor | None, Tensor | None]:
    if not drops:
        return None, None
    bits = dropout.draw(shape[0], shape[1], 0.3, torch.device("cpu")).bits
    return bits, dropout.mask(bits, shape[:2]).double()


def ours(tensors: Sequence[Tensor], bits: Tensor | None, apart: bool) -> Tensor:
    x, weight, bias, *delta = tensors
    if apart:
        return linear_kernel.add(x, F.linear(x, weight, bias), Delta(*delta), bits)
    return linear_kernel.linear(x, weight, bias, Delta(*delta), bits)


def first_and_second(value: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The output, the gradients, and the gradients of a number that depends on all of them."""
    y = value(*tensors)
    first = torch.autograd.grad(y.square().sum() + y.sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(((g / g.detach().norm()).sin().sum() for g in first), torch.zeros(())), tensors)
    return [y, *first, *second]


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("apart", [False, True], ids=["whole", "added"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@GROUPS
def test_output_and_first_and_second_derivatives_are_those_of_plain_operations(
    groups: tuple[int, ...], shape: tuple[int, int, int], apart: bool, drops: bool
) -> None:
    tensors, (bits, keep) = made(shape, groups), bits_of(shape, drops)
    found = first_and_second(lambda *given: ours(given, bits, apart), tensors)
    expected = first_and_second(lambda *given: plain(given, keep), tensors)
    close(found, expected)


def close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Beside the largest value of each: products of many terms cancel here and there."""
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, **EXACT)


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@GROUPS
def test_backward_and_no_grad_give_the_same(groups: tuple[int, ...], shape: tuple[int, int, int], drops: bool) -> None:
    """`backward()` writes to what it has made, and takes the tokens in blocks; a graph of the gradients does not."""
    tensors, (bits, keep) = made(shape, groups), bits_of(shape, drops)
    expected = torch.autograd.grad(plain(tensors, keep).square().sum(), tensors)
    for apart in (False, True):
        close(torch.autograd.grad(ours(tensors, bits, apart).square().sum(), tensors), expected)
        with torch.no_grad():
            torch.testing.assert_close(ours(tensors, bits, apart), plain(tensors, keep), **EXACT)


@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@GROUPS
def test_a_delta_of_zero_in_any_dtype_changes_no_bit_of_a_layer_in_any_other(
    groups: tuple[int, ...], drops: bool, given: torch.dtype, own: torch.dtype
) -> None:
    x, weight, bias = (one.detach().to(own) for one in made(WIDE, groups)[:3])
    a, b, s = (one.detach().to(given) for one in made(WIDE, groups)[3:])
    x.requires_grad_()
    delta, (bits, _) = Delta(a, b.zero_().requires_grad_(), s.float()), bits_of(WIDE, drops)
    y, expected = linear_kernel.linear(x, weight, bias, delta, bits), F.linear(x, weight, bias)
    assert torch.equal(y, expected)
    (dx, _), (base,) = torch.autograd.grad(y.sum(), (x, b)), torch.autograd.grad(expected.sum(), x)
    assert torch.equal(dx, base)


@pytest.mark.parametrize("asked", range(6), ids=["x", "W", "b", "A", "B", "s"])
@GROUPS
def test_each_gradient_can_be_asked_for_alone(groups: tuple[int, ...], asked: int) -> None:
    tensors = [tensor.detach() for tensor in made(WIDE, groups)]
    tensors[asked].requires_grad_()
    expected = torch.autograd.grad(plain(tensors, None).square().sum(), tensors[asked])
    torch.testing.assert_close(
        torch.autograd.grad(ours(tensors, None, False).square().sum(), tensors[asked]), expected, **EXACT
    )


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_batch_of_no_rows_has_gradients_of_zero(p: float) -> None:
    model = nn.Sequential(nn.Linear(8, 5)).train()
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], lora_dropout=p))
    leaves = pf.leaves(adapter)
    output = pf.apply(model, adapter, torch.ones(0, 8))
    assert output.shape == (0, 5)
    output.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def flat(tree: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in torch_pytree.tree_leaves(tree)])


def required(tree: Any) -> Any:
    return torch_pytree.tree_map(lambda tensor: tensor.detach().clone().requires_grad_(), tree)


@pytest.mark.parametrize("asks", ["nobody", "a transform", "autograd", "autograd, of the input", "the function itself"])
def test_what_a_gradient_is_asked_for_is_found_whoever_asks(asks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.func.grad` with nothing around it writes to what it has made; everything else keeps its graph."""
    last: list[bool] = []
    is_last = transforms._is_last
    monkeypatch.setattr(transforms, "_is_last", lambda tensors: last.append(is_last(tensors)) or last[-1])
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8)).double().requires_grad_(False)
    adapter = pf.init(model, pf.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    x = torch.randn(30, 40, dtype=torch.float64, requires_grad=asks == "autograd, of the input")

    def value(params: Any, x: Tensor = x) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), x).sin().sum()

    def squared(params: Any) -> Tensor:
        return flat(grad(value)(params)).square().sum()

    def by_autograd(params: Any) -> Tensor:
        return flat(torch.autograd.grad(value(params), torch_pytree.tree_leaves(params), create_graph=True))

    def penalty(params: Any) -> Tensor:
        moved = x + flat(params).sum() / 100
        (slope,) = torch.autograd.grad(value(params, moved), moved, create_graph=True)
        return slope.square().sum()

    params = required(adapter.params)
    leaves = torch_pytree.tree_leaves(params)
    if asks == "nobody":
        found, expected = flat(grad(value)(adapter.params)), by_autograd(params)
    elif asks == "a transform":
        found = flat(grad(squared)(adapter.params))
        expected = flat(torch.autograd.grad(by_autograd(params).square().sum(), leaves))
    elif asks == "autograd":
        found = flat(torch.autograd.grad(squared(params), leaves))
        expected = flat(torch.autograd.grad(by_autograd(params).square().sum(), leaves))
    elif asks == "autograd, of the input":
        found = torch.autograd.grad(squared(adapter.params), x)[0]
        expected = torch.autograd.grad(by_autograd(params).square().sum(), x)[0]
    else:
        found, expected = flat(grad(penalty)(adapter.params)), flat(torch.autograd.grad(penalty(params), leaves))
    torch.testing.assert_close(found, expected, **EXACT)
    # Two layers: each one's own pass is the last where nobody asks; of a pass of a pass, it is the outer one.
    passes = {"nobody": 2, "a transform": 2, "the function itself": 2}
    assert sum(last) == passes.get(asks, 0)
    assert expected.abs().max() > 1e-3


def saved(run: Callable[[], Any], own: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps beside the given tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class Two(nn.Module):
    """Two layers that read one input, after something that has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32, bias=False)
        self.one, self.two = nn.Linear(32, 48), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, 32) -> (tokens, 48), (tokens, 64)."""
        x = self.before(x)
        return self.one(x), self.two(x)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_x_once_as_it_came_and_r_numbers_a_token_and_a_bit_a_value(
    dtype: torch.dtype, p: float
) -> None:
    model, tokens, r = Two().to(dtype).train(), 64, 4
    config = pf.LoraConfig(r=r, target_modules=["before", "one", "two"], lora_dropout=p)
    adapter = pf.init(model, config)
    x, leaves = torch.randn(tokens, 32, dtype=dtype), pf.leaves(adapter)
    own = [*model.parameters(), *leaves, *(t for leaf in adapter.buffers.values() for t in leaf.values())]
    inputs = 2 * tokens * 32 * dtype.itemsize  # of `before`, and of both the others
    bits = 3 * (tokens * 32 // 8 + 4) if p else 0  # and the scaling, which dropout changes, for each
    assert saved(lambda: pf.apply(model, adapter, x), own) == inputs + 3 * tokens * r * 4 + bits


def test_dropout_drops_what_it_says_and_leaves_the_mean() -> None:
    count = 2**20
    for p in (0.0, 1 / 256, 0.1, 0.5, 0.93, 1.0):
        torch.manual_seed(3)
        kept = dropout.draw(1024, 1024, p, torch.device("cpu"))
        dropped = 1 - dropout.mask(kept.bits, (1024, 1024)).double()
        # five standard deviations, and the rounding of p
        near = 5 * (p * (1 - p) / count) ** 0.5 + 2**-15
        assert float(dropped.mean()) == pytest.approx(p, abs=near)
        assert kept.scale * (1 - p) == pytest.approx(float(p < 1), abs=2**-15 / max(1 - p, 2**-15))
        if 0 < p < 1:  # rows, columns and the eight that share a byte are as independent as binomial numbers are
            for groups in (dropped, dropped.T, dropped.view(128, 8, 1024).transpose(1, 2).reshape(-1, 8)):
                spread = groups.sum(1).var() / (groups.shape[1] * p * (1 - p))
                assert float(spread) == pytest.approx(1, abs=0.25)


def test_the_mask_is_that_of_the_random_state() -> None:
    before = torch.get_rng_state()
    first = dropout.draw(9, 5, 0.5, torch.device("cpu")).bits
    second = dropout.draw(9, 5, 0.5, torch.device("cpu")).bits
    torch.set_rng_state(before)
    assert torch.equal(dropout.draw(9, 5, 0.5, torch.device("cpu")).bits, first)
    torch.set_rng_state(before)
    inside: list[Tensor] = []
    torch.func.grad(lambda x: inside.append(dropout.draw(9, 5, 0.5, x.device).bits) or x.sum())(torch.ones(2))
    assert torch.equal(inside[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_the_same_values_dropped_it_is_peft(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 24)).to(dtype).train()
    x = torch.randn(300, 40, dtype=dtype)
    adapter = oracle.randomised(pf.init(base, pf.LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=0.3)))
    pf.save(adapter, tmp_path)
    theirs = oracle.loaded(base, tmp_path).train()
    for path, module in theirs.named_modules():
        if path.endswith("lora_dropout.default"):
            module.forward = lambda x: x * mask(x, 0.3)
    torch.manual_seed(5)
    found = oracle.gradients(base, adapter, x)
    torch.manual_seed(5)
    expected = oracle.gradients_of(theirs, x)
    # forward and backward, of a few roundings each
    assert oracle.furthest(found, expected) < (1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def mask(x: Tensor, p: float) -> Tensor:
    kept = dropout.draw(*x.shape, p, x.device)
    return dropout.mask(kept.bits, x.shape).to(x.dtype) * kept.scale


CONVOLUTIONS = {
    "as one": (nn.Conv2d(32, 64, 3, padding=1, bias=False), (2, 32, 12, 12)),
    "as one, 1d": (nn.Conv1d(64, 128, 3), (2, 64, 90)),
    "as one, strided": (
        nn.Conv2d(32, 64, 3, stride=2, padding=2, dilation=2, padding_mode="circular"),
        (2, 32, 24, 24),
    ),
    "apart": (nn.Conv2d(128, 128, 3, padding=1), (1, 128, 2, 2)),
    "groups": (nn.Conv1d(256, 256, 3, groups=2), (2, 256, 40)),
    "as one, small": (nn.Conv1d(8, 8, 3), (2, 8, 40)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_without_gradients_computes_what_it_does_with_them(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    base = nn.Sequential(layer)
    adapter = oracle.randomised(pf.init(base, pf.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5)))
    kernels: list[Tensor] = []
    x = torch.randn(shape)
    base.eval()
    pf.leaves(adapter)
    expected = pf.apply(base, adapter, x).detach()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for convolve in (F.conv1d, F.conv2d):  # as the layers read them; the delta has its own
            patch.setattr(F, convolve.__name__, functools.partial(noted, convolve, kernels))
        found = pf.apply(base, adapter, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert [kernel.data_ptr() != layer.weight.data_ptr() for kernel in kernels] == [name.startswith("as one")]


def noted(convolve: Any, kernels: list[Tensor], x: Tensor, kernel: Tensor, *args: Any) -> Tensor:
    """What the convolution gives, after its kernel is put on the list."""
    kernels.append(kernel)
    return convolve(x, kernel, *args)
