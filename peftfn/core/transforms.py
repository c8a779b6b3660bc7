"""Private names of torch and optree: which transforms are active, and a few kernels without a public name.

This is the one file of the package that uses such names. Each of them may be gone in another version, and then what is
assumed is right everywhere, if slower: that some transform is active, that a tensor may be mapped, that a kernel is not
there. So a name that is gone costs time, never a wrong number, and `import peftfn` never fails for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
"""torch's, for what no name tells."""

F = TypeVar("F", bound=Callable[..., Any])


def private(module: str, *names: str) -> Any:
    """The object `module.name.name`, or `None` where this version has no such module or name."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in names:
        found = getattr(found, name, None)
        if found is None:
            return None
    return found


_FUNCTORCH = "torch._C._functorch"
_stack = private(_FUNCTORCH, "get_interpreter_stack")
_level = private(_FUNCTORCH, "maybe_current_level")
_is_wrapper = private(_FUNCTORCH, "is_functorch_wrapped_tensor")
_is_batched = private(_FUNCTORCH, "is_batchedtensor")
_unwrap = private(_FUNCTORCH, "get_unwrapped")
_kinds = private(_FUNCTORCH, "TransformType")
_task = private("torch._C", "_current_graph_task_id")
_forward: Any = importlib.import_module("torch.autograd.forward_ad")

OPTREE_GLOBAL: Any = private("optree.registry", "__GLOBAL_NAMESPACE") or "peftfn"
"""optree's namespace for nodes that need none to be given; where it is gone, one that has to be given."""

# --- which transforms are active -------------------------------------------------------------------------------------


def is_transforming() -> bool:
    """Whether a transform of `torch.func` is active in this thread."""
    return _level is None or _level() is not None


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is active outside of `torch.func`."""
    return getattr(_forward, "_current_level", 0) >= 0


def is_mapping() -> bool:
    """Whether a `torch.vmap` is active in this thread."""
    if _stack is None or _kinds is None:
        return True
    return any(level.key() == _kinds.Vmap for level in _stack() or ())


def is_backward() -> bool:
    """Whether autograd runs a backward pass in this thread, as where a checkpointed block runs again."""
    return _task is not None and _task() >= 0


def is_one_gradient() -> bool:
    """Whether one `torch.func.grad` is active, and no other transform."""
    if _stack is None or _kinds is None:
        return False
    levels = _stack()
    return levels is not None and len(levels) == 1 and levels[0].key() == _kinds.Grad


# --- what is known of a tensor ---------------------------------------------------------------------------------------


def is_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor is a wrapper that a transform of `torch.func` made, so that its values cannot be looked at."""
    return _is_wrapper is None or _is_wrapper(tensor)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a `torch.vmap` that is active maps over the tensor."""
    if _is_wrapper is None or _is_batched is None or _unwrap is None:
        return is_mapping()
    while _is_wrapper(tensor):
        if _is_batched(tensor):
            return True
        tensor = _unwrap(tensor)
    return False


def viewed(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of, or `None`."""
    return getattr(tensor, "_base", None)


def is_traced(*tensors: Tensor) -> bool:
    """Whether the values cannot be looked at now: under `torch.compile`, or inside a transform of `torch.func`."""
    return torch.compiler.is_compiling() or any(map(is_wrapped, tensors))


def requires_grad_outside(tensor: Tensor) -> bool:
    """Whether a tensor in one `torch.func.grad` requires grad outside of it too."""
    if _is_wrapper is None or _unwrap is None:
        return True
    return (_unwrap(tensor) if _is_wrapper(tensor) else tensor).requires_grad


