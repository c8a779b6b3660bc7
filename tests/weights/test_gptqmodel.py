"""GPTQModel's linear layers against themselves, peft on a fresh copy of the same base, and the mathematics."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
import torch.utils._pytree as torch_pytree
from bases import llama
from cases import trained
from oracle import distance, file_of, furthest, gradients, loaded, loss
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import peftfn as pf
from peftfn.weights import codecs

pytest.importorskip("gptqmodel", reason="GPTQModel has an environment of its own: make test-gptqmodel")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and its own dependencies say when they are imported
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_fused import TorchFusedLinear

# Its scales are halves, so that both compute with the same rounded weights; sums of gradients are in another order.
SAME = 2e-6
KINDS = [
    {"bits": bits, "group_size": size, "desc_act": order}
    for bits, size, order in itertools.product((2, 3, 4, 8), (-1, 32), (False, True))
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
LORA = pf.LoraConfig(r=4, target_modules=["0", "2"])


@torch.no_grad()
def packed(layer: nn.Linear, bits: int = 4, group_size: int = 32, desc_act: bool = False) -> Any:
    """The layer as GPTQModel packs it: with zero points as they are, version 2."""
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    made = TorchLinear(bits=bits, group_size=group_size, sym=False, desc_act=desc_act, **sizes)
    groups = torch.arange(layer.in_features) // made.group_size
    if desc_act:
        groups = groups[torch.randperm(len(groups))]
    low, high = (
        torch.stack([end(layer.weight[:, groups == one]) for one in range(int(groups.max()) + 1)], 1)
        for end in (lambda part: part.amin(1).clamp(max=0), lambda part: part.amax(1).clamp(min=0))
    )
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round()
    made.pack_original(copy.deepcopy(layer), scales, zeros, groups.int())
    made.qzero_format(format=2)
    return made.eval()


def model_of(kind: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(packed(nn.Linear(64, 96), **kind), nn.Tanh(), packed(nn.Linear(96, 32), **kind))


def dense_of(model: Any) -> nn.Module:
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    with torch.no_grad():
        for number in (0, 2):
            plain[number].weight.copy_(model[number].dequantize_weight().T)
            plain[number].bias.copy_(model[number].bias)
    return plain


def value(model: nn.Module, adapter: pf.Adapter, x: Tensor) -> Any:
    return lambda params: pf.apply(model, adapter.replace(params=params), x).square().mean()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=SAME)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_is_the_layer_s_own_bit_for_bit_and_nothing_of_it_changes(
    kind: dict[str, Any], dtype: torch.dtype
) -> None:
    model, x = nn.Sequential(packed(nn.Linear(96, 64), **kind)), torch.randn(4, 3, 96).to(dtype)
    before = snapshot(model)
    ours = pf.apply(model, (), x)
    assert snapshot(model) == before
    theirs = model(x)
    assert ours.dtype == theirs.dtype
    assert ours.equal(theirs)
    after = snapshot(model)
    assert pf.apply(model, (), x).equal(theirs)
    assert snapshot(model) == after


@every_kind
def test_transforms_and_merges_are_those_of_plain_layers_with_the_same_weights(kind: dict[str, Any]) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    plain, adapter = dense_of(model), trained(pf.init(model, LORA), size=0.05)
    for transform in (grad, lambda f: lambda p: jvp(f, (p,), (p,))[1]):
        close(*(transform(value(base, adapter, x))(adapter.params) for base in (model, plain)))
    stacked = pf.stack([adapter, trained(pf.init(model, LORA), 1, 0.05)])
    close(*(vmap(lambda a, base=base: pf.apply(base, a, x))(stacked) for base in (model, plain)))
    merged = pf.merge(model.state_dict(), adapter, model=model)
    half = 2**-10 * quantized.largest(merged["0.weight"])  # merged weights are in the dtype of the scales, a half
    expected = pf.merge(plain.state_dict(), adapter)["0.weight"]
    assert (merged["0.weight"].float() - expected).abs().max() <= half


@every_kind
def test_merged_weights_can_be_packed_again_and_what_did_not_change_comes_back(kind: dict[str, Any]) -> None:
    model = model_of(kind)
    state, adapter = model.state_dict(), trained(pf.init(model, LORA), size=0.05)
    nothing = trained(pf.init(model, LORA), size=0.0)
    same = pf.merge(state, nothing, model=model, requantize=True)
    assert sorted(same) == sorted(state) and all(same[name].equal(state[name]) for name in state)
    dense, again = (pf.merge(state, adapter, model=model, requantize=how) for how in (False, True))
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(again)
    scales = again["0.scales"][again["0.g_idx"].long()].T.float()
    apart = (dense_of(fresh)[0].weight - dense["0.weight"].float()).abs()  # type: ignore[index]
    # Half a step, and both rounded to a half.
    assert (apart <= 0.502 * scales + 2**-10 * quantized.largest(dense["0.weight"])).all()


METHODS = {
    "lora": pf.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "ia3": pf.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def base_of() -> Any:
    torch.manual_seed(0)
    model = llama(vocab_size=32, hidden_size=64, intermediate_size=96)()
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not path.endswith("lm_head"):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, packed(layer, desc_act=True))
    return model.eval()


def test_outputs_and_gradients_are_peft_s(tmp_path: Path) -> None:
    base, batch = base_of(), {"input_ids": torch.randint(0, 32, (3, 7))}
    adapter = trained(pf.init(base, METHODS["lora"]), size=0.1)
    theirs: Any = loaded(base_of(), pf.save(adapter, tmp_path))
    assert sum(type(one).__module__.endswith(".gptq") for one in theirs.modules()) == len(adapter.params)
    assert distance(pf.apply(base, adapter, batch).logits, theirs(**batch).logits) < SAME
    names = {name: one for name, one in theirs.named_parameters() if one.requires_grad}
    grads = torch.autograd.grad(loss(theirs(**batch)), list(names.values()))
    assert furthest(gradients(base, adapter, batch), file_of(theirs, dict(zip(names, grads, strict=True)))) < 4 * SAME


@pytest.mark.parametrize("method", METHODS)
def test_a_bound_model_is_what_apply_computes_and_shares_the_weights(method: str) -> None:
    base, batch = base_of(), {"input_ids": torch.randint(0, 32, (3, 7))}
    adapter = trained(pf.init(base, METHODS[method]), size=0.1)
    before = snapshot(base)
    bound = pf.bind(base, adapter)
    assert bound(**batch).logits.equal(pf.apply(base, adapter, batch).logits)
    bound.train()(**batch).logits.square().mean().backward()
    assert all(one.grad is not None for one in bound.parameters() if one.requires_grad)
    first = bound.model.layers[0].self_attn.q_proj
    assert first.qweight is base.model.layers[0].self_attn.q_proj.qweight
    assert snapshot(base) == before
    assert torch_pytree.tree_leaves(adapter.params)[0].isfinite().all()


def test_zero_points_of_version_1_are_read_as_such() -> None:
    layer = packed(nn.Linear(96, 64))
    weight = codecs.of(layer).read(layer, "weight")
    older = copy.deepcopy(layer)
    older.qzeros.sub_(0x11111111)
    older.qzero_format(format=1)
    stored = layer.qzeros.view(torch.uint8)
    assert ((stored & 15) > 0).all() and ((stored >> 4) > 0).all(), "a zero point of 0 has no version 1"
    assert codecs.of(older).read(older, "weight").equal(weight)


@pytest.mark.parametrize(
    ("kernel", "bits", "said"), [(TorchFusedLinear, 4, "'torch_fused'"), (TorchLinear, 5, "planar")]
)
def test_layers_with_an_order_of_their_own_are_refused(kernel: Any, bits: int, said: str) -> None:
    options = {"group_size": 32, "sym": False, "desc_act": False, "in_features": 64, "out_features": 32}
    model = nn.Sequential(kernel(bits=bits, **options))
    with pytest.raises(ValueError, match=rf"{said}.* holds its weight in an order of its own.*BACKEND.GPTQ_TORCH"):
        pf.init(model, pf.LoraConfig(target_modules=["0"]))
