"""bitsandbytes' 8-bit weights: a scale for each row, and LLM.int8() for the input (https://arxiv.org/abs/2208.07339).

W = CB · SCB / 127. In evaluation (and always on a GPU) the input's rows are rounded to 8 bits too, but for the columns
that hold a value of `threshold` or more, which are multiplied as they are; in training on a CPU nothing of the input is
rounded. The gradient is that of x Wᵀ, straight through the rounding, as in bitsandbytes.

A module's own forward moves CB and SCB from the weight into `module.state` and casts its bias for good; here both homes
are read, and neither is written to. With `has_fp16_weights` the weight is a float that is rounded at each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.weights.codecs import packed_linear
from peftfn.weights.codecs.packed_linear import Format, Packed, Product, Tensors
from peftfn.weights.codecs.state_dict_entry import Entry, is_a, library

_LEVELS = 127.0


class Spec(NamedTuple):
    """The numbers of an 8-bit layer.

    Attributes:
        shape: (out, in).
        threshold: from which absolute value on an input is an outlier; 0 for none.
        rounds: whether inputs are rounded.
    """

    shape: tuple[int, int]
    threshold: float = 0.0
    rounds: bool = False


def matches(module: nn.Module) -> bool:
    """Whether the module is a `Linear8bitLt` or an `Embedding8bit`."""
    return is_a(type(module), "bitsandbytes", "Linear8bitLt", "Embedding8bit")


def shape(module: nn.Module, name: str) -> torch.Size:
    """(out, in), or (rows, dim) of an embedding."""
    return cast("Tensor", module._parameters["weight"]).shape


def read(module: nn.Module, name: str) -> Tensor:
    """W in float32, for the format does not keep its original dtype; a weight that is held as a float, as it is."""
    weight: Any = module._parameters["weight"]
    return weight if weight.is_floating_point() else unpacked(weight, _scales(weight, module), type(module).__name__)


def shared(module: nn.Module) -> list[Any]:
    """The state, which the module's own forward writes to: a copy of the model shares the base's."""
    return [state for state in (module.__dict__.get("state"),) if state is not None]


def run(module: Any, x: Tensor) -> Tensor:
    """x Wᵀ + b as the layer would compute it now; for an embedding, the rows of W that the ids name."""
    weight = module._parameters["weight"]
    where = type(module).__name__
    if isinstance(module, nn.Embedding):
        wanted = cast("Any", module).dtype
        if weight.is_floating_point():
            return F.embedding(x, weight, module.padding_idx).to(wanted)
        return packed_linear.look_up(_packed(weight, _scales(weight, module), where), x, torch.float32).to(wanted)
    own = product(module, x)
    if own is None:
        return F.linear(x, weight.to(x.dtype), _bias(module, x))
    return packed_linear.linear(own[0], x, own[1])


def product(module: Any, x: Tensor) -> Product | None:
    """W and b of x Wᵀ + b; `None` where a dense weight was put in the place of the packed one."""
    weight, state, where = module._parameters["weight"], module.state, type(module).__name__
    if not weight.is_floating_point():
        made = _packed(weight, _scales(weight, module), where)
    elif state.has_fp16_weights:
        codes, scales, _ = _op("int8_vectorwise_quant")(weight.detach().half(), 0.0)
        made = _packed(codes, scales, where)
    else:
        return None
    rounds = not (module.training and x.device.type in ("cpu", "xpu"))
    spec = made.spec._replace(threshold=float(state.threshold), rounds=rounds)
    return made._replace(spec=spec), _bias(module, x)


def _bias(module: Any, x: Tensor) -> Tensor | None:
    return None if module.bias is None else module.bias.to(x.dtype)


def _scales(weight: Any, module: nn.Module | None) -> Any:
    """SCB, wherever it is now, or `None`: a weight that has its own goes first, as in the module's own forward."""
    own: Any = None if module is None else module._parameters["weight"]
    homes: tuple[Any, ...] = (weight, getattr(module, "state", None), own)
    return next((home.SCB for home in homes if getattr(home, "SCB", None) is not None), None)


def _packed(weight: Tensor, scales: Tensor | None, where: str) -> Packed:
    if scales is None:
        raise ValueError(
            f"{where} has 8-bit weights and no scales (SCB) to read them by: after a model has run they are in its "
            "modules. Give every entry of model.state_dict(), or model=... to merge."
        )
    if weight.dim() != 2 or scales.shape != weight.shape[:1]:
        raise ValueError(
            f"{where}: {tuple(scales.shape)} scales (SCB) do not fit a weight of shape {tuple(weight.shape)}; expected "
            "one for each row. Was the checkpoint saved whole?"
        )
    outputs, inputs = weight.shape
    return Packed(FORMAT, (weight.detach(), scales), Spec((outputs, inputs)))


def unpacked(weight: Tensor, scales: Tensor | None, where: str) -> Tensor:
    """W, (out, in), in float32."""
    return packed_linear.dense(_packed(weight, scales, where), torch.float32)


