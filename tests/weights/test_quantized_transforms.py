"""What torch's transforms make of a quantized base: the table of the README, a row for each test.

Not possible: `torch.compile` of vmap(grad(...)), for which torch 2.13 has no rule (what it puts in the place of an
autograd.Function cannot be mapped), and vmap over packed weights themselves, for which there is no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from cases import trained
from compiled import one_graph
from quantized import OPAQUE, ROUNDING, check_checkpointing, eight_bit, four_bit, parts_of, products
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vjp, vmap

import peftfn as pf
from peftfn.weights import codecs
from peftfn.weights.codecs import packed_linear as product

SAME = {"rtol": 1e-5, "atol": 1e-6}
KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": four_bit,
    "fp4 single": lambda layer: four_bit(layer, "fp4", compress_statistics=False),
    "8-bit": eight_bit,
    "outliers": lambda layer: eight_bit(layer, threshold=6.0),
    **OPAQUE,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, train: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [KINDS[kind](nn.Linear(*sizes)) for sizes in ((64, 96), (96, 32))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1]).train(train)


def inputs() -> Tensor:
    x = torch.randn(4, 3, 64)
    x[0, 0, 3], x[2, 1, 7] = 9.0, -8.0  # outliers, in some rows
    return x


def adapter_of(model: nn.Module, seed: int = 0) -> pf.Adapter:
    config = pf.LoraConfig(r=4, target_modules=["0", "2"], bias="lora_only")
    return trained(pf.init(model, config), seed, size=0.05)


def dense_of(model: nn.Module, train: bool) -> nn.Module:
    """Plain layers with the same weights."""
    weights = pf.merge(dict(model.named_parameters()), trained(pf.init(model, LORA), size=0.0), model=model)
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).train(train)
    plain.load_state_dict(weights)
    return plain


LORA = pf.LoraConfig(r=2, target_modules=["0", "2"])


def value(model: nn.Module, adapter: pf.Adapter, x: Tensor) -> Callable[[Any], Tensor]:
    return lambda params: pf.apply(model, adapter.replace(params=params), x).square().mean()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, **SAME)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which products were computed, in order."""
    return products(monkeypatch)


@every_kind
def test_gradients_in_training_are_those_of_plain_layers_with_the_same_weights(kind: str) -> None:
    """On a CPU nothing of the input is rounded in training, so both are the same function."""
    model, x = model_of(kind, train=True), inputs()
    plain, adapter = dense_of(model, train=True), adapter_of(model)
    for transform in (grad, lambda f: lambda p: jvp(f, (p,), (p,))[1], lambda f: grad(twice(f))):
        ours = transform(value(model, adapter, x))(adapter.params)
        close(ours, transform(value(plain, adapter, x))(adapter.params))
    close(
        jacrev(lambda x: pf.apply(model, adapter, x).sum(0))(x), jacrev(lambda x: pf.apply(plain, adapter, x).sum(0))(x)
    )


