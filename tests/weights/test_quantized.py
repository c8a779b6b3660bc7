"""Quantized bases: against bitsandbytes and peft on a fresh copy of the same base, merging, purity and bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import quantized
import torch
import transformers
from bases import llama
from binding import check_bound
from cases import trained
from oracle import distance, file_of, furthest, gradients, loaded, loss, quiet_peft
from quantized import eight_bit, four_bit, packed
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf

# Both multiply with the same weights in the same order.
SAME = 1e-6
# Sums of gradients are taken in another order; 1.8e-6 was measured.
SUMS = 3e-6
# A whole model in float16 rounds by 2^-11 at each of some thirty operations; 1.8e-3 was measured.
HALF = 4e-3

FOUR = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "single": {"compress_statistics": False},
    "compute bfloat16": {"compute_dtype": torch.bfloat16},
    "compute float16": {"compute_dtype": torch.float16},
    "storage bfloat16": {"quant_storage": torch.bfloat16},
    "storage float32": {"quant_storage": torch.float32},
}
REPACKS = bitsandbytes.functional.has_avx512bf16()
EIGHT = {"8-bit": {}, "outliers": {"threshold": 6.0}}
EVERY = {**FOUR, **EIGHT}
# Half the widest gap between two of the format's values, over the largest; 8 bits are made from float16.
STEP = {False: 0.17, True: 1 / 254 + 2**-11}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = True) -> Any:
    torch.manual_seed(seed)
    plain = nn.Linear(128, 64, bias=bias).to(dtype)
    return (eight_bit if name in EIGHT else four_bit)(plain, **EVERY[name]).eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(4, 3, 128)
    x[1, 2, 5] = 20.0  # an outlier
    return x.to(dtype)


def adapted(model: nn.Module) -> pf.Adapter:
    return trained(pf.init(model, pf.LoraConfig(r=4, target_modules=["0"])), size=0.05)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_output_is_the_layer_s_own_bit_for_bit_and_nothing_of_it_changes(
    name: str, dtype: torch.dtype, train: bool
) -> None:
    model, x = nn.Sequential(layer_of(name).train(train)), inputs(dtype)
    fresh = copy.deepcopy(model)
    before = snapshot(model)
    ours = pf.apply(model, (), x)
    torch.func.grad(lambda a: pf.apply(model, a, x).float().square().mean())(adapted(model))
    assert snapshot(model) == before
    theirs = fresh(x)
    assert ours.dtype == theirs.dtype
    assert ours.equal(theirs)
    assert model(x).equal(theirs), "the base runs as before"
    after = snapshot(model)
    assert pf.apply(model, (), x).equal(theirs), "and is read where its own forward has put things"
    assert snapshot(model) == after


@pytest.mark.parametrize("name", EVERY)
def test_autocast_is_the_layer_s_own(name: str) -> None:
    model, x = nn.Sequential(layer_of(name)), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = pf.apply(model, (), x), copy.deepcopy(model)(x)
        assert ours.dtype == theirs.dtype
        assert ours.equal(theirs)
        gradient = torch.func.grad(lambda x: pf.apply(model, (), x).float().square().sum())(x)
    assert gradient.dtype == x.dtype


BASES = {
    "nf4": ("nf4", torch.float32, SAME),
    "fp4": ("fp4", torch.float32, SAME),
    "8-bit": ("8-bit", torch.float32, SAME),
    "nf4 from float16": ("nf4", torch.float16, HALF),
}


def base_of(kind: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 128}
    base: Any = packed(llama(**sizes)().to(dtype), kind, **options).eval()
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "8-bit", kind != "8-bit"  # peft asks
    return base


METHODS = {
    "lora": pf.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "ia3": pf.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "adalora": pf.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


# peft's IA3 makes what a packed layer in float16 puts out float32, and attention refuses it.
PAIRS = [(name, method) for name in BASES for method in METHODS if (name, method) != ("nf4 from float16", "ia3")]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_outputs_and_gradients_are_peft_s(name: str, method: str, train: bool, tmp_path: Path) -> None:
    kind, dtype, rounding = BASES[name]
    base, batch = base_of(kind, dtype).train(train), {"input_ids": torch.randint(0, 32, (3, 7))}
    adapter = trained(pf.init(base, METHODS[method]), size=0.1)
    theirs: Any = loaded(base_of(kind, dtype), pf.save(adapter, tmp_path)).train(train)
    assert distance(pf.apply(base, adapter, batch).logits, theirs(**batch).logits) < rounding
    names = {n: p for n, p in theirs.named_parameters() if p.requires_grad and ".ranknum." not in n}
    grads = torch.autograd.grad(loss(theirs(**batch)), list(names.values()))
    expected = file_of(theirs, dict(zip(names, grads, strict=True)))
    ours = gradients(base, adapter, batch)
    assert furthest(ours, {key: expected[key] for key in ours}) < max(rounding, SUMS)


@pytest.mark.parametrize("kind", ["nf4", "8-bit"])
def test_merged_and_packed_again_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    base = base_of(kind, torch.float32)
    adapter = trained(pf.init(base, METHODS["lora"]), size=0.1)
    with quiet_peft():
        theirs = loaded(base_of(kind, torch.float32), pf.save(adapter, tmp_path)).merge_and_unload().state_dict()
    ours = pf.merge(base.state_dict(), adapter, requantize=True)
    assert sorted(ours) == sorted(base.state_dict())
    there = [key for key in ours if key in theirs and ours[key].dtype in (torch.int8, torch.uint8)]
    unlike = sum(int((ours[key] != theirs[key]).sum()) for key in there if ours[key].shape == theirs[key].shape)
    # A value that is just between two of the format's may be rounded either way.
    assert unlike < 1e-3 * sum(ours[key].numel() for key in there)


@pytest.mark.parametrize("name", EVERY)
def test_merging_before_and_after_the_base_has_run_is_the_same(name: str) -> None:
    model, x = nn.Sequential(layer_of(name)), inputs()
    adapter = adapted(model)
    before = [pf.merge(params, adapter)["0.weight"] for params in (dict(model.named_parameters()), model.state_dict())]
    model(x)
    named = dict(model.named_parameters())
    after = [pf.merge(named, adapter, model=model)["0.weight"], pf.merge(model.state_dict(), adapter)["0.weight"]]
    assert all(one.equal(before[0]) for one in (*before, *after))
    assert before[0].dtype == torch.float32 and before[0].shape == (64, 128)
    leaf, scaling = adapter.params["0"], adapter.buffers["0"]["scaling"]
    unpacked = (pf.merge(named, adapter, model=model)["0.weight"] - scaling * leaf["lora_B"] @ leaf["lora_A"]).detach()
    torch.manual_seed(0)
    original = nn.Linear(128, 64).weight.detach()
    step = STEP[name in EIGHT]
    assert (unpacked - original).abs().max() < 1.05 * step * original.abs().max()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("by", ["parameters", "state dict"])
def test_merged_weights_can_be_packed_again_in_the_same_format(name: str, by: str) -> None:
    model, x = nn.Sequential(layer_of(name)), inputs()
    adapter = adapted(model)
    params = dict(model.named_parameters()) if by == "parameters" else model.state_dict()
    dense, again = pf.merge(params, adapter), pf.merge(params, adapter, requantize=True)
    assert sorted(again) == sorted(params)
    assert all(again[key].dtype == params[key].dtype for key in params)
    numbers = [key for key in params if "bitsandbytes__" not in key]  # that one is JSON, as long as its digits
    assert all(again[key].shape == params[key].shape for key in numbers)
    nothing = trained(pf.init(model, pf.LoraConfig(r=4, target_modules=["0"])), size=0.0)
    read = pf.merge(again, nothing)["0.weight"]
    step = STEP[name in EIGHT]
    assert (read - dense["0.weight"]).abs().max() < 1.05 * step * dense["0.weight"].abs().max()
    if by == "parameters":
        model(x)  # what was moved into its modules is the old weight's
        expected = nn.functional.linear(x, read, params["0.bias"].float())
        close = 0.05 if name in EIGHT else (0.01 if "compute" in name else SAME)
        assert distance(pf.apply(model, (), x, params=again), expected) < close


def test_merged_weights_fit_a_model_of_plain_layers() -> None:
    model, x = nn.Sequential(layer_of("nf4")), inputs()
    adapter = adapted(model)
    merged = pf.merge(model.state_dict(), adapter)
    plain = nn.Sequential(nn.Linear(128, 64))
    assert distance(torch.func.functional_call(plain, merged, x), pf.apply(model, adapter, x)) < SAME


def test_bytes_that_bitsandbytes_repacked_for_another_cpu_are_read() -> None:
    """Its own function, which its forward calls where the CPU has AVX512-BF16; absmax is rounded to bfloat16 there."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as repack

    for name in ("nf4", "fp4", "single", "storage bfloat16"):
        torch.manual_seed(0)
        options = EVERY[name]
        model = nn.Sequential(four_bit(nn.Linear(128, 64), **options))
        adapter, nothing, x = adapted(model), pf.init(model, pf.LoraConfig(target_modules=["0"])), torch.randn(2, 128)
        before = pf.merge(model.state_dict(), adapter)["0.weight"]
        weight = model[0].weight
        weight.data, weight.quant_state = repack(weight.data, weight.quant_state)
        seen = snapshot(model)
        after = pf.merge(dict(model.named_parameters()), adapter)["0.weight"]
        assert after.dtype == before.dtype
        assert distance(after, before) < 2**-8
        expected = nn.functional.linear(x, pf.merge(dict(model.named_parameters()), nothing)["0.weight"], model[0].bias)
        assert distance(pf.apply(model, (), x), expected) < SAME
        assert snapshot(model) == seen