def requires_any_grad(tensor: Tensor) -> bool:
    """Whether a gradient of the tensor is asked for, at any level of transforms."""
    while not tensor.requires_grad:
        if _is_wrapper is None or _unwrap is None or not _is_wrapper(tensor):
            return _is_wrapper is None
        tensor = _unwrap(tensor)
    return True


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` makes the tensor's gradient; `False` also where torch does not say."""
    return _is_wrapper is not None and _is_wrapper(tensor) and requires_any_grad(tensor)


# --- whether a backward pass may itself be differentiated ------------------------------------------------------------

# `torch.func.grad` records a graph of its backward pass, because a transform around it, or autograd outside, may need
# the derivative of what it returns. Where there is neither, the graph is not needed, and without it the pass may
# overwrite its own intermediate tensors. This holds only where `torch.func.grad` itself started the pass: a function
# that calls `torch.autograd.grad(..., create_graph=True)` inside does differentiate that pass.

_engine_caller: Any = private("torch._functorch.eager_transforms", "_autograd_grad", "__code__")
_ENGINE = torch.autograd.grad.__code__


def without_graph(tensors: Iterable[Tensor | None]) -> contextlib.AbstractContextManager[Any]:
    """A context without gradients, where nothing can differentiate a backward pass that computes with these tensors."""
    return torch.no_grad() if _is_last(tensors) else contextlib.nullcontext()


def _is_last(tensors: Iterable[Tensor | None]) -> bool:
    if not is_one_gradient():
        return False
    given = (one for one in tensors if one is not None)
    return not any(map(requires_grad_outside, given)) and _is_called_by_torch()


def _is_called_by_torch() -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _ENGINE:
        frame = frame.f_back
    # A GPU's backward pass runs in a thread of its own, where no frame says who asked for it.
    return frame is not None and frame.f_back is not None and frame.f_back.f_code is _engine_caller


# --- kernels without a public name -----------------------------------------------------------------------------------

_unsafe_view = private("torch", "ops", "aten", "_unsafe_view")
_FLASH = 1  # of `torch._fused_sdp_choice`, as in torch.nn.attention.SDPBackend
_sdp_choice = private("torch", "_fused_sdp_choice")
FLASH: Any = private("torch", "ops", "aten", "_scaled_dot_product_flash_attention_for_cpu", "default")
FLASH_BACKWARD: Any = private("torch", "ops", "aten", "_scaled_dot_product_flash_attention_for_cpu_backward", "default")


def would_run_flash(*args: Any, **kwargs: Any) -> bool:
    """Whether `F.scaled_dot_product_attention` would run its fused kernel for CPUs, `FLASH`, on these arguments."""
    if _sdp_choice is None or FLASH is None or FLASH_BACKWARD is None:
        return False
    return _sdp_choice(*args, **kwargs) == _FLASH


def unviewed(tensor: Tensor) -> Tensor:
    """The same numbers in the same memory, as a tensor that is no view.

    A view that is made inside a `torch.autograd.Function` cannot be changed in place after it: autograd has no rule for
    the tensor that it is a view of, which nobody outside has ever seen. `F.linear` of three axes with a bias returns a
    view, and so does every `view` at the end of a forward. Only for a tensor whose base is dropped with it.
    """
    return tensor.clone() if _unsafe_view is None else _unsafe_view(tensor, tensor.shape)


_VIEWS_MAPPED = VERSION >= (2, 13)  # older ones have no rule for a view as another dtype under `torch.vmap`
_BYTE, _BYTES = 8, 8  # bits of a byte, bytes of an int64


def as_bytes(words: Tensor) -> Tensor:
    """(..., n) int64 as (..., 8 n) int8, the lowest bits first: `words.view(torch.int8)`."""
    if _VIEWS_MAPPED or not is_mapped(words):
        return words.view(torch.int8)
    shifts = torch.arange(0, _BYTE * _BYTES, _BYTE, device=words.device)
    return (words.unsqueeze(-1) >> shifts).to(torch.int8).flatten(-2)


def as_uint8(octets: Tensor) -> Tensor:
    """A tensor of bytes, or of truth values, as uint8: `octets.view(torch.uint8)`."""
    return octets.view(torch.uint8) if _VIEWS_MAPPED or not is_mapped(octets) else octets.to(torch.uint8)


def as_words(octets: Tensor) -> Tensor:
    """The inverse of `as_bytes`."""
    if _VIEWS_MAPPED or not is_mapped(octets):
        return octets.view(torch.int64)
    shifts = torch.arange(0, _BYTE * _BYTES, _BYTE, device=octets.device)
    return (cast("Any", octets.long() & 255).unflatten(-1, (-1, _BYTES)) << shifts).sum(-1)


@contextlib.contextmanager
def without_numbers() -> Generator[None]:
    """A context in which new tensors have a shape, a dtype and a device, but no storage.

    With torch's fake tensors the device is the CPU, of which code may ask what it asks of a device (autocast, as rotary
    embeddings of transformers 4 do); where they are gone it is the meta device.
    """
    fake = private("torch._subclasses.fake_tensor", "FakeTensorMode")
    if fake is None:
        with torch.device("meta"):
            yield
    else:
        with fake(), torch.device("cpu"):  # whatever the default device is
            yield


TRACES_WHOLE = VERSION >= (2, 12)
"""Whether Dynamo follows how a module object is made from another one's `__dict__`: older ones raise half-way."""


def traced_whole(function: F) -> F:
    """The function, which an older Dynamo calls as it is, between two graphs, and a newer one makes a part of a graph.

    Asked for one graph (`fullgraph=True`), the older one raises an error of its own that names the function.
    """
    return function if TRACES_WHOLE else cast("F", functools.wraps(function)(functools.partial(_untraced, function)))


def _untraced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # A program that compiles nothing does not load the compiler for this: 70 MB.
    run: Any = cast("Any", torch.compiler).disable(function) if "torch._dynamo" in sys.modules else function
    return run(*args, **kwargs)


TORCHS_OWN = ("torch._dynamo", "torch._C")
"""Where classes of torch's compiler and of its C library are: objects that nobody makes anew."""


def constant_result(function: F) -> F:
    """The function, marked as `torch.compiler.assume_constant_result` does: Dynamo calls it and keeps what it gives.

    torch's own decorator imports `torch._dynamo` to set this one attribute: 70 MB and most of the time that
    `import peftfn` would take, for a program that compiles nothing.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  # a name of torch's, which its types do not have
    return function
