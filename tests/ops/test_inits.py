"""Inits that read the base: PiSSA and OLoRA against peft; LoftQ, which in peft needs a GPU, against its algorithm."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import oracle
import pytest
import quantized
import torch
from bases import llama, minilm
from cases import trained
from peft.utils import loftq_utils
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftfn as pf

# A weight taken apart and put together again in float32.
SAME = {"rtol": 1e-5, "atol": 2e-6}
FUNCTIONS: dict[str, Any] = {"pissa": pf.pissa, "olora": pf.olora}


def config(library: Any = pf, **options: Any) -> Any:
    return library.LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": ["0", "2"], **options})


def model_of(conv: bool = False) -> nn.Module:
    torch.manual_seed(0)
    second = Conv1D(64, 96) if conv else nn.Linear(96, 64)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), second)


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, **SAME)


def error(weight: Tensor, params: Any, adapter: pf.Adapter, name: str) -> float:
    return float((pf.merge(params, adapter)[name] - weight).norm())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_factors_and_weights_are_peft_s_and_the_base_is_as_it_was(name: str, rslora: bool) -> None:
    model = model_of()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter, params = FUNCTIONS[name](model, config(use_rslora=rslora))
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    theirs = oracle.made(model, {**vars_of(), "init_lora_weights": name, "use_rslora": rslora})
    for path in ("0", "2"):
        layer = theirs.base_model.model[int(path)]
        close(adapter.params[path]["lora_A"], layer.lora_A["default"].weight.detach())
        close(adapter.params[path]["lora_B"], layer.lora_B["default"].weight.detach())
        close(params[f"{path}.weight"], layer.base_layer.weight)
    assert params["0.bias"] is dict(model.named_parameters())["0.bias"]


def vars_of() -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 10, "target_modules": ["0", "2"]}


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "stored (in, out)"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_start_computes_what_the_base_does(name: str, conv: bool) -> None:
    model, x = model_of(conv), torch.randn(3, 64)
    adapter, params = FUNCTIONS[name](model, config(rank_pattern={"0": 3}))
    close(pf.apply(model, adapter, x, params=params), model(x))
    assert adapter.config.init_lora_weights is True
    assert not torch.allclose(pf.apply(model, (), x, params=params), model(x), atol=1e-2)


def test_what_was_trained_is_an_adapter_of_twice_the_rank_for_the_unchanged_base() -> None:
    model, x = model_of(), torch.randn(3, 64)
    started, params = pf.pissa(model, config())
    after = trained(started, size=0.1)
    plain = pf.combine([after, started], [1.0, -1.0], method="cat")
    assert plain.params["0"]["lora_A"].shape == (8, 64)
    close(pf.apply(model, plain, x), pf.apply(model, after, x, params=params))


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_its_algorithm_written_out(bits: int) -> None:
    """With peft's own decomposition and bitsandbytes' own kernels, which peft asks a GPU for."""
    model = model_of()
    weight = model[0].weight.detach()  # type: ignore[index]
    residual = weight.clone()
    for _ in range(3):
        if bits == 4:
            made: Any = bitsandbytes.nn.Params4bit(residual, False, quant_type="nf4", compress_statistics=False).to(
                "cpu"
            )
            kept = bitsandbytes.functional.dequantize_4bit(made.data, made.quant_state)
        else:
            made = bitsandbytes.nn.Int8Params(residual, requires_grad=False).to("cpu")
            kept = bitsandbytes.functional.int8_vectorwise_dequant(made.data, made.SCB)
        found = loftq_utils._low_rank_decomposition(weight - kept, reduced_rank=4)
        residual = weight - found["L"] @ found["R"]
    for alpha in (4, 10):
        adapter, params = pf.loftq(model, config(lora_alpha=alpha), bits=bits, iterations=3)
        leaf = adapter.params["0"]
        close(params["0.weight"], kept)
        close(alpha / 4 * leaf["lora_B"] @ leaf["lora_A"], found["L"] @ found["R"])
        if alpha == 4:  # as peft's, up to the sign of each singular vector
            close(leaf["lora_A"].abs(), found["R"].abs())
            close(leaf["lora_B"].abs(), found["L"].abs())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there to notice when peft's init runs on a CPU")
def test_peft_s_loftq_asks_for_a_gpu() -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        loftq_utils.loftq_init(torch.randn(64, 64), num_bits=4, reduced_rank=4)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_nearer_to_the_weights_with_each_iteration(bits: int) -> None:
    """Of real weights: the paper's algorithm promises it of none, and on small random ones it stops after a few."""
    layer = minilm().bert.encoder.layer[0].attention.self.key  # type: ignore[union-attr]
    model, weight = nn.Sequential(layer), layer.weight.detach()
    errors: list[float] = []
    for iterations in (1, 2, 4):
        adapter, params = pf.loftq(
            model, config(r=16, lora_alpha=16, target_modules=["0"]), bits=bits, iterations=iterations
        )
        errors.append(error(weight, params, adapter, "0.weight"))
        if iterations == 1:
            errors.insert(0, float((params["0.weight"] - weight).norm()))  # quantization alone
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "8-bit"])
def test_loftq_packs_a_packed_base_again_in_its_own_format(kind: str) -> None:
    plain, x = model_of(), torch.randn(5, 64)
    model = quantized.packed(model_of(), kind).eval()
    before = quantized.states(model)
    adapter, params = pf.loftq(model, config(r=16), iterations=3, weights=plain.state_dict())
    assert quantized.states(model) == before
    assert type(params["0.weight"]) is type(dict(model.named_parameters())["0.weight"])
    rounded = float((pf.merge(dict(model.named_parameters()), zero(adapter))["0.weight"] - weight_of(plain)).norm())
    assert error(weight_of(plain), params, adapter, "0.weight") < 0.9 * rounded
    ours, alone = pf.apply(model, adapter, x, params=params), pf.apply(model, (), x)
    assert (ours - plain(x)).norm() < (alone - plain(x)).norm()
    gradient = torch.func.grad(lambda a: pf.apply(model, a, x, params=params).square().mean())(adapter)
    assert all(quantized.largest(one) > 0 for one in gradient.params["0"].values())