# --- the format ------------------------------------------------------------------------------------------------------


def _rows(tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    codes, scales = tensors
    return codes[start:stop].to(dtype, copy=True).mul_((scales[start:stop, None] * (1 / _LEVELS)).to(dtype))


def _pick(tensors: Tensors, spec: Spec, ids: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scales = tensors
    return codes[ids] * (scales[ids, None] / _LEVELS)


def _step(spec: Spec) -> int:
    return 1


def _kernel(tensors: Tensors, spec: Spec, x: Tensor, bias: Tensor | None, mapped: int) -> Tensor:
    if not spec.rounds:
        codes, scales = tensors
        # In the order of bitsandbytes' own product, which scales in place.
        weight = codes.to(x.dtype, copy=True).mul_(scales.unsqueeze(1).mul(1 / _LEVELS))
        return F.linear(x, weight, bias)
    # torch.compile knows neither the vmap rule of a Function nor sizes that depend on values: it gets one operator.
    llm_int8: Any = torch.ops.peftfn.llm_int8 if torch.compiler.is_compiling() else _llm_int8
    y = llm_int8(x.reshape(-1, x.shape[-1]), bias, *tensors, spec.threshold, x.shape[:mapped].numel())
    return y.view(*x.shape[:-1], spec.shape[0])


def _llm_int8(x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, threshold: float, groups: int) -> Tensor:
    """LLM.int8(), (rows, in) -> (rows, out), with columns of outliers that each group of rows has for itself."""
    if threshold and groups > 1:
        return _apart(x.view(groups, -1, x.shape[-1]), bias, codes, scales, threshold)
    rounded, sizes, columns = _op("int8_vectorwise_quant")(x.half(), threshold)
    if threshold:
        return _op("int8_mixed_scaled_mm")(x, rounded, codes, sizes, scales, columns, bias)[0]
    return _op("int8_scaled_mm")(rounded, codes, sizes, scales, bias=bias, dtype=x.dtype)


def _apart(x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, threshold: float) -> Tensor:
    """The same for several groups in one product, (groups, rows, in) -> (groups * rows, out)."""
    half = x.half()
    is_outlier = half.abs() >= threshold
    apart = is_outlier.any(1, keepdim=True)  # (K, 1, in)
    inside = half.masked_fill(is_outlier, 0)
    sizes = inside.abs().amax(-1).float()  # (K, rows)
    rounded = torch.round(inside * (_LEVELS / sizes.unsqueeze(-1))).to(torch.int8).masked_fill(apart, 0)
    y = _op("int8_scaled_mm")(rounded.flatten(0, 1), codes, sizes.flatten(), scales, bias=bias, dtype=x.dtype)
    columns = apart.any(0).flatten().nonzero().flatten()
    if not columns.numel():
        return y
    outliers = x.masked_fill(~apart, 0)[..., columns].flatten(0, 1)
    weight = _op("int8_vectorwise_dequant")(codes[:, columns].contiguous(), scales).to(x.dtype)
    return y.addmm(outliers, weight.T)


@torch.library.custom_op("peftfn::llm_int8", mutates_args=())
def _operator(x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, threshold: float, groups: int) -> Tensor:
    return _llm_int8(x, bias, codes, scales, threshold, groups)


@_operator.register_fake
def _(x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, threshold: float, groups: int) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@_operator.register_vmap
def _(info: Any, in_dims: Any, x: Tensor, bias: Any, *rest: Any) -> Any:
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    mapped = None if bias is None or in_dims[1] is None else bias.movedim(in_dims[1], 0)  # (K, out)
    *packed_weight, threshold, groups = rest
    given = (x.flatten(0, 1), bias if mapped is None else None, *packed_weight, threshold, groups * x.shape[0])
    y = torch.ops.peftfn.llm_int8(*given).unflatten(0, x.shape[:2])
    return y if mapped is None else y + mapped.unsqueeze(1).to(y.dtype), 0


def _op(name: str) -> Any:
    return getattr(torch.ops.bitsandbytes, name).default


FORMAT = Format(_kernel, _rows, _step, _pick)


# --- entries of a state dict, for merging ----------------------------------------------------------------------------


def find(params: Mapping[str, Tensor], name: str, module: nn.Module | None) -> Entry | None:
    """The 8-bit entry of that name, or `None`."""
    weight: Any = params.get(name)
    if weight is None or weight.dtype != torch.int8 or (module is not None and not matches(module)):
        return None
    prefix = name.removesuffix("weight")
    kept = {prefix + part: params[prefix + part] for part in ("SCB", "weight_format") if prefix + part in params}
    scales = kept[prefix + "SCB"] if kept else _scales(weight, module)

    def pack(dense: Tensor) -> dict[str, Any]:
        made = library("bitsandbytes.nn").Int8Params(dense.detach(), requires_grad=False).to(dense.device)
        if not kept:
            return {name: made}
        return {**kept, name: made.data, prefix + "SCB": made.SCB}

    return Entry(unpacked(weight, scales, name), tuple(kept), pack)
