"""GPTQ's weights: integers of 2, 3, 4 or 8 bits, with a scale and a zero point for each group of inputs.

W[o, i] = s[g(i), o] · (q[i, o] - z[g(i), o]) (https://arxiv.org/abs/2210.17323), as auto-gptq and GPTQModel hold it:

- `qweight`, (in · bits / 32, out), has q in 32-bit words along the inputs, and `qzeros`, (groups, out · bits / 32),
  has z along the outputs: version 1 stores z - 1, version 2 z itself;
- `scales`, (groups, out), and `g_idx`, (in,): the group of each input, in any order where it was sorted (desc_act).

On a CPU both libraries unpack W whole, in the dtype of the scales, and multiply; here that is done for some outputs at
a time. Of the module, only these four tensors are read, and its bias. Kernels that hold them in another order than the
file does are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.weights.codecs import bit_packing, packed_linear
from peftfn.weights.codecs.packed_linear import Format, Packed, Product, Tensors
from peftfn.weights.codecs.state_dict_entry import Entry, is_a

_BITS = (2, 3, 4, 8)
_WORD = 32
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What auto-gptq and GPTQModel call their kernels that leave the tensors as they are in a file.
_AS_IN_FILES = {"auto_gptq": ("cuda", "cuda-old", "triton", "exllama", "exllamav2"), "gptqmodel": ("torch", "tritonv2")}
# Attributes that say that a layer computes more than x Wᵀ + b, or holds its tensors otherwise.
_UNLIKE = ("planar", "adapter", "online_full_had", "online_partial_had", "q_handle", "_use_act_order")


class Zeros(NamedTuple):
    """How zero points are stored.

    Attributes:
        less: what was taken off: 1 in version 1, 0 in version 2.
        wraps: whether 2^bits is read as 0.
    """

    less: int
    wraps: bool = False


class Spec(NamedTuple):
    """The numbers of a GPTQ weight.

    Attributes:
        shape: (out, in).
        bits: of a value.
        zeros: how zero points are stored.
    """

    shape: tuple[int, int]
    bits: int
    zeros: Zeros


def matches(module: nn.Module) -> bool:
    """Whether the module is a `QuantLinear` of auto-gptq or a GPTQ layer of GPTQModel, of any kernel."""
    cls = type(module)
    return is_a(cls, "auto_gptq", "QuantLinear") or is_a(cls, "gptqmodel", "GPTQQuantLinear", "PackableQuantLinear")


def shape(module: nn.Module, name: str) -> torch.Size:
    """(out, in)."""
    weight = _dense(module)
    if weight is not None:
        return weight.shape
    parts = _parts(module)
    return torch.Size((parts["qweight"].shape[1], parts["g_idx"].shape[0]))


def read(module: nn.Module, name: str) -> Tensor:
    """W in the dtype of its scales."""
    weight = _dense(module)
    return unpacked(_packed(_parts(module), _zeros_of(module), _name(module))) if weight is None else weight


def shared(module: nn.Module) -> list[Any]:
    """The four tensors."""
    return [tensor for name in _PARTS if (tensor := getattr(module, name, None)) is not None]


def run(module: nn.Module, x: Tensor) -> Tensor:
    """x Wᵀ + b, in the dtype of x."""
    own = product(module, x)
    if own is not None:
        return packed_linear.linear(own[0], x, own[1])
    weight, bias = cast("Tensor", _dense(module)), _bias(module)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def product(module: nn.Module, x: Tensor) -> Product | None:
    """W and b of x Wᵀ + b; `None` where a dense weight was put in the place of the packed one."""
    if _dense(module) is not None:
        return None
    return _packed(_parts(module), _zeros_of(module), _name(module)), _bias(module)


def unpacked(made: Packed) -> Tensor:
    """W, (out, in), in the dtype of its scales."""
    return packed_linear.dense(made, made.tensors[2].dtype)


def _dense(module: nn.Module) -> Tensor | None:
    """A dense weight that was put in the place of the packed one."""
    return module._parameters.get("weight")


def _bias(module: nn.Module) -> Tensor | None:
    return cast("Tensor | None", getattr(module, "bias", None))


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _parts(module: nn.Module) -> dict[str, Tensor]:
    kernel = getattr(module, "QUANT_TYPE", None)
    library = type(module).__module__.partition(".")[0]
    unlike = [name for name in _UNLIKE if getattr(module, name, None)]
    if kernel not in _AS_IN_FILES.get(library, ()) or unlike or not all(hasattr(module, name) for name in _PARTS):
        what = f" ({', '.join(unlike)})" if unlike else ""
        raise ValueError(
            f"{library}'s {_name(module)} of kernel {kernel!r}{what} holds its weight in an order of its own, which is "
            "not read. Load the model for a kernel that leaves it as it is in the file: use_exllama=False and no "
            "Marlin for auto-gptq, backend=BACKEND.GPTQ_TORCH for GPTQModel."
        )
    return {name: getattr(module, name) for name in _PARTS}


def _zeros_of(module: Any) -> Zeros:
    version = module.qzero_format() if hasattr(module, "qzero_format") else 1
    return Zeros(2 - version, wraps=module.QUANT_TYPE == "cuda-old" and module.bits != 3)


def _packed(parts: Mapping[str, Tensor], zeros: Zeros, where: str) -> Packed:
    """The weight as the format takes it; tensors that do not fit each other are an error."""
    qweight, qzeros, scales, g_idx = (parts[name] for name in _PARTS)
    inputs, outputs = g_idx.shape[0], qweight.shape[-1]
    groups = scales.shape[0]
    bits = next((bits for bits in _BITS if qweight.shape[0] == math.ceil(inputs * bits / _WORD)), None)
    fits = (
        bits is not None
        and qweight.dtype == qzeros.dtype == torch.int32
        and scales.is_floating_point()
        and qweight.dim() == 2
        and scales.shape == (groups, outputs)
        and qzeros.shape == (groups, math.ceil(outputs * bits / _WORD))
    )
    if not fits:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in parts.items())
        raise ValueError(
            f"{where}: {shapes} do not fit together; expected (in · bits / 32, out) and (groups, out · bits / 32) of "
            "torch.int32, (groups, out) of floats and (in,), of 2, 3, 4 or 8 bits. Was the checkpoint saved whole?"
        )
    if not torch.compiler.is_compiling() and g_idx.device.type == "cpu" and inputs:
        low, high = (int(end) for end in torch.aminmax(g_idx))
        if low < 0 or high >= groups:
            raise ValueError(f"{where}: g_idx has groups from {low} to {high}, and there are {groups} (scales).")
    return Packed(FORMAT, (qweight, qzeros, scales, g_idx), Spec((outputs, inputs), cast("int", bits), zeros))


# --- the format ------------------------------------------------------------------------------------------------------


def _rows(tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    qweight, qzeros, scales, g_idx = tensors
    first, last = start * spec.bits // _WORD, math.ceil(stop * spec.bits / _WORD)
    q = bit_packing.unpacked(qweight[:, start:stop], spec.bits)[: spec.shape[1]]  # (in, n); words may have room left
    z = _zero_points(qzeros[:, first:last], spec)[:, : stop - start]  # (groups, n)
    # Gathered even where groups are in order: what that would save is a share of one block.
    w = (q - z.index_select(0, g_idx)) * scales[:, start:stop].index_select(0, g_idx)
    return w.T.to(dtype)


def _zero_points(qzeros: Tensor, spec: Spec) -> Tensor:
    z = bit_packing.unpacked(qzeros.T, spec.bits).T + spec.zeros.less
    return z & (2**spec.bits - 1) if spec.zeros.wraps else z


def _kernel(tensors: Tensors, spec: Spec, x: Tensor, bias: Tensor | None, mapped: int) -> Tensor:
    y = packed_linear.by_blocks(Packed(FORMAT, tensors, spec), x).to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _step(spec: Spec) -> int:
    """Outputs whose zero points begin at a whole word."""
    return _WORD


FORMAT = Format(_kernel, _rows, _step)


# --- entries of a state dict, for merging ----------------------------------------------------------------------------


def find(params: Mapping[str, Tensor], name: str, module: nn.Module | None) -> Entry | None:
    """The GPTQ weight whose entries stand for that name, or `None`."""
    if name in params or (module is not None and (not matches(module) or _dense(module) is not None)):
        return None
    prefix = name.removesuffix("weight")
    there = {part: params[prefix + part] for part in _PARTS if prefix + part in params}
    if "qweight" not in there and module is None:
        return None
    parts = there if "qweight" in there or module is None else _parts(module)
    missing = [part for part in _PARTS if part not in parts]
    if missing:
        raise ValueError(
            f"{name}: there is a {prefix}qweight and no {', '.join(missing)}, which GPTQ's is read by. Give "
            "every entry of model.state_dict()."
        )
    if module is not None:
        _parts(module)  # refuses, and says why
    made = _packed(parts, _zeros_of(module) if module is not None else _zeros_in(parts, name), name)

    def pack(dense: Tensor) -> dict[str, Any]:
        return {prefix + part: tensor for part, tensor in _packed_again(dense.detach(), made).items()}

    return Entry(unpacked(made), tuple(prefix + part for part in there), pack)


def _zeros_in(parts: Mapping[str, Tensor], name: str) -> Zeros:
    """How zero points are stored, from themselves: of a symmetric weight they all are the middle, or one less."""
    spec = _packed(parts, Zeros(0), name).spec
    stored, middle = _zero_points(parts["qzeros"], spec)[:, : spec.shape[0]], 2 ** (spec.bits - 1)
    for less in (1, 0):
        if bool((stored == middle - less).all()):
            return Zeros(less)
    raise ValueError(
        f"{name}: its zero points are not all alike, and entries alone do not say whether they are stored as they are "
        "(GPTQModel's version 2) or less one (auto-gptq, version 1). Give merge the model too: model=..."
    )


def _packed_again(w: Tensor, made: Packed) -> dict[str, Tensor]:
    """W rounded to the nearest values, in the same groups.

    A group's scale and zero point stay as they are where its new values are in their reach, so that what no adapter
    changed comes back bit for bit; otherwise they are made anew from its smallest and largest value (and 0).
    """
    qweight, qzeros, scales, g_idx = made.tensors
    spec, most = made.spec, 2**made.spec.bits - 1
    w, groups = w.T.float(), g_idx.long()  # (in, out)
    old_z = _zero_points(qzeros, spec)[:, : spec.shape[0]].float()
    low, high = (_ends(w, groups, len(scales), which) for which in ("amin", "amax"))
    old = scales.float()
    is_kept = (low >= (-0.5 - old_z) * old) & (high <= (most + 0.5 - old_z) * old) & (old > 0)
    s, z = _fitted(low, high, most, bool((old_z == (most + 1) // 2).all()))
    s = torch.where(is_kept, scales, s.to(scales.dtype).clamp(min=torch.finfo(scales.dtype).tiny))
    z = torch.where(is_kept, old_z, z)
    q = (w / s.float()[groups] + z[groups]).round().clamp(0, most)
    stored = (z.to(torch.int64) - spec.zeros.less) & most
    return {
        "qweight": bit_packing.packed(_filled(q, spec.bits), spec.bits).to(qweight.device),
        "qzeros": bit_packing.packed(_filled(stored.T, spec.bits), spec.bits).T.contiguous(),
        "scales": s,
        "g_idx": g_idx,
    }


def _ends(w: Tensor, groups: Tensor, count: int, which: Any) -> Tensor:
    """The smallest or largest value of each group, or 0, (groups, out)."""
    return w.new_zeros(count, w.shape[1]).scatter_reduce(0, groups[:, None].expand_as(w), w, which)


def _fitted(low: Tensor, high: Tensor, most: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points whose values reach from `low` to `high`."""
    if symmetric:
        s, z = 2 * torch.maximum(-low, high) / most, torch.full_like(low, (most + 1) // 2)
    else:
        s = (high - low) / most
        z = (-low / s).nan_to_num().round().clamp(max=most)
        # Kernels read a 0 that is stored less one in two ways; a zero point of 1 has one value less to reach with.
        s, z = torch.where(z < 1, high / (most - 1), s), z.clamp(min=1)
    return s, z


def _filled(values: Tensor, bits: int) -> Tensor:
    """The values with zeros up to whole runs of words."""
    run = _WORD * (bits // math.gcd(bits, _WORD)) // bits
    return F.pad(values, (0, 0, 0, -values.shape[0] % run))