@pytest.mark.parametrize("sizes", [(96, 64), (40, 50), (25, 6), (25, 3), (128, 64)], ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_is_code_times_absmax_also_where_a_block_goes_on_in_the_next_row(
    quant_type: str, blocksize: int, sizes: tuple[int, int]
) -> None:
    """Against the formula: bitsandbytes' own kernel is wrong there on CPUs with AVX512, by as much as the weight."""
    torch.manual_seed(0)
    layer: Any = bitsandbytes.nn.Linear4bit(*sizes, quant_type=quant_type, compress_statistics=False)
    layer.weight.blocksize = blocksize
    model = nn.Sequential(layer.to("cpu"))
    state, packed_bytes = layer.weight.quant_state, layer.weight.data.view(-1)
    nibbles = torch.stack([packed_bytes >> 4, packed_bytes & 15], 1).view(-1)[: sizes[0] * sizes[1]].long()
    absmax = state.absmax.repeat_interleave(blocksize)[: len(nibbles)]
    expected = (state.code[nibbles] * absmax).view(sizes[1], sizes[0])
    nothing = pf.init(model, pf.LoraConfig(target_modules=["0"]))
    assert pf.merge(dict(model.named_parameters()), nothing)["0.weight"].equal(expected)
    x = torch.randn(3, sizes[0])
    assert distance(pf.apply(model, (), x), nn.functional.linear(x, expected, layer.bias)) < SAME


@pytest.mark.skipif(not REPACKS, reason="only CPUs with AVX512-BF16 repack")
@pytest.mark.parametrize("name", FOUR)
def test_where_the_base_s_own_forward_computes_in_bfloat16_its_output_is_ours_rounded(name: str) -> None:
    layer = layer_of(name)
    layer.support_avx512bf16_for_cpu = True
    model, x = nn.Sequential(layer), inputs()
    before = snapshot(model)
    ours = pf.apply(model, (), x)
    assert snapshot(model) == before, "nothing of it is repacked by us"
    theirs = model(x)
    assert layer.weight.quant_state.packing_format_for_cpu, "but it is by its own forward"
    rounded = 3 * 2**-8  # inputs, scales and sums, half a unit of bfloat16 each and more where they add up
    assert 0 < distance(ours, theirs) < rounded
    after = snapshot(model)
    assert distance(pf.apply(model, (), x), theirs) < rounded
    assert snapshot(model) == after


def test_a_weight_that_is_rounded_at_each_call_is_the_layer_s_own() -> None:
    layer = eight_bit(nn.Linear(128, 64), has_fp16_weights=True).train()
    model, x = nn.Sequential(layer), inputs()
    before = snapshot(model)
    ours = pf.apply(model, (), x)
    assert snapshot(model) == before
    assert not ours.requires_grad
    assert distance(ours, copy.deepcopy(model)(x)) < SAME
    bound = pf.bind(model, adapted(model))
    assert sorted(n for n, p in bound.named_parameters() if p.requires_grad) == ["0.lora_A", "0.lora_B"]


@pytest.mark.parametrize("name", EVERY)
def test_a_bound_model_trains_runs_and_leaves_the_base(name: str) -> None:
    model, x = nn.Sequential(layer_of(name), nn.Tanh(), nn.Linear(64, 4)), inputs()
    check_bound(model, adapted(model), x)


@pytest.mark.parametrize("kind", ["4-bit", "4-bit whole", "8-bit"])
def test_packed_embeddings(kind: str) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(20, 64 if kind == "4-bit" else 48)
    sizes = (plain.num_embeddings, plain.embedding_dim)
    layer: Any = bitsandbytes.nn.Embedding8bit(*sizes) if kind == "8-bit" else bitsandbytes.nn.EmbeddingNF4(*sizes)
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer.to("cpu"), nn.Linear(sizes[1], 3))
    ids = torch.randint(0, 20, (4, 6))
    adapter = trained(pf.init(model, pf.LoraConfig(r=4, target_modules=["0"])))
    before = snapshot(model)
    if kind != "4-bit whole":  # where bitsandbytes' own is wrong on CPUs with AVX512
        torch.testing.assert_close(pf.apply(model, (), ids), copy.deepcopy(model)(ids), rtol=0, atol=0)
    merged = pf.merge(dict(model.named_parameters()), adapter)
    ours = pf.apply(model, adapter, ids)
    dense = nn.Sequential(plain, model[1])
    torch.testing.assert_close(torch.func.functional_call(dense, merged, ids), ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pf.apply(model, (), ids, params=merged), ours, rtol=1e-5, atol=1e-5)
    rows = torch.vmap(lambda one: pf.apply(model, adapter, one))(ids)
    torch.testing.assert_close(rows, ours, rtol=1e-5, atol=1e-5)
    assert snapshot(model) == before


