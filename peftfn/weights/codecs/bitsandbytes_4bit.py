"""bitsandbytes' 4-bit weights: nf4 and fp4 in blocks, each with its largest value (QLoRA, section 3).

W = code[nibble] · absmax, absmax itself in 8 bits with double quantization (https://arxiv.org/abs/2305.14314). A
module's own forward casts its bias for good, notes the first input's dtype, and on CPUs with AVX512-BF16 repacks the
stored bytes; none of that is done here. Nothing of bitsandbytes is imported before a module of it is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.weights.codecs import packed_linear
from peftfn.weights.codecs.packed_linear import Format, Packed, Product, Tensors
from peftfn.weights.codecs.state_dict_entry import Entry, is_a, library

_NIBBLES = 2  # values in a byte
_NESTED = 256  # blocksize of the double quantization that bitsandbytes' kernel takes
_SAYS = "bitsandbytes__"


class Spec(NamedTuple):
    """The numbers of a 4-bit weight.

    Attributes:
        shape: (out, in).
        blocksize: values that share one absmax.
        nested: the same for absmax itself, 0 where it is not quantized.
        quant_type: `nf4` or `fp4`.
    """

    shape: tuple[int, int]
    blocksize: int
    nested: int
    quant_type: str


def matches(module: nn.Module) -> bool:
    """Whether the module is a `Linear4bit` or an `Embedding4bit`."""
    return is_a(type(module), "bitsandbytes", "Linear4bit", "Embedding4bit")


def shape(module: nn.Module, name: str) -> torch.Size:
    """(out, in), or (rows, dim) of an embedding."""
    weight = _weight(module)
    state = None if weight is None else _state(weight, module)
    return torch.Size(state.shape) if state is not None else cast("Tensor", weight).shape


def read(module: nn.Module, name: str) -> Tensor:
    """W in the dtype that it had when it was quantized."""
    weight = _weight(module)
    state = _state(weight, module)
    return weight if state is None else unpacked(weight, state, type(module).__name__)


def shared(module: nn.Module) -> list[Any]:
    """The quant state, which belongs to the weight."""
    return [state for state in (module.__dict__.get("quant_state"),) if state is not None]


def run(module: Any, x: Tensor) -> Tensor:
    """x Wᵀ + b in the layer's compute dtype; for an embedding, the rows of W that the ids name."""
    weight = _weight(module)
    state = _state(weight, module)
    if isinstance(module, nn.Embedding):
        wanted = cast("Any", module).dtype
        if state is None:
            return F.embedding(x, weight, module.padding_idx).to(wanted)
        return packed_linear.look_up(_packed(weight, state, type(module).__name__), x, state.dtype).to(wanted)
    dtype = _compute_dtype(module, x)
    if state is None:
        return F.linear(x.to(dtype), weight.to(dtype), _bias(module, dtype)).to(x.dtype)
    return packed_linear.linear(_packed(weight, state, type(module).__name__), x.to(dtype), _bias(module, dtype)).to(
        x.dtype
    )


def product(module: Any, x: Tensor) -> Product | None:
    """W and b where `run` computes in the dtype of x."""
    weight = _weight(module)
    state = _state(weight, module)
    if state is None or _compute_dtype(module, x) != x.dtype:
        return None
    return _packed(weight, state, type(module).__name__), _bias(module, x.dtype)


def _bias(module: Any, dtype: torch.dtype) -> Tensor | None:
    return None if module.bias is None else module.bias.to(dtype)


def _compute_dtype(module: Any, x: Tensor) -> torch.dtype:
    """What the module's own forward would compute in; before its first call it takes the input's dtype."""
    if not module.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        return x.dtype
    return module.compute_dtype or x.dtype


def _weight(module: nn.Module) -> Any:
    return module._parameters["weight"]


