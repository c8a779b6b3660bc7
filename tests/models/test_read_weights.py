"""Weights that the model reads past the layer's forward, and layers with a forward of their own: the adapted weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import registry
import torch
import torch.nn.functional as F
from cases import trained
from compiled import one_graph
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

import peftfn as pf
from peftfn.models.read_weights import AdaptedWeight


class Reads(nn.Module):
    """Reads the weight and the bias of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.lin.weight
        assert isinstance(weight, Tensor) and weight.dtype == x.dtype and weight.shape == (8, 8)
        return F.linear(x, weight, self.lin.bias) + x @ weight[:, :8].T


class ReadsAndCalls(Reads):
    """Reads the weight of a layer that it also calls, as Mamba does with its convolution and a cache."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) + F.linear(x, 2 * self.lin.weight.T)


class Tied(nn.Module):
    """A decoder that multiplies with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Embedding(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x[..., :4].abs().argsort(-1)).mean(-2) @ self.lin.weight.T


class Kernel(nn.Module):
    """Takes a convolution's kernel for a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight.squeeze(-1), self.lin.bias)


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight), self.bias)


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight), self.bias


class Scaled(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Same(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (1, 1)), self.weight, self.bias)


class Around(nn.Module):
    """A layer with a forward of its own, in a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.lin, nn.Embedding):
            x = x[..., :4].abs().argsort(-1)
        found = self.lin(x[..., None] if isinstance(self.lin, nn.Conv1d) else x)
        return found[0] + found[1] if isinstance(found, tuple) else found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "read": Reads,
    "read and called": ReadsAndCalls,
    "embedding read": Tied,
    "kernel read": Kernel,
    "cosine": lambda: Around(Cosine(8, 8)),
    "pair": lambda: Around(Pair(8, 8)),
    "scaled embedding": lambda: Around(Scaled(8, 8)),
    "same padding": lambda: Around(Same(8, 8, 3)),
}
METHODS = ("lora", "dora", "ia3", "lokr", "oft")
every_model = pytest.mark.parametrize("name", MODELS)


def setting(name: str, method: str = "lora", seed: int = 0) -> tuple[nn.Module, pf.Adapter, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    adapter = trained(pf.init(model, registry.BY_NAME[method].make(("lin",))), seed)
    return model, adapter, torch.randn(4, 8, dtype=torch.float64)


def merged(model: nn.Module, adapter: pf.Adapter, x: Tensor) -> Tensor:
    return functional_call(model, pf.merge(dict(model.named_parameters()), adapter, model=model), (x,))


def possible(name: str, method: str) -> bool:
    """(IA)3 has no embeddings, and OFT rotates what goes into a linear layer: its weight is W·Rᵀ all the same."""
    return not (method == "ia3" and "embedding" in name)


@pytest.mark.parametrize("method", METHODS)
@every_model
def test_apply_is_the_model_with_merged_weights(name: str, method: str) -> None:
    if not possible(name, method):
        return
    model, adapter, x = setting(name, method)
    expected = merged(model, adapter, x)
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    assert off(model(x), expected) > 1e-3
    bound = pf.bind(model, adapter)
    assert off(bound(x), expected) < EXACT
    assert off(copy.deepcopy(bound)(x), expected) < EXACT
    assert dict(bound.named_parameters()).keys() >= dict(model.named_parameters()).keys()


@every_model
def test_so_it_is_under_transforms(name: str) -> None:
    model, adapter, x = setting(name)
    dense = dict(model.named_parameters())

    def ours(params: Any) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), x).square().mean()

    def by_hand(params: Any) -> Tensor:
        weights = pf.merge(dense, adapter.replace(params=params), model=model)
        return functional_call(model, weights, (x,)).square().mean()

    direction = tree_map(torch.ones_like, adapter.params)
    assert off(grad(ours)(adapter.params), grad(by_hand)(adapter.params)) < EXACT
    pushed = [jvp(one, (adapter.params,), (direction,))[1] for one in (ours, by_hand)]
    assert off(*pushed) < EXACT
    several = tree_map(lambda one: torch.stack([one, 2 * one]), adapter.params)
    assert off(vmap(ours)(several), vmap(by_hand)(several)) < EXACT


@one_graph
@every_model
def test_so_it_is_compiled(name: str) -> None:
    model, adapter, x = setting(name)
    compiled = torch.compile(lambda a, x: pf.apply(model, a, x), fullgraph=True, backend="aot_eager")
    assert off(compiled(adapter, x), merged(model, adapter, x)) < EXACT