def test_a_head_that_was_packed_is_trained_dense() -> None:
    model, x = nn.Sequential(layer_of("nf4"), nn.Tanh(), four_bit(nn.Linear(64, 4))), inputs()
    adapter = pf.init(model, pf.LoraConfig(r=4, target_modules=["0"], modules_to_save=["2"]))
    assert adapter.params["2"]["weight"].shape == (4, 64)
    gradient = torch.func.grad(lambda a: pf.apply(model, a, x).square().mean())(adapter)
    assert quantized.largest(gradient.params["2"]["weight"]) > 0


# --- bad input -------------------------------------------------------------------------------------------------------


def corrupted(what: str) -> nn.Module:
    layer = layer_of("8-bit" if what == "SCB" else "single")
    if what == "SCB":
        layer.weight.SCB = layer.weight.SCB[:-1]
    elif what == "bytes":
        layer.weight.data = layer.weight.data[:-10]
    elif what == "absmax":
        layer.weight.quant_state.absmax = layer.weight.quant_state.absmax[:-1]
    elif what == "type":
        layer.weight.quant_state.quant_type = "nf5"
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("what", "said"),
    {
        "SCB": r"Linear8bitLt: \(63,\) scales \(SCB\) do not fit a weight of shape \(64, 128\)",
        "bytes": "Linear4bit: the quant state does not fit the weight: 4086 bytes for 64 × 128 values of 4 bits",
        "absmax": "127 absmax for 64 × 128 values in blocks of 64",
        "type": "quant_type 'nf5', expected 'nf4' or 'fp4'",
    }.items(),
)
def test_a_corrupt_quant_state_is_said(what: str, said: str) -> None:
    model = corrupted(what)
    adapter = adapted(nn.Sequential(layer_of("nf4")))
    with pytest.raises(ValueError, match=said):
        pf.apply(model, adapter, inputs())
    with pytest.raises(ValueError, match=said.removeprefix("Linear4bit").removeprefix("Linear8bitLt")):
        pf.merge(dict(model.named_parameters()), adapter)