def twice(f: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The squared norm of the gradient, whose own gradient needs second derivatives."""
    return lambda p: sum((t.square().sum() for t in torch_pytree.tree_leaves(grad(f)(p))), start=torch.zeros(()))


@every_kind
def test_backward_of_backward_is_grad_of_grad(kind: str) -> None:
    model, x = model_of(kind), inputs()
    adapter = adapter_of(model)
    expected = grad(twice(value(model, adapter, x)))(adapter.params)
    leaves = pf.leaves(adapter)
    first = torch.autograd.grad(value(model, adapter, x)(adapter.params), leaves, create_graph=True)
    sum((t.square().sum() for t in first), start=torch.zeros(())).backward()
    close([leaf.grad for leaf in leaves], torch_pytree.tree_leaves(expected))


@every_kind
def test_forward_mode_is_reverse_mode(kind: str) -> None:
    model, x = model_of(kind), inputs()
    adapter = adapter_of(model)
    along = torch.randn_like(x)
    out, moved = jvp(lambda x: pf.apply(model, adapter, x), (x,), (along,))
    _, pull = vjp(lambda x: pf.apply(model, adapter, x), x)
    probe = torch.randn_like(out)
    close((moved * probe).sum(), (pull(probe)[0] * along).sum())


@every_kind
def test_a_mapped_axis_is_folded_into_rows(kind: str, calls: list[str]) -> None:
    model, x = model_of(kind), inputs()
    adapters = [adapter_of(model, seed) for seed in range(3)]
    stacked = pf.stack(adapters)
    together = vmap(grad(lambda p, a: value(model, a, x)(p)))(stacked.params, stacked)
    assert calls == ["kernel", "kernel", "gradient"], "one call for all adapters; nothing needs the input's gradient"
    for number, adapter in enumerate(adapters):
        alone = grad(value(model, adapter, x))(adapter.params)
        close(torch_pytree.tree_map(lambda t: t[number], together), alone)  # noqa: B023  # called at once


def test_outliers_of_one_adapter_are_not_another_s() -> None:
    """LLM.int8() looks for outliers in a whole batch; a mapped axis is another batch."""
    model = model_of("outliers")
    x = torch.randn(5, 3, 64)
    x[1, 0, 3] = x[3, :, 9] = 30.0
    together = vmap(lambda one: pf.apply(model, (), one))(x)
    for row in range(5):
        close(together[row], pf.apply(model, (), x[row]))
    nested = vmap(vmap(lambda one: pf.apply(model, (), one)))(x)
    for row in range(5):
        for token in range(3):
            close(nested[row, token], pf.apply(model, (), x[row, token][None])[0])


@every_kind
def test_per_sample_gradients(kind: str) -> None:
    model, x = model_of(kind), inputs()
    adapter = adapter_of(model)
    one = grad(lambda params, row: pf.apply(model, adapter.replace(params=params), row).square().mean())
    together = vmap(one, in_dims=(None, 0))(adapter.params, x)
    for row in range(4):
        close(torch_pytree.tree_map(lambda t: t[row], together), one(adapter.params, x[row]))  # noqa: B023  # at once


@pytest.mark.parametrize("reentrant", [False, True], ids=["recomputed", "reentrant"])
@pytest.mark.parametrize("kind", ["nf4", "8-bit", *OPAQUE])
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    check_checkpointing(kind, reentrant)


@one_graph
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13's compiler does so
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "torchao"]
)  # which Dynamo cannot trace in a Function
def test_compiled_whole(kind: str) -> None:
    model, x = model_of(kind), inputs()
    adapter = adapter_of(model)
    forward = lambda params, x: pf.apply(model, adapter.replace(params=params), x)  # noqa: E731  # as it is compiled
    gradient = lambda params, x: grad(value(model, adapter, x))(params)  # noqa: E731
    for function in (forward, gradient):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        close(compiled(adapter.params, x), function(adapter.params, x))
    stacked = pf.stack([adapter, adapter_of(model, 1)])
    ensemble = lambda stacked, x: vmap(lambda one: pf.apply(model, one, x))(stacked)  # noqa: E731
    close(torch.compile(ensemble, fullgraph=True, backend="aot_eager")(stacked, x), ensemble(stacked, x))


@every_kind
def test_nothing_of_the_weight_s_size_is_saved(kind: str) -> None:
    model, x = model_of(kind), inputs()
    adapter = adapter_of(model)
    pf.leaves(adapter)
    own = {part.untyped_storage().data_ptr() for p in model.parameters() for part in parts_of(p)}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.is_floating_point():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pf.apply(model, adapter, x).sum().backward()
    assert max(sizes) < 64 * 96 / 2


def test_weights_are_unpacked_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks far smaller than the weight, also where a row is no whole number of the format's blocks."""
    x = torch.randn(5, 40)
    for kind, make in KINDS.items() - OPAQUE.items():  # test_opaque.py has those
        torch.manual_seed(0)
        model = nn.Sequential(make(nn.Linear(40, 50))).train()
        f = lambda x, model=model: pf.apply(model, (), x).square().sum()  # noqa: E731
        whole = grad(f)(x), jvp(f, (x,), (x,))[1]
        monkeypatch.setattr(product, "_BLOCK", 400)
        close((grad(f)(x), jvp(f, (x,), (x,))[1]), whole)
        read = codecs.of(model[0]).read(model[0], "weight")
        monkeypatch.undo()
        assert read.equal(codecs.of(model[0]).read(model[0], "weight")), kind
    assert ROUNDING