def test_what_nobody_reads_is_not_refused_when_it_is_compiled_and_its_update_counts_once() -> None:
    model, x = nn.Sequential(Conv1D(4, 4)).double().train(), torch.randn(3, 4, dtype=torch.float64)
    config = pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=1e-14)
    stacked = pf.stack([pf.init(model, config) for _ in range(2)])
    for index in (None, [1, 0, -1]):
        given = pf.unstack(stacked)[0] if index is None else stacked
        compiled = torch.compile(lambda a, i=index: pf.apply(model, a, x, index=i), fullgraph=True, backend="eager")
        assert off(compiled(given), pf.apply(model, given, x, index=index)) < EXACT
        torch._dynamo.reset()


@pytest.mark.parametrize("name", ["cosine", "scaled embedding", "same padding"])
def test_rows_of_a_layer_with_a_forward_of_its_own_use_their_own_adapters(name: str) -> None:
    model, first, x = setting(name)
    second = setting(name, seed=1)[1]
    found = pf.apply(model, pf.stack([first, second]), x, index=[1, 0, -1, 1])
    alone = [pf.apply(model, one, x[n : n + 1]) for n, one in enumerate((second, first, (), second))]
    assert off(found, torch.cat(alone)) < EXACT


def test_what_has_no_one_value_is_refused() -> None:
    model, adapter, x = setting("read")
    with pytest.raises(ValueError, match="lin: the model reads this layer's weight itself, and each row has an adap"):
        pf.apply(model, pf.stack([adapter, adapter]), x, index=[0, 1, 1, 0])
    config = pf.LoraConfig(r=4, lora_dropout=0.1, target_modules=["lin"])
    adapter = pf.init(model, config)
    assert off(pf.apply(model, adapter, x), model(x)) < EXACT
    with pytest.raises(ValueError, match=r"weight itself, where lora_dropout has no meaning.*Set lora_dropout=0"):
        pf.apply(model.train(), adapter, x)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.clamp_(0, 1),
        nn.init.zeros_,
        lambda weight: torch.mul(torch.ones(8, 8), 2, out=weight),
        lambda weight: setattr(weight, "data", torch.ones(8, 8)),
        lambda weight: weight.data_ptr(),
    ],
)
def test_writing_to_a_weight_that_an_adapter_makes_is_refused(write: Callable[[Any], object]) -> None:
    class Writes(Reads):
        def forward(self, x: Tensor) -> Tensor:
            write(self.lin.weight)
            return self.lin(x)

    model = Writes().eval()
    before = copy.deepcopy(model.state_dict())
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["lin"]))
    with pytest.raises(RuntimeError, match=r"lin.weight: the model (writes to it|asks for its memory)"):
        pf.apply(model, adapter, torch.randn(2, 8))
    assert off(model.state_dict(), before) == 0.0


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "hook",
    [weight_norm, parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5)],
)
def test_a_hook_that_makes_the_weight_makes_the_one_that_runs(hook: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(hook(nn.Linear(8, 8))).eval()
    adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules="0")))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # the weight that a hook made last is stale now
    x = torch.randn(3, 8)
    leaf = adapter.params["0"]
    delta = adapter.buffers["0"]["scaling"] * leaf["lora_B"] @ leaf["lora_A"]
    found = pf.apply(model, adapter, x)
    expected = model(x) + x @ delta.T
    assert off(found, expected) < 1e-6
    assert off(pf.bind(model, adapter)(x), expected) < 1e-6


def test_what_is_asked_of_a_weight_without_its_numbers_computes_nothing() -> None:
    def compute() -> Tensor:
        raise AssertionError("computed")

    plain = nn.Parameter(torch.ones(3, 4, dtype=torch.float16), requires_grad=False)
    weight: Any = AdaptedWeight(lambda: plain, compute, "w")
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.device, weight.dim()) == (torch.float16, (3, 4), plain.device, 2)
    assert not weight.requires_grad and weight.is_floating_point() and weight.size(1) == 4
    with pytest.raises(AssertionError, match="computed"):
        weight + 1


def test_a_bound_module_is_pickled_with_what_it_reads() -> None:
    model, adapter, x = setting("read and called")
    bound = pf.bind(model, adapter)
    again = pickle.loads(pickle.dumps(bound))
    assert off(again(x), bound(x)) == 0.0