def test_scales_that_are_not_finite_are_refused_by_merge() -> None:
    model = nn.Sequential(layer_of("single"))
    model[0].weight.quant_state.absmax[3] = torch.nan
    with pytest.raises(ValueError, match=r"0\.weight: unpacked, it has values that are NaN or infinite"):
        pf.merge(dict(model.named_parameters()), adapted(model))


def test_packed_weights_without_what_they_are_read_by_are_refused() -> None:
    four, eight = nn.Sequential(layer_of("nf4")), nn.Sequential(layer_of("8-bit"))
    adapter = adapted(four)
    for model in (four, eight):
        model(inputs())
        with pytest.raises(ValueError, match=r"state_dict\(\)"):
            pf.merge({"0.weight": model[0].weight.data, "0.bias": model[0].bias}, adapter)
    state = four.state_dict()
    del state["0.weight.absmax"]
    with pytest.raises(ValueError, match=r"0\.weight: the entries of its quant state .* cannot be read"):
        pf.merge(state, adapter)


def test_a_layer_that_is_not_quantized_yet_is_said() -> None:
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(128, 64))
    adapter = adapted(nn.Sequential(layer_of("nf4")))
    with pytest.raises(ValueError, match="is not quantized yet: move the model to its device"):
        pf.apply(model, adapter, inputs())