def weight_of(model: Any) -> Tensor:
    return model[0].weight.detach()


def zero(adapter: pf.Adapter) -> pf.Adapter:
    leaves = {path: {name: 0 * t for name, t in leaf.items()} for path, leaf in adapter.params.items()}
    return adapter.replace(params=leaves)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_packed_base_is_packed_again_without_what_the_adapter_has(name: str) -> None:
    plain = model_of()
    model = quantized.packed(model_of(), "nf4").eval()
    adapter, params = FUNCTIONS[name](model, config(r=16))
    held = pf.merge(dict(model.named_parameters()), zero(adapter))["0.weight"]
    assert type(params["0.weight"]) is type(dict(model.named_parameters())["0.weight"])
    assert error(held, params, adapter, "0.weight") < 0.2 * float(weight_of(plain).norm())


def test_a_transformer_starts_from_all_of_its_linear_layers() -> None:
    torch.manual_seed(0)
    model = llama()().eval()
    batch = {"input_ids": torch.randint(0, 40, (2, 5))}
    adapter, params = pf.pissa(model, pf.LoraConfig(r=2, target_modules="all-linear"))
    assert len(adapter.params) == 14
    close(pf.apply(model, adapter, batch, params=params).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("said", "call"),
    {
        "init_lora_weights='gaussian', and this function is another init": lambda: pf.pissa(
            model_of(), config(init_lora_weights="gaussian")
        ),
        "0: r=65 is more than a weight of shape": lambda: pf.pissa(model_of(), config(r=65)),
        "iterations=0; expected 1 or more": lambda: pf.loftq(model_of(), config(), iterations=0),
        "bits=3; expected 4": lambda: pf.loftq(model_of(), config(), bits=3),
        "0 is packed already: give the dense weights": lambda: pf.loftq(quantized.packed(model_of(), "nf4"), config()),
        "0 is packed already: its own format is taken; leave bits out": lambda: pf.loftq(
            quantized.packed(model_of(), "nf4"), config(), bits=4, weights=model_of().state_dict()
        ),
        "0 is of kind 'embedding', and this init reads linear layers": lambda: pf.pissa(
            nn.Sequential(nn.Embedding(8, 8)), config(target_modules=["0"])
        ),
        "peftfn.loftq(model, config) makes it": lambda: pf.init(model_of(), config(init_lora_weights="loftq")),
        "peftfn.pissa(model, config) makes it": lambda: config(init_lora_weights="pissa"),
        "peftfn.olora(model, config) makes it": lambda: config(init_lora_weights="olora"),
    }.items(),
)
def test_what_cannot_be_started_is_said(said: str, call: Any) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the text is compared below, in which a regex would hide
        call()
    assert said in str(raised.value)


def test_a_config_of_another_method_and_weights_that_lack_one_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a LoraConfig, got a IA3Config"):
        pf.pissa(model_of(), pf.IA3Config(target_modules=["0"]))  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"weights has no '0\.weight'"):
        pf.loftq(quantized.packed(model_of(), "nf4"), config(), weights={})
