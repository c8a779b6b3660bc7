"""Packed layers of which nothing is known but what they compute: HQQ's and torchao's, real ones, on a CPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import torch.utils._pytree as torch_pytree
from cases import trained
from oracle import distance, file_of, furthest, gradients, loaded, loss
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import peftfn as pf
from peftfn.weights import codecs
from peftfn.weights.codecs import packed_linear as product

# A dense weight is read by running the layer, in its own dtype: the same numbers, multiplied in another order.
CLOSE = 1e-5
# Beside peft the layer runs itself in both: the same products, summed in another order for gradients.
SAME, SUMS = 1e-6, 3e-6


KINDS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "hqq 4 bits": ("hqq", quantized.hqq),
    "hqq 2 bits": ("hqq", functools.partial(quantized.hqq, bits=2)),
    "hqq 8 bits": ("hqq", functools.partial(quantized.hqq, bits=8)),
    "torchao int8": ("torchao", quantized.torchao),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
METHODS = {
    "lora": pf.LoraConfig(r=4, target_modules=["0", "2"]),
    "lora all biases": pf.LoraConfig(r=4, target_modules=["2"], bias="lora_only"),
    "ia3": pf.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "adalora": pf.AdaLoraConfig(init_r=4, target_modules=["0", "2"]),
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    package, make = KINDS[kind]
    pytest.importorskip(package)
    return nn.Sequential(make(nn.Linear(64, 96)), nn.Tanh(), make(nn.Linear(96, 32))).eval()


def dense_of(model: Any) -> nn.Module:
    """Plain layers with the same weights, read from the layers themselves."""
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).eval()
    with torch.no_grad():
        for number in (0, 2):
            weight = plain[number].weight
            bias = model[number].bias.detach()
            weight.copy_((model[number](torch.eye(weight.shape[1])) - bias).T)
            plain[number].bias.copy_(bias)
    return plain


def bits_of(model: nn.Module) -> list[Any]:
    """Every tensor of the model that can be looked at, and what its modules hold."""
    found: list[Any] = [copy.copy(list(vars(module))) for module in model.modules()]
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            held = value.values() if isinstance(value, dict) else [value]
            for one in held:
                if isinstance(one, Tensor):
                    plain = one.dequantize() if type(one).__module__.startswith("torchao") else one.detach()
                    found.append((id(one), plain.clone().tolist()))
    return found


@every_kind
@pytest.mark.parametrize("method", METHODS)
def test_it_computes_and_differentiates_as_plain_layers_with_the_same_weights(kind: str, method: str) -> None:
    model, x = model_of(kind), torch.randn(4, 3, 64)
    plain = dense_of(model)
    before = bits_of(model)
    adapter = trained(pf.init(model, METHODS[method]), size=0.05)
    assert pf.apply(model, (), x).equal(model(x))
    assert distance(pf.apply(model, adapter, x), pf.apply(plain, adapter, x)) < CLOSE
    value = lambda base: lambda p: pf.apply(base, adapter.replace(params=p), x).square().mean()  # noqa: E731  # for both
    for transform in (grad, lambda f: lambda p: jvp(f, (p,), (p,))[1]):
        ours, theirs = (torch_pytree.tree_leaves(transform(value(base))(adapter.params)) for base in (model, plain))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=CLOSE)
    stacked = pf.stack([adapter, trained(pf.init(model, METHODS[method]), 1, 0.05)])
    together = vmap(lambda a: pf.apply(model, a, x))(stacked)
    assert distance(together[0], pf.apply(model, adapter, x)) < CLOSE
    routed = pf.apply(model, stacked, x, index=[0, 1, -1, 0])
    assert distance(routed[1], together[1][1]) < CLOSE
    assert bits_of(model) == before


@every_kind
def test_outputs_and_gradients_are_peft_s(kind: str, tmp_path: Path) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    adapter = trained(pf.init(model, METHODS["lora"]), size=0.05)
    theirs: Any = loaded(model_of(kind), pf.save(adapter, tmp_path))
    assert "LoraLinear" in type(theirs.get_submodule("base_model.model.0")).__name__
    assert distance(pf.apply(model, adapter, x), theirs(x)) < SAME
    names = {name: tensor for name, tensor in theirs.named_parameters() if tensor.requires_grad}
    grads = torch.autograd.grad(loss(theirs(x)), list(names.values()))
    expected = file_of(theirs, dict(zip(names, grads, strict=True)))
    assert furthest(gradients(model, adapter, x), expected) < SUMS


@every_kind
def test_merged_it_is_a_plain_model(kind: str) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    adapter = trained(pf.init(model, METHODS["lora"]), size=0.05)
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    plain = dense_of(model)
    kept = {name: tensor for name, tensor in merged.items() if name in dict(plain.named_parameters())}
    assert {"0.weight", "2.weight"} <= set(kept)
    assert not any("W_q" in name for name in merged)
    assert distance(torch.func.functional_call(plain, kept, x), pf.apply(model, adapter, x)) < CLOSE
    with pytest.raises(ValueError, match="cannot be packed again; merge without requantize"):
        pf.merge(dict(model.named_parameters()), adapter, model=model, requantize=True)


@every_kind
def test_the_identity_is_run_in_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    gradient = lambda: grad(lambda x: pf.apply(model, (), x).square().sum())(x)  # noqa: E731  # twice
    whole, weight = gradient(), codecs.of(model[0]).read(model[0], "weight")  # type: ignore[index]
    monkeypatch.setattr(product, "_BLOCK", 500)
    assert distance(gradient(), whole) < CLOSE
    assert distance(codecs.of(model[0]).read(model[0], "weight"), weight) < CLOSE  # type: ignore[index]


@every_kind
def test_a_bound_model_trains(kind: str) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    before = bits_of(model)
    adapter = trained(pf.init(model, METHODS["lora"]), size=0.05)
    bound = pf.bind(model, adapter)
    assert distance(bound(x), pf.apply(model, adapter, x)) < CLOSE
    bound(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in bound.parameters() if parameter.requires_grad)
    assert bits_of(model) == before
