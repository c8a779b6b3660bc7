"""Quantized bases: what each kind makes of a plain model. The packages that make them run on a CPU."""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import llama
from torch import Tensor, nn

import peftfn as pf
from peftfn.weights.codecs import packed_linear as product

# bitsandbytes says at each call that it computes in float16 what it is given in float32.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def four_bit(layer: nn.Linear, quant_type: str = "nf4", **options: Any) -> nn.Module:
    """The layer in bitsandbytes' 4 bits; it is quantized when it is moved to its device."""
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type=quant_type, **options
    )
    made.load_state_dict(layer.state_dict())
    made.to(layer.weight.dtype)
    # On CPUs with AVX512-BF16 its forward in evaluation would repack the weight, and compute in bfloat16
    # (test_quantized.py has a test of that): the other forward is the same on every CPU.
    made.support_avx512bf16_for_cpu = False
    return made.to(layer.weight.device).train(layer.training)


def eight_bit(layer: nn.Linear, **options: Any) -> nn.Module:
    """The layer in bitsandbytes' 8 bits."""
    import bitsandbytes

    given: dict[str, Any] = {"has_fp16_weights": False, **options}
    made = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=layer.bias is not None, **given)
    made.load_state_dict(layer.state_dict())
    return made.to(layer.weight.dtype).to(layer.weight.device).train(layer.training)


@torch.no_grad()  # else its bias is the result of an operation, and cannot be copied
def hqq(layer: nn.Linear, bits: int = 4) -> nn.Module:
    """The layer as HQQ packs it: of no format that is known here, so that it can only be run."""
    core = importlib.import_module("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=bits, group_size=32)
    made = core.HQQLinear(copy.deepcopy(layer), config, compute_dtype=layer.weight.dtype, device="cpu")
    return made.train(layer.training)


def torchao(layer: nn.Linear) -> nn.Module:
    """The layer with torchao's 8-bit weight, a tensor of a class of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its kernels for GPUs are not there
        quantization = importlib.import_module("torchao.quantization")
        made = copy.deepcopy(layer)
        quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    return made


@torch.no_grad()  # as auto-gptq packs a model
def gptq(layer: nn.Linear, bits: int = 4, group_size: int = 32, sym: bool = False, desc_act: bool = False) -> nn.Module:
    """The layer as auto-gptq packs it: with the ranges that its quantizer finds, each value rounded to the nearest."""
    from auto_gptq.utils.import_utils import dynamically_import_QuantLinear

    no_gpu = {"use_triton": False, "disable_exllama": True, "disable_exllamav2": True}
    kernel = dynamically_import_QuantLinear(desc_act=desc_act, group_size=group_size, bits=bits, **no_gpu)
    sizes = (layer.in_features, layer.out_features)
    made = kernel(bits, group_size, *sizes, layer.bias is not None, weight_dtype=layer.weight.dtype)
    groups = torch.arange(layer.in_features) // made.group_size
    if desc_act:  # inputs were sorted by their size; here, in some order
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(bits))]
    scales, zeros = ranges(layer, groups, bits, sym)
    plain = copy.deepcopy(layer).float()
    codes = (plain.weight.detach() / scales[:, groups] + zeros[:, groups]).round().clamp(0, 2**bits - 1)
    plain.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
    made.pack(plain.to(layer.weight.dtype), scales, zeros.clone(), groups.int() if desc_act else None)
    return made.train(layer.training)


def ranges(layer: nn.Linear, groups: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """auto-gptq's scales and zero points, (out, groups)."""
    from auto_gptq.quantization.quantizer import Quantizer

    found = []
    for group in range(int(groups.max()) + 1):
        quantizer = Quantizer()
        quantizer.configure(bits, perchannel=True, sym=sym)
        quantizer.find_params(layer.weight.detach().float()[:, groups == group], weight=True)
        found.append((quantizer.scale, quantizer.zero))
    scales, zeros = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return scales, zeros


def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which products with packed weights are computed from now on, in order."""
    made: list[str] = []
    forward = product._Product.forward

    def counted(x: Tensor, bias: Any, what: Any, *tensors: Any) -> Any:
        made.append(what.product)
        return forward(x, bias, what, *tensors)

    monkeypatch.setattr(product._Product, "forward", staticmethod(counted))
    return made


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": four_bit,
    "fp4": lambda layer: four_bit(layer, "fp4"),
    "8-bit": eight_bit,
}
OPAQUE: dict[str, Callable[[nn.Linear], nn.Module]] = {
    package: make
    for package, make in (("hqq", hqq), ("torchao", torchao))
    if importlib.util.find_spec(package)  # not there with transformers 4
}
KINDS |= OPAQUE
if importlib.util.find_spec("auto_gptq"):  # an environment of its own: make test-gptq
    KINDS = {"gptq": gptq}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads a name that peft is about to drop
        importlib.import_module("auto_gptq")


def packed(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    """The model with its linear layers packed in place, but those that transformers leaves: heads, and T5's `wo`."""
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not path.endswith(("lm_head", "classifier", "wo")):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, KINDS[kind](layer, **options))
    return model


def check_checkpointing(kind: str, reentrant: bool) -> None:
    """A Llama's gradients are the same to the order of sums, with its layers recomputed and without."""
    torch.manual_seed(0)
    base: Any = packed(llama(hidden_size=64, intermediate_size=96)(), kind).train()
    batch = {"input_ids": torch.randint(0, 30, (3, 7))}
    adapter = pf.init(base, pf.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    leaves = pf.leaves(adapter)

    def gradients() -> list[Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        pf.apply(base, adapter, batch).logits.square().mean().backward()  # a reentrant checkpoint knows no other way
        return [leaf.grad for leaf in leaves]

    expected = gradients()
    assert all(one is not None and one.abs().max() > 0 for one in expected)
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected, rtol=1e-5, atol=1e-6)


# LLM.int8() rounds each row of a layer's input to 8 bits, so 1/254 of its largest value is the most that one input is
# off; what comes out of a few layers in a row was measured to be off by less than 0.01 of its largest value.
# torchao multiplies with whole numbers and scales the sums, a dense layer scales the weight; 3e-7 was measured.
ROUNDING = {"8-bit": 0.02, "torchao": 1e-6}


def largest(tensor: Tensor) -> float:
    """The largest absolute value."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def states(model: nn.Module) -> dict[str, Any]:
    """Everything that a packed layer knows of its weight beside its parameters, bit for bit."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        for home, value in {**vars(module), **{f"weight.{k}": v for k, v in _own(module).items()}}.items():
            _describe(seen, f"{path}.{home}", value, 0)
    return seen


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or what one of a class of its own holds."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def bits_of(tensor: Tensor) -> bytes:
    """A tensor's values, bit for bit."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _own(module: nn.Module) -> dict[str, Any]:
    weight = module._parameters.get("weight")
    return {} if weight is None else vars(weight)


def _describe(seen: dict[str, Any], name: str, value: Any, depth: int) -> None:
    if isinstance(value, Tensor):
        held = [(one.data_ptr(), one.dtype, tuple(one.shape), bits_of(one)) for one in parts_of(value)]
        seen[name] = held
    elif type(value).__module__.startswith("bitsandbytes") and not isinstance(value, nn.Module) and depth < 3:
        seen[name] = id(value)
        for inner, one in vars(value).items():
            _describe(seen, f"{name}.{inner}", one, depth + 1)
    elif isinstance(value, (int, float, str, bool, torch.dtype, type(None))):
        seen[name] = value