def _state(weight: Any, module: nn.Module | None) -> Any:
    """The quant state of a weight, or `None` for a dense one that was put in its place."""
    state = getattr(weight, "quant_state", None)
    if state is None and module is not None and not _is_dense(weight):
        state = module.__dict__.get("quant_state")  # FSDP loses the weight's own
    if state is not None:
        return state
    where = type(module).__name__ if module is not None else "the weight"
    if is_a(type(cast("object", weight)), "bitsandbytes", "Params4bit") and not weight.is_meta:
        raise ValueError(f"{where} is not quantized yet: move the model to its device, model.to('cpu'), first.")
    if not weight.is_floating_point():
        raise ValueError(
            f"{where} has packed bytes of shape {tuple(weight.shape)} and no quant state to read them by. Give what "
            "dict(model.named_parameters()) holds, or every entry of model.state_dict()."
        )
    return None


def _is_dense(weight: Any) -> bool:
    return weight.is_floating_point() and not (weight.dim() == 2 and weight.shape[1] == 1)


def _packed(weight: Tensor, state: Any, where: str) -> Packed:
    """The weight as the kernels take it; a quant state that cannot be right is an error."""
    data, absmax = weight.detach().view(torch.uint8).reshape(-1), state.absmax
    outputs, inputs = state.shape
    repacked = getattr(state, "packing_format_for_cpu", False)
    if data.numel() != math.ceil(outputs * inputs / _NIBBLES):
        raise _corrupt(where, f"{data.numel()} bytes for {outputs} × {inputs} values of 4 bits")
    if absmax.numel() != math.ceil(outputs * inputs / state.blocksize):
        raise _corrupt(where, f"{absmax.numel()} absmax for {outputs} × {inputs} values in blocks of {state.blocksize}")
    if state.quant_type not in ("nf4", "fp4"):
        raise _corrupt(where, f"quant_type {state.quant_type!r}, expected 'nf4' or 'fp4'")
    if repacked:
        data, absmax = _canonical(data, outputs, inputs), absmax.float().T.reshape(-1)
    tensors: Tensors = (data.view(-1, 1), absmax)
    nested = state.state2 if state.nested else None
    if nested is not None:
        if nested.absmax.numel() != math.ceil(absmax.numel() / nested.blocksize):
            raise _corrupt(where, f"{nested.absmax.numel()} nested absmax for {absmax.numel()} blocks")
        tensors = (*tensors, nested.absmax, nested.code, state.offset)
    spec = Spec((outputs, inputs), state.blocksize, nested.blocksize if nested else 0, state.quant_type)
    return Packed(FORMAT, tensors, spec)


def _corrupt(where: str, what: str) -> ValueError:
    return ValueError(f"{where}: the quant state does not fit the weight: {what}. Was the checkpoint saved whole?")


