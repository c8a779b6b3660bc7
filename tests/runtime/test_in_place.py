"""A base may change in place what a site gives it: every kind of site, dense and packed, under every transform.

The same change of a copy is what it is held against: the copy is the only thing that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import quantized
import torch
from cases import trained
from compiled import one_graph
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from transformers.pytorch_utils import Conv1D

import peftfn as pf

Change = Callable[[Tensor], Tensor]


def add(y: Tensor) -> Tensor:
    y += 1.5
    return y


def write_slice(y: Tensor) -> Tensor:
    y[:, 0] = 0
    y[..., 1:] *= 2
    return y


def write_through_view(y: Tensor) -> Tensor:
    y.flatten(1)[:, 1:].clamp_(min=-0.1)
    return y


CHANGES: dict[str, Change] = {
    "relu": nn.ReLU(inplace=True),
    "silu": nn.SiLU(inplace=True),
    "+=": add,
    "clamp_": lambda y: y.clamp_(-2.0, 2.5),
    "slices": write_slice,
    "through a view": write_through_view,
    "masked_fill_": lambda y: y.masked_fill_(y > 0.3, 0.25),
}


class Changed(nn.Module):
    """A layer, and what is done to its output, in place or to a copy."""

    def __init__(self, layer: nn.Module, change: Change, copies: bool) -> None:
        super().__init__()
        self.layer, self.change, self.copies = layer, change, copies

    def forward(self, x: Tensor) -> Tensor:
        """The changed output, after something that saves it."""
        y = self.layer(x)
        y = self.change(y.clone() if self.copies else y)
        return y.sin()


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def singles(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def ids() -> Tensor:
    return torch.randint(0, 10, (4, 5))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 8), floats(4, 6)),
    "linear of one row": (lambda: nn.Linear(6, 8), floats(6)),
    "linear, three axes": (lambda: nn.Linear(6, 8), floats(4, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), floats(4, 5, 6)),
    "wide linear": (lambda: nn.Linear(128, 130), floats(4, 70, 128)),
    "Conv1D": (lambda: Conv1D(8, 6), floats(4, 5, 6)),
    "embedding": (lambda: nn.Embedding(10, 8), ids),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), floats(4, 6, 9)),
    "long conv1d": (lambda: nn.Conv1d(16, 16, 3), floats(4, 16, 900)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), floats(4, 6, 7, 7)),
    "large conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), floats(4, 16, 24, 24)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), floats(4, 4, 4, 4, 4)),
    "nf4": (lambda: quantized.four_bit(nn.Linear(64, 64)), singles(4, 5, 64)),
    "8-bit": (lambda: quantized.eight_bit(nn.Linear(64, 64)), singles(4, 5, 64)),
} | {kind: (lambda make=make: make(nn.Linear(64, 64)), singles(4, 5, 64)) for kind, make in quantized.OPAQUE.items()}

METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: pf.LoraConfig(r=2, target_modules=["layer"]),
    "LoRA with dropout": lambda: pf.LoraConfig(r=2, target_modules=["layer"], lora_dropout=0.3),
    "IA3": lambda: pf.IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "IA3 of the input": lambda: pf.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
    "AdaLoRA": lambda: pf.AdaLoraConfig(target_modules=["layer"], init_r=2, total_step=10),
}
NO_EMBEDDING = {"IA3", "IA3 of the input", "AdaLoRA"}  # as in peft


def made(layer: str, method: str, change: str) -> tuple[nn.Module, nn.Module, pf.Adapter, Tensor]:
    """A base that changes in place, one that changes a copy and shares its layer, an adapter, and a batch."""
    if layer == "embedding" and method in NO_EMBEDDING:
        pytest.skip(f"{method} does not act on embeddings, in peft neither")
    build, batch = LAYERS[layer]
    torch.manual_seed(0)
    inner, x = build(), batch()
    inner = inner if x.dtype == torch.float32 else inner.double()
    base, copying = (Changed(inner, CHANGES[change], copies).train() for copies in (False, True))
    return base, copying, trained(pf.init(base, METHODS[method]()), size=0.5), x


def value(base: nn.Module, adapter: pf.Adapter, x: Tensor) -> Callable[[Any], Tensor]:
    def run(params: Any) -> Tensor:
        torch.manual_seed(3)  # dropout's
        return pf.apply(base, adapter.replace(params=params), x).sum()

    return run


def equal(found: Any, expected: Any) -> None:
    """The same operations on the same numbers."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


ALL = pytest.mark.parametrize("layer", LAYERS)
EVERY = pytest.mark.parametrize("method", METHODS)


