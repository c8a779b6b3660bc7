"""Any other packed linear layer, known only by what it computes.

Those of libraries that pack weights are taken for linear, by their class; another's is a module like any other.
W is read by running the layer on the identity, a block of columns at a time: W[:, i:j] = f(I[i:j])ᵀ, with f without
its bias. Shown on HQQ's layers, which hold their weight in tensors of their own, and on torchao's, which are
`nn.Linear`s with a weight that is no plain tensor. The layer runs itself for the forward pass, on a private copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.weights.codecs import packed_linear
from peftfn.weights.codecs.packed_linear import Format, Packed, Product, Tensors
from peftfn.weights.codecs.state_dict_entry import Entry

_SUBCLASSES = ("torchao",)
# What holds integers and has sizes may compute anything: only of these libraries it is known to be a linear layer.
_LIBRARIES = frozenset(
    (
        *("hqq", "eetq", "awq", "aqlm", "vptq", "optimum", "quanto", "spqr_quant", "flute", "fbgemm_gpu", "auto_round"),
        *(
            "auto_gptq",
            "gptqmodel",
            "compressed_tensors",
            "transformers",
            "torchao",
            "bitsandbytes",
            "neural_compressor",
        ),
    )
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A layer.

    Attributes:
        shape: (out, in).
        forward: the layer's own, without its bias.
        device: where it is.
        dtype: what it computes in.
    """

    shape: tuple[int, int]
    forward: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype


@transforms.constant_result
def _is_of_a_library(cls: type[nn.Module]) -> bool:
    return any(one.__module__.partition(".")[0] in _LIBRARIES for one in cls.__mro__)


def matches(module: nn.Module) -> bool:
    """Whether the module is a linear layer whose weight is no plain tensor of numbers."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        return _is_subclass(weight)
    if not _is_of_a_library(type(module)):
        return False
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    held = [*module._parameters.values(), *module._buffers.values()]
    is_packed = any(tensor is not None and not tensor.is_floating_point() and tensor.dim() > 1 for tensor in held)
    return weight is None and is_packed and all(isinstance(size, int) for size in sizes)


def shape(module: nn.Module, name: str) -> torch.Size:
    """(out, in)."""
    linear = cast("nn.Linear", module)
    return torch.Size((linear.out_features, linear.in_features))


def read(module: nn.Module, name: str) -> Tensor:
    """W in the dtype that the layer computes in: what it makes of the identity."""
    own = _dense(module)
    if own is not None:
        return own
    made = _packed(module)
    eye = torch.eye(made.spec.shape[1], dtype=made.spec.dtype, device=made.spec.device)
    columns = packed_linear.linear(made, eye, None)  # a Function, inside which no transform sees the layer
    return columns.mT.to(made.spec.dtype).contiguous()


def shared(module: nn.Module) -> list[Any]:
    """The tensors that are no parameters and no buffers (scales in a dictionary)."""
    found: list[Any] = []
    for value in module.__dict__.values():
        if isinstance(value, dict):
            found += [one for one in cast("dict[Any, Any]", value).values() if type(one) is Tensor]
    return found


def run(module: nn.Module, x: Tensor) -> Tensor:
    """What the layer computes."""
    own, bias = product(module, x), _bias(module)
    y = F.linear(x, cast("Tensor", _dense(module))) if own is None else packed_linear.linear(own[0], x, None)
    # The bias is added here, because torch.compile loses its gradient beside a layer's own Function (HQQ's), and
    # because HQQ's layers add it so: a dense copy of the weight then gives the same bits, whatever the CPU's kernels.
    return y if bias is None else y + bias.to(y.dtype)


def product(module: nn.Module, x: Tensor) -> Product | None:
    """W and b of x Wᵀ + b; `None` where a dense weight was put in the place of the packed one."""
    return None if _dense(module) is not None else (_packed(module), _bias(module))


def _dense(module: nn.Module) -> Tensor | None:
    """A dense weight that was put in the place of the packed one."""
    weight = module._parameters.get("weight")
    return None if weight is None or _is_subclass(weight) else weight


def _is_subclass(weight: object) -> bool:
    kind = type(weight)
    # Dynamo cannot trace the test below for a Parameter, which the weight of a frozen base is.
    return kind not in (Tensor, nn.Parameter) and kind.__module__.partition(".")[0] in _SUBCLASSES


def _bias(module: nn.Module) -> Tensor | None:
    given = module._parameters.get("bias")  # HQQ's own is a plain attribute, and would be found first
    return cast("Tensor | None", getattr(module, "bias", None)) if given is None else given


def _packed(module: nn.Module) -> Packed:
    layer = object.__new__(type(module))
    layer.__dict__.update(module.__dict__)
    for home in ("_parameters", "_buffers"):
        layer.__dict__[home] = {name: one for name, one in layer.__dict__[home].items() if name != "bias"}
    layer.__dict__["bias"] = None  # it is added apart, where it may be trained
    weight = module._parameters.get("weight")
    dtype = getattr(module, "compute_dtype", None) or (torch.float32 if weight is None else weight.dtype)
    device = next(iter([*module.parameters(), *module.buffers()])).device
    outputs, inputs = shape(module, "weight")
    return Packed(FORMAT, (), Spec((outputs, inputs), _runner(layer), device, dtype))


def _runner(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return type(layer).forward(layer, x)

    return run


def _kernel(tensors: Tensors, spec: Spec, x: Tensor, bias: Tensor | None, mapped: int) -> Tensor:
    y = spec.forward(x)
    return y if bias is None else y + bias.to(y.dtype)


def _columns(tensors: Tensors, spec: Spec, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    ones = torch.zeros(stop - start, spec.shape[1], dtype=spec.dtype, device=spec.device)
    ones.diagonal(start).fill_(1)
    return spec.forward(ones).T.to(dtype)


def _step(spec: Spec) -> int:
    return 1


FORMAT = Format(_kernel, _columns, _step, axis=1)


def find(params: Mapping[str, Tensor], name: str, module: nn.Module | None) -> Entry | None:
    """The weight, read from its module."""
    if module is None or not matches(module):
        return None
    prefix = name.removesuffix("weight")
    others = tuple(key for key in params if key.startswith(prefix) and key not in (name, f"{prefix}bias"))

    def pack(dense: Tensor) -> dict[str, Any]:
        raise ValueError(f"{name}: {type(module).__name__} cannot be packed again; merge without requantize.")

    return Entry(read(module, name), others, pack)
