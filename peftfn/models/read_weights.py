"""Weights that the base reads itself, past the layer: `F.linear(x, self.lin.weight)` has to see the adapted one.

Most layers are called, and adapted there. A base may also read a layer's weight (WavLM's attention, a tied decoder, a
convolution's kernel taken as a matrix), or have a layer whose forward is its own. So the private layer's attribute is
an object that stands for the adapted weight: what is asked of a weight without its numbers (shape, dtype, device) it
has from the base's, and the first operation on it makes W + ΔW. Where nobody reads it, nothing is computed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

# What is known of a weight without its numbers, as the base has it.
_ABOUT = frozenset(
    (
        *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "itemsize"),
        *("is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "names"),
        *("size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "element_size", "get_device"),
        *("is_floating_point", "is_complex", "is_signed", "is_inference"),
    )
)
_POINTERS = frozenset(("data_ptr", "untyped_storage", "storage", "__array_interface__", "__dlpack__", "numpy"))


class AdaptedWeight:
    """Stands for one tensor of a private layer as the adapters make it.

    It is no tensor, which would have memory: torch's operations take it by `__torch_function__`, and `isinstance` is
    told that it is a parameter, because models ask.

    Args:
        plain: gives the base's own tensor.
        compute: gives the adapted one.
        name: what it is called in errors.
    """

    __slots__ = ("_of",)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody sets it
        """What `isinstance` asks, beside the type."""
        return nn.Parameter

    def __init__(self, plain: Callable[[], Tensor], compute: Callable[[], Tensor], name: str) -> None:
        object.__setattr__(self, "_of", (plain, compute, name))

    def __getattr__(self, name: str) -> Any:
        plain, compute, called = self._of
        if name in _ABOUT:
            return getattr(plain(), name)
        if name in _POINTERS:
            raise _refusal(called, f"asks for its memory (`{name}`)")
        if _writes(name):
            raise _refusal(called, f"writes to it (`{name}`)")
        if name == "data":  # what is written to it would be lost
            return AdaptedWeight(plain, functools.partial(_detached, compute), called)
        return getattr(compute(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _refusal(self._of[2], f"writes to it (`.{name} = ...`)")

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedWeight:
        return AdaptedWeight(*copy.deepcopy(self._of, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return AdaptedWeight, self._of

    def __repr__(self) -> str:
        return f"AdaptedWeight({self._of[2]!r}, {tuple(self.shape)})"

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What a function of torch gives of the adapted weight."""
        given = dict(kwargs or {})
        written = (args[:1] if _writes(getattr(func, "__name__", "")) else ()) + (given.get("out"),)
        for one in written:
            if type(one) is cls:
                raise _refusal(_parts(one)[2], f"writes to it (`{func.__name__}`)")
        return func(*torch_pytree.tree_map(computed, args), **torch_pytree.tree_map(computed, given))


def _writes(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def computed(value: Any) -> Any:
    """The adapted tensor that an `AdaptedWeight` stands for; anything else as it is."""
    return _parts(value)[1]() if type(value) is AdaptedWeight else value


def _parts(weight: Any) -> tuple[Callable[[], Tensor], Callable[[], Tensor], str]:
    return object.__getattribute__(weight, "_of")


def _detached(compute: Callable[[], Tensor]) -> Tensor:
    return compute().detach()


def _refusal(name: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: the model {what}, and an adapter acts there: the weight is W + ΔW, made at each reading. Leave the "
        f"layer out of the adapter (exclude_modules), or merge: peftfn.merge."
    )


def _operator(name: str) -> Callable[..., Any]:
    def run(self: AdaptedWeight, *args: Any) -> Any:
        return getattr(self._of[1](), name)(*map(computed, args))

    return run


_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
for _name in (
    *(f"__{side}{one}__" for one in _OPERATORS for side in ("", "r")),
    *("__neg__", "__pos__", "__abs__", "__invert__", "__getitem__", "__len__", "__iter__", "__bool__", "__float__"),
    *("__int__", "__index__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__"),
):
    if hasattr(Tensor, _name):
        setattr(AdaptedWeight, _name, _operator(_name))
