"""GPTQ bases against auto-gptq's own layers, peft on a fresh copy of the same base, and the mathematics."""

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
import transformers
from bases import llama
from binding import check_bound
from cases import trained
from compiled import one_graph
from oracle import distance, file_of, furthest, gradients, loaded, loss, quiet_peft
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap

import peftfn as pf
from peftfn.weights import codecs
from peftfn.weights.codecs import packed_linear as product

pytest.importorskip("auto_gptq", reason="auto-gptq has an environment of its own: make test-gptq")

# Both unpack the same weights and multiply in the same order; sums of gradients are taken in another.
SAME = 1e-6
# A whole model, whose gradients pass through a dozen such sums; 1.8e-6 was measured.
MODEL = 4e-6
# A layer of 96 inputs in float16, whose products are rounded by 2^-11.
HALF = 2e-3

KINDS = [
    {"bits": bits, "group_size": size, "sym": sym, "desc_act": order}
    for bits, size, sym, order in itertools.product((2, 3, 4, 8), (-1, 32), (False, True), (False, True))
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
SOME = [KINDS[number] for number in (1, 8, 18, 23, 28)]
some_kinds = pytest.mark.parametrize("kind", SOME, ids=lambda kind: "-".join(map(str, kind.values())))
LORA = pf.LoraConfig(r=4, target_modules=["0", "2"])


def layer_of(kind: dict[str, Any], dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    torch.manual_seed(0)
    return quantized.gptq(nn.Linear(96, 64, bias=bias).to(dtype), **kind).eval()


def model_of(kind: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    layers = [quantized.gptq(nn.Linear(*sizes), **kind) for sizes in ((64, 96), (96, 32))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def dense_of(model: nn.Module) -> nn.Module:
    """Plain layers that hold what auto-gptq's own layers compute of the identity."""
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    with torch.no_grad():
        for ours, theirs in ((plain[0], model[0]), (plain[2], model[2])):  # type: ignore[index]
            ours.bias.copy_(theirs.bias)
            alone = copy.deepcopy(theirs)
            alone.bias = None
            ours.weight.copy_(alone(torch.eye(ours.in_features)).T)
    return plain


def adapter_of(model: nn.Module, seed: int = 0) -> pf.Adapter:
    return trained(pf.init(model, LORA), seed, size=0.05)


def value(model: nn.Module, adapter: pf.Adapter, x: Tensor) -> Any:
    return lambda params: pf.apply(model, adapter.replace(params=params), x).square().mean()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=SAME)


@every_kind
def test_output_is_the_layer_s_own_bit_for_bit_and_nothing_of_it_changes(kind: dict[str, Any]) -> None:
    model, x = nn.Sequential(layer_of(kind)), torch.randn(4, 3, 96)
    before = snapshot(model)
    ours = pf.apply(model, (), x)
    assert snapshot(model) == before
    assert ours.equal(model(x))
    assert pf.apply(model, (), x[0, 0]).equal(model(x[0, 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_is_computed_in_as_auto_gptq_does(dtype: torch.dtype) -> None:
    for kind in SOME:
        model, x = nn.Sequential(layer_of(kind, dtype)), torch.randn(4, 96).to(dtype)
        assert pf.apply(model, (), x).equal(model(x))
        wide = pf.apply(model, (), x.float())  # which auto-gptq refuses on a CPU
        assert wide.dtype == torch.float32
        assert distance(wide, model(x)) < (HALF if dtype == torch.float16 else 8 * HALF)


def test_autocast_is_the_layer_s_own() -> None:
    model, x = nn.Sequential(layer_of(KINDS[0])), torch.randn(4, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = pf.apply(model, (), x), model(x)
    assert ours.dtype == theirs.dtype
    assert ours.equal(theirs)


@pytest.mark.parametrize("kernel", ["cuda", "cuda-old"])
def test_a_zero_point_that_was_stored_as_all_ones_is_what_the_kernel_takes_it_for(kernel: str) -> None:
    for bits in (2, 3, 4, 8):
        layer = layer_of({"bits": bits, "desc_act": kernel == "cuda"})
        assert kernel == layer.QUANT_TYPE
        layer.qzeros.fill_(-1)
        model, x = nn.Sequential(layer), torch.randn(4, 96)
        assert pf.apply(model, (), x).equal(model(x))


# --- transforms ------------------------------------------------------------------------------------------------------


@some_kinds
def test_transforms_are_those_of_plain_layers_with_the_same_weights(kind: dict[str, Any]) -> None:
    model, x = model_of(kind), torch.randn(4, 3, 64)
    plain, adapter = dense_of(model), adapter_of(model)
    twice = lambda f: lambda p: sum(t.square().sum() for t in torch_pytree.tree_leaves(grad(f)(p)))  # noqa: E731
    for transform in (grad, lambda f: lambda p: jvp(f, (p,), (p,))[1], lambda f: grad(twice(f))):
        ours, theirs = (transform(value(base, adapter, x))(adapter.params) for base in (model, plain))
        close(ours, theirs)
    ours, theirs = (jacrev(lambda x, base=base: pf.apply(base, adapter, x).sum(0))(x) for base in (model, plain))
    close(ours, theirs)
    stacked = pf.stack([adapter, adapter_of(model, 1)])
    ours, theirs = (
        vmap(grad(lambda p, a, base=base: value(base, a, x)(p)))(stacked.params, stacked) for base in (model, plain)
    )
    close(ours, theirs)


@some_kinds
def test_a_mapped_axis_is_folded_into_rows(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = quantized.products(monkeypatch)
    model, x = model_of(kind), torch.randn(4, 3, 64)
    stacked = pf.stack([adapter_of(model, seed) for seed in range(3)])
    vmap(grad(lambda p, a: value(model, a, x)(p)))(stacked.params, stacked)
    assert made == ["kernel", "kernel", "gradient"]


@some_kinds
def test_weights_are_unpacked_in_blocks(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(kind), torch.randn(4, 96)
    model = nn.Sequential(layer)
    results = lambda: (  # noqa: E731  # twice
        pf.apply(model, (), x),
        grad(lambda x: pf.apply(model, (), x).square().sum())(x),
        jvp(lambda x: pf.apply(model, (), x), (x,), (x,))[1],
    )
    whole, weight = results(), codecs.of(layer).read(layer, "weight")
    monkeypatch.setattr(product, "_BLOCK", 100)
    close(results(), whole)
    assert codecs.of(layer).read(layer, "weight").equal(weight)


@one_graph
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13's compiler does so
@some_kinds
def test_compiled_whole(kind: dict[str, Any]) -> None:
    model, x = model_of(kind), torch.randn(4, 3, 64)
    adapter = adapter_of(model)
    forward = lambda params, x: pf.apply(model, adapter.replace(params=params), x)  # noqa: E731  # as it is compiled
    gradient = lambda params, x: grad(value(model, adapter, x))(params)  # noqa: E731
    for function in (forward, gradient):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        close(compiled(adapter.params, x), function(adapter.params, x))


@pytest.mark.parametrize("reentrant", [False, True], ids=["recomputed", "reentrant"])
def test_activation_checkpointing(reentrant: bool) -> None:
    quantized.check_checkpointing("gptq", reentrant)


def test_nothing_of_the_weight_s_size_is_saved_or_copied_in_training() -> None:
    model, x = model_of(KINDS[0]).train(), torch.randn(4, 3, 64)
    adapter = adapter_of(model)
    pf.leaves(adapter)
    own = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        pf.apply(model, adapter, x).sum().backward()
    others = [one.numel() for one in saved if one.untyped_storage().data_ptr() not in own]
    assert len(others) < len(saved), "what is saved of a packed weight is the base's own"
    assert max(others) < 64 * 96 / 4


# --- peft ------------------------------------------------------------------------------------------------------------

METHODS = {
    "lora": pf.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "adalora": pf.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}  # peft's IA3 knows no GPTQ


def base_of(kind: dict[str, Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96}
    model = llama(**sizes)().to(dtype)
    base: Any = quantized.packed(model, "gptq", **kind).eval()
    base.quantization_method = "gptq"  # what transformers sets, and peft asks for
    base.config.quantization_config = transformers.GPTQConfig(**kind, use_exllama=False)
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [KINDS[16], KINDS[21], KINDS[14]], ids=["4", "4 sorted in groups", "3 symmetric"])
def test_outputs_and_gradients_are_peft_s(
    kind: dict[str, Any], method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, batch = base_of(kind, dtype), {"input_ids": torch.randint(0, 32, (3, 7))}
    rounding = MODEL if dtype == torch.float32 else 2 * HALF  # a whole model of such layers
    adapter = trained(pf.init(base, METHODS[method]), size=0.1)
    theirs: Any = loaded(base_of(kind, dtype), pf.save(adapter, tmp_path))
    assert sum(type(one).__module__.endswith(".gptq") for one in theirs.modules()) == len(adapter.params)
    assert distance(pf.apply(base, adapter, batch).logits, theirs(**batch).logits) < rounding
    names = {n: p for n, p in theirs.named_parameters() if p.requires_grad and ".ranknum." not in n}
    grads = torch.autograd.grad(loss(theirs(**batch)), list(names.values()))
    expected = file_of(theirs, dict(zip(names, grads, strict=True)))
    ours = gradients(base, adapter, batch)
    assert furthest(ours, {key: expected[key] for key in ours}) < rounding


# --- merging ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("by", ["state dict", "model"])
def test_merged_weights_are_what_a_plain_layer_needs(kind: dict[str, Any], by: str) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    adapter = adapter_of(model)
    merged = pf.merge(model.state_dict() if by == "state dict" else {}, adapter, model=model)
    assert "0.weight" in merged and not any("q" in name for name in merged)
    weights = {name: merged.get(name, dict(model.named_buffers()).get(name)) for name in ("0.weight", "2.weight")}
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("bias")}
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    close(torch.func.functional_call(plain, {**weights, **biases}, x), pf.apply(model, adapter, x))
    close(pf.apply(model, (), x, params=merged), pf.apply(model, adapter, x))


@every_kind
def test_merged_weights_can_be_packed_again_in_the_same_format(kind: dict[str, Any]) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    adapter, state = adapter_of(model), model.state_dict()
    dense, again = (pf.merge(state, adapter, model=model, requantize=how) for how in (False, True))
    assert sorted(again) == sorted(state)
    assert all((again[key].dtype, again[key].shape) == (state[key].dtype, state[key].shape) for key in state)
    nothing = trained(pf.init(model, LORA), size=0.0)
    read = pf.merge(again, nothing, model=model)
    for path in ("0", "2"):
        scales = again[f"{path}.scales"][again[f"{path}.g_idx"].long()].T  # (out, in)
        assert ((read[f"{path}.weight"] - dense[f"{path}.weight"]).abs() <= 0.501 * scales).all(), "half a step"
    if kind["sym"]:
        assert again["0.qzeros"].equal(state["0.qzeros"])
    with torch.no_grad():
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(again)
        close(fresh(x), torch.func.functional_call(dense_of(fresh), {}, x))
    close(pf.apply(model, (), x, params=again), fresh(x))


@every_kind
def test_what_no_adapter_changed_is_packed_again_bit_for_bit(kind: dict[str, Any]) -> None:
    model = model_of(kind)
    state = model.state_dict()
    again = pf.merge(state, trained(pf.init(model, LORA), size=0.0), model=model, requantize=True)
    read = lambda tensors: pf.merge(tensors, trained(pf.init(model, LORA), size=0.0), model=model)  # noqa: E731
    assert read(again)["0.weight"].equal(read(state)["0.weight"])
    assert all(again[key].equal(state[key]) for key in state)


def test_entries_alone_say_how_zero_points_are_stored_where_all_are_the_middle() -> None:
    symmetric, other = model_of(KINDS[18]), model_of(KINDS[16])
    adapter = adapter_of(symmetric)
    state = symmetric.state_dict()
    merged = pf.merge(state, adapter)
    assert merged["0.weight"].equal(pf.merge(state, adapter, model=symmetric)["0.weight"])
    newer = {name: tensor + 0x11111111 if name.endswith("qzeros") else tensor for name, tensor in state.items()}
    assert pf.merge(newer, adapter)["0.weight"].equal(merged["0.weight"]), "version 2"
    with pytest.raises(ValueError, match=r"0\.weight: its zero points are not all alike.*model="):
        pf.merge(other.state_dict(), adapter)


def test_a_packed_head_is_trained_dense_and_merged(tmp_path: Path) -> None:
    model, x = model_of(KINDS[16]), torch.randn(4, 64)
    config = pf.LoraConfig(r=4, target_modules=["0"], modules_to_save=["2"], bias="lora_only")
    adapter = trained(pf.init(model, config), size=0.05)
    assert {name: tuple(one.shape) for name, one in adapter.params["2"].items()} == {"bias": (32,), "weight": (32, 96)}
    assert sorted(adapter.params["0"]) == ["bias", "lora_A", "lora_B"], "its bias is trained though it is a buffer"
    again = pf.load(pf.save(adapter, tmp_path), model)
    close(pf.apply(model, again, x), pf.apply(model, adapter, x))
    merged = pf.merge(model.state_dict(), adapter, model=model)
    plain = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32))
    close(torch.func.functional_call(plain, merged, x), pf.apply(model, adapter, x))
    gradient = grad(lambda a: pf.apply(model, a, x).square().mean())(adapter).params
    assert all(quantized.largest(one) > 0 for leaf in gradient.values() for one in leaf.values())


@some_kinds
def test_a_bound_model_trains_is_saved_and_leaves_the_base(kind: dict[str, Any]) -> None:
    model, x = model_of(kind), torch.randn(4, 64)
    adapter = adapter_of(model)
    bound = pf.bind(model, adapter)
    assert bound[0].qweight is model[0].qweight, "packed weights are shared"  # type: ignore[index]
    check_bound(model, adapter, x)


# --- a model that transformers loads ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:optimum", "ignore::FutureWarning:optimum")
def test_a_model_that_transformers_loads_runs_merges_and_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("optimum.gptq", reason="transformers loads GPTQ with optimum")
    kind = {"bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    made = base_of(kind, torch.float16)
    made.save_pretrained(tmp_path / "packed")
    load = lambda folder: transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu", dtype="auto")  # noqa: E731
    base, batch = load(tmp_path / "packed"), {"input_ids": torch.randint(0, 32, (3, 7))}
    assert type(base.model.layers[0].mlp.up_proj) is type(made.model.layers[0].mlp.up_proj)
    before = snapshot(base)
    assert pf.apply(base, (), batch).logits.equal(copy.deepcopy(base)(**batch).logits)
    adapter = trained(pf.init(base, METHODS["lora"]), size=0.05)
    ours = pf.apply(base, adapter, batch).logits
    merged = pf.merge(base.state_dict(), adapter, requantize=True)
    bound = pf.bind(base, adapter)
    assert bound(**batch).logits.equal(ours)
    bound.save_pretrained(tmp_path / "merged", merge=True, requantize=True)
    assert snapshot(base) == before
    again = load(tmp_path / "merged").state_dict()
    assert all(again[name].equal(merged[name]) for name in merged)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoilt", "said"),
    {
        "qweight": r"QuantLinear: qweight \(11, 64\).* do not fit together; expected",
        "qzeros": r"qzeros \(2, 8\).* do not fit together; expected",
        "scales": r"scales \(2, 64\).* do not fit together; expected",
        "g_idx": r"g_idx has groups from 0 to 7, and there are 3",
    }.items(),
)
def test_tensors_that_do_not_fit_are_one_clear_error(spoilt: str, said: str) -> None:
    model = nn.Sequential(layer_of({"bits": 4, "desc_act": True}))
    adapter = trained(pf.init(model, pf.LoraConfig(r=4, target_modules=["0"])))
    if spoilt == "g_idx":
        model[0].g_idx[5] = 7
    else:
        setattr(model[0], spoilt, getattr(model[0], spoilt)[:-1])
    with pytest.raises(ValueError, match=said):
        pf.apply(model, adapter, torch.randn(4, 96))
    with pytest.raises(ValueError, match=said.removeprefix("QuantLinear")):
        pf.merge(model.state_dict(), adapter, model=model)


def test_spoilt_scales_and_missing_entries_are_refused_by_merge() -> None:
    model = model_of(KINDS[18])
    adapter, state = adapter_of(model), model.state_dict()
    with pytest.raises(ValueError, match=r"0\.weight: there is a 0\.qweight and no scales, g_idx.*state_dict"):
        pf.merge({name: one for name, one in state.items() if name not in ("0.scales", "0.g_idx")}, adapter)
    with pytest.raises(KeyError, match=r"0\.weight.*state_dict"):
        pf.merge(dict(model.named_parameters()), adapter)
    state["0.scales"] = state["0.scales"].index_fill(0, torch.tensor([0]), torch.nan)
    with pytest.raises(ValueError, match=r"0\.weight: unpacked, it has values that are NaN or infinite"):
        pf.merge(state, adapter)


def test_a_kernel_with_an_order_of_its_own_is_refused() -> None:
    """The class is auto-gptq's; it asks for a GPU when it is made, so it is made without its own constructor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from auto_gptq.nn_modules.qlinear import qlinear_marlin

    layer: Any = object.__new__(qlinear_marlin.QuantLinear)
    nn.Module.__init__(layer)
    layer.register_buffer("B", torch.zeros(8, 512, dtype=torch.int32))
    with pytest.raises(ValueError, match="auto_gptq's QuantLinear of kernel 'marlin' holds its weight in an order of"):
        pf.init(nn.Sequential(layer), pf.LoraConfig(target_modules=["0"]))


def test_sorted_exllama_layers_are_refused_once_they_have_sorted() -> None:
    from auto_gptq.nn_modules.qlinear import qlinear_exllama

    layer = qlinear_exllama.QuantLinear(4, 32, 64, 96, bias=False)
    model, config = nn.Sequential(layer), pf.LoraConfig(target_modules=["0"])
    pf.init(model, config)
    layer._use_act_order = True  # what auto-gptq sets before its kernel sorts them, in place
    with pytest.raises(
        ValueError, match=r"kernel 'exllama' \(_use_act_order\) holds its weight in an order of its own"
    ):
        pf.init(model, config)


def test_a_method_that_peft_has_not_for_gptq_works_too() -> None:
    """(IA)³: against plain layers with the same weights."""
    model, x = model_of(KINDS[16]), torch.randn(4, 64)
    adapter = trained(pf.init(model, pf.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"])))
    close(pf.apply(model, adapter, x), pf.apply(dense_of(model), adapter, x))
    with quiet_peft():
        import peft

        with pytest.raises(ValueError, match="not supported"):
            peft.get_peft_model(copy.deepcopy(model), peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