def _canonical(data: Tensor, outputs: int, inputs: int) -> Tensor:
    """The bytes as they were before bitsandbytes repacked them for AVX512-BF16.

    It holds 32 rows together: byte j of a pair of columns has the nibbles j and j + 32 of [row 0, row 1, ...].
    """
    pairs = data.view(outputs // 32, inputs // _NIBBLES, 16, _NIBBLES)
    first, second = pairs[..., 0], pairs[..., 1]
    upper = ((first & 15) << 4) | (second & 15)  # rows 0 to 15
    lower = (first & 240) | (second >> 4)
    return torch.cat([upper, lower], -1).transpose(1, 2).reshape(-1)


def unpacked(weight: Tensor, state: Any, where: str) -> Tensor:
    """W, (out, in), in the dtype that it had when it was quantized."""
    dtype = getattr(state, "original_dtype", None) or state.dtype
    return packed_linear.dense(_packed(weight, state, where), dtype)


# --- the format ------------------------------------------------------------------------------------------------------


def _kernel(tensors: Tensors, spec: Spec, x: Tensor, bias: Tensor | None, mapped: int) -> Tensor:
    gemm = getattr(torch.ops.bitsandbytes, "gemm_4bit", None)
    # On a CPU it is these two products, but see `_rows`; and torch.compile has a vmap rule for each of them only.
    is_cpu = x.device.type == "cpu"
    if gemm is None or is_cpu or x.dtype == torch.float64 or (spec.nested and spec.nested != _NESTED):
        return F.linear(x, _rows(tensors, spec, 0, spec.shape[0], x.dtype), bias)
    data, absmax, *nested = tensors
    given: dict[str, Any] = {"bias": bias}
    if nested:
        given |= {"absmax_8bit": absmax, "absmax_code": nested[1], "absmax_offset": nested[2]}
        absmax = nested[0]
    return gemm.default(x, data, list(spec.shape), absmax, spec.blocksize, spec.quant_type, **given)


def _rows(tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    data, absmax, *nested = tensors
    inputs = spec.shape[1]
    first, last = start * inputs, stop * inputs
    if nested:
        blocks, code, offset = nested
        absmax = _op("dequantize_blockwise")(absmax, blocks, code, spec.nested, torch.float32) + offset
    if (start, stop) != (0, spec.shape[0]):
        data = data[first // _NIBBLES : math.ceil(last / _NIBBLES)]
        absmax = absmax[first // spec.blocksize : math.ceil(last / spec.blocksize)]
    # Of float64 bitsandbytes' CPU kernel returns memory that it did not write to. With AVX512 it takes a new absmax at
    # each row, though a block goes on in the next one: so it is given blocks for rows, or all as one row.
    made = torch.float32 if dtype == torch.float64 else dtype
    shape = [1, last - first] if (last - first) % spec.blocksize else [(last - first) // spec.blocksize, spec.blocksize]
    dense = _op("dequantize_4bit")(data, absmax, spec.blocksize, spec.quant_type, shape, made)
    return dense.to(dtype).view(stop - start, inputs)


def _op(name: str) -> Any:
    return getattr(torch.ops.bitsandbytes, name).default


def _step(spec: Spec) -> int:
    """Rows that begin at a whole block and a whole byte."""
    unit = math.lcm(spec.blocksize, _NIBBLES)
    return unit // math.gcd(unit, spec.shape[1])


def _pick(tensors: Tensors, spec: Spec, ids: Tensor, dtype: torch.dtype) -> Tensor:
    rows, dim = spec.shape
    if dim % spec.blocksize or spec.nested:
        return _rows(tensors, spec, 0, rows, dtype)[ids]
    data, absmax = (tensor.view(rows, -1)[ids] for tensor in tensors)
    return _rows((data.view(-1, 1), absmax.view(-1)), spec._replace(shape=(ids.numel(), dim)), 0, ids.numel(), dtype)


FORMAT = Format(_kernel, _rows, _step, _pick)


# --- entries of a state dict, for merging ----------------------------------------------------------------------------


def find(params: Mapping[str, Tensor], name: str, module: nn.Module | None) -> Entry | None:
    """The 4-bit entry of that name, or `None`."""
    weight: Any = params.get(name)
    if weight is None:
        return None
    apart = {key.removeprefix(f"{name}."): key for key in params if key.startswith(f"{name}.")}
    said = any(_SAYS in key for key in apart)
    if module is not None and not matches(module):
        return None
    looks = module is not None or (weight.dtype == torch.uint8 and weight.dim() == 2 and weight.shape[1] == 1)
    if not (
        said or is_a(type(cast("object", weight)), "bitsandbytes", "Params4bit") or (looks and not _is_dense(weight))
    ):
        return None
    if said:
        state = _from_dict({short: params[key] for short, key in apart.items()}, weight, name)
    else:
        state = _state(weight, module)
    if state is None:
        return None

    def pack(dense: Tensor) -> dict[str, Any]:
        nested = bool(getattr(state, "original_nested", state.nested))
        storage = getattr(state, "original_storage_type", None) or weight.dtype
        options: dict[str, Any] = {"quant_type": state.quant_type, "quant_storage": storage}
        made = (
            library("bitsandbytes.nn")
            .Params4bit(dense.detach(), False, blocksize=state.blocksize, compress_statistics=nested, **options)
            .to(dense.device)
        )
        if not said:
            return {name: made}
        extra = {apart[short]: tensor for short, tensor in made.quant_state.as_dict(packed=True).items()}
        return {name: made.data, **extra}

    return Entry(unpacked(weight, state, name), tuple(apart.values()), pack)


def _from_dict(tensors: dict[str, Any], weight: Tensor, name: str) -> Any:
    try:
        return library("bitsandbytes.functional").QuantState.from_dict(tensors, device=weight.device)
    except (KeyError, ValueError, TypeError, AssertionError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name}: the entries of its quant state ({', '.join(sorted(tensors))}) cannot be read: {error!r}. Give "
            "every entry of model.state_dict()."
        ) from error