def pairs(changes: Iterable[str]) -> list[tuple[str, str]]:
    """(method, change): every change after a LoRA, and two of them after each other method."""
    few = {"relu", "slices"}
    return [(method, change) for method in METHODS for change in changes if method == "LoRA" or change in few]


@pytest.mark.parametrize(("method", "change"), pairs(CHANGES), ids=" ".join)
@ALL
def test_backward_and_grad_are_those_of_a_change_of_a_copy(layer: str, method: str, change: str) -> None:
    if layer == "linear of one row" and change in ("slices", "through a view"):
        pytest.skip("a row has one axis, and these changes are of two")
    base, copying, adapter, x = made(layer, method, change)
    leaves = pf.leaves(adapter)
    found: list[list[Tensor]] = []
    for model in (base, copying):
        run = value(model, adapter, x)
        found.append(list(torch.autograd.grad(run(adapter.params), leaves)))
    equal(*found)
    assert all(one.abs().max() > 0 for one in found[0])
    equal(grad(value(base, adapter, x))(adapter.params), grad(value(copying, adapter, x))(adapter.params))


@ALL
@EVERY
def test_gradients_go_on_to_what_is_before_the_layer(method: str, layer: str) -> None:
    base, copying, adapter, x = made(layer, method, "relu")
    if not x.is_floating_point():
        pytest.skip("tokens have no gradient")
    x.requires_grad_()
    found = [torch.autograd.grad(value(model, adapter, x)(adapter.params), x) for model in (base, copying)]
    equal(*found)


@ALL
def test_a_layer_that_no_adapter_acts_on_may_be_changed_too(layer: str) -> None:
    base, copying, _, x = made(layer, "LoRA", "relu")
    x = x.requires_grad_() if x.is_floating_point() else x
    found = [pf.apply(model, (), x) for model in (base, copying)]
    equal(*found)
    if x.is_floating_point():
        equal(*(torch.autograd.grad(one.sum(), x) for one in found))


@pytest.mark.parametrize(("method", "change"), pairs(["+=", "slices"]), ids=" ".join)
@ALL
def test_under_vmap_and_by_row_and_bound_it_is_the_same(layer: str, method: str, change: str) -> None:
    if layer == "linear of one row":
        pytest.skip("a row is no batch")
    base, copying, adapter, x = made(layer, method, change)
    base, copying = base.eval(), copying.eval()
    stacked = pf.stack([adapter, trained(adapter, 5)])

    def mapped(model: nn.Module) -> list[Any]:
        each = vmap(lambda one: pf.apply(model, one, x))(stacked)
        gradients = vmap(lambda one: grad(value(model, one, x))(one.params), randomness="same")
        return [each, gradients(stacked)] if layer != "torchao" else [each]  # torchao has no rule for its gradient

    equal(mapped(base), mapped(copying))
    pf.leaves(stacked)
    for run in (
        lambda model: pf.apply(model, stacked, x, index=[1, -1, 0, 1]),
        lambda model: pf.bind(model, stacked, index=[1, -1, 0, 1])(x),
        lambda model: pf.bind(model, adapter)(x),
    ):
        found = [run(model) for model in (base, copying)]
        equal(*found)
        assert found[0].requires_grad
        found[0].sum().backward()


@ALL
def test_forward_mode_is_the_same(layer: str) -> None:
    base, copying, adapter, x = made(layer, "LoRA", "clamp_")
    base, copying = base.eval(), copying.eval()
    along = trained(adapter, 7).params
    equal(*(jvp(value(model, adapter, x), (adapter.params,), (along,)) for model in (base, copying)))


@one_graph
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13's compiler does so
@pytest.mark.parametrize("layer", ["linear, three axes", "long conv1d", "embedding", "nf4"])
def test_compiled_whole_it_is_the_same(layer: str) -> None:
    base, _, adapter, x = made(layer, "LoRA", "slices")
    base = base.eval()
    run = value(base, adapter, x)
    plain = torch.compile(
        lambda params: pf.apply(base, adapter.replace(params=params), x).sum(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(plain(adapter.params), run(adapter.params))
    pf.leaves(adapter)
    torch.testing.assert_close(
        torch.autograd.grad(plain(adapter.params), torch.utils._pytree.tree_leaves(adapter.params)),
        torch.autograd.grad(run(adapter.params), torch.utils._pytree.tree_leaves(adapter.params)),
    )


def test_merged_weights_compute_what_the_changed_layer_does() -> None:
    """The copy is no reference of its own: a plain layer with merged weights is."""
    base, _, adapter, x = made("linear, three axes", "LoRA", "slices")
    merged = pf.merge(dict(base.named_parameters()), adapter)
    torch.testing.assert_close(pf.apply(base, adapter, x), functional_call(base, merged, (x,)), rtol=1e-12, atol=1e-12)