# --- models that transformers loads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "8-bit"])
def test_a_model_that_transformers_quantizes_runs_merges_and_is_saved(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama(vocab_size=64, hidden_size=64, intermediate_size=64)().save_pretrained(tmp_path / "plain")
    options: dict[str, Any] = {"load_in_8bit": True} if kind == "8-bit" else {"load_in_4bit": True}
    options |= {} if kind == "8-bit" else {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = transformers.BitsAndBytesConfig(**options)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    batch = {"input_ids": torch.randint(0, 64, (3, 7))}
    adapter = trained(pf.init(base, METHODS["lora"]), size=0.05)
    before = snapshot(base)
    ours = pf.apply(base, adapter, batch).logits
    bound = pf.bind(base, adapter)
    assert bound(**batch).logits.equal(ours)
    assert pf.apply(base, (), batch).logits.equal(copy.deepcopy(base)(**batch).logits)
    merged = pf.merge(base.state_dict(), adapter, requantize=True)
    bound.save_pretrained(tmp_path / "merged", merge=True, requantize=True)
    assert snapshot(base) == before
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    state = again.state_dict()
    assert all(state[name].equal(merged[name]) for name in merged if name.endswith("q_proj.weight"))
    # The sum of weight and update is rounded to the format once more.
    assert distance(again(**batch).logits, ours) < (0.3 if kind == "nf4" else 0.06)
