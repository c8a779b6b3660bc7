"""What is known of each kind of base weight: how to run the layer, read its weight, and write it back.

A method never asks how a weight is stored. `of(module)` picks the codec from one table; a new format is one
file here and one line in the table, and every method works on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.weights import offloaded
from peftfn.weights.codecs import any_linear, bitsandbytes_4bit, bitsandbytes_8bit, gptq
from peftfn.weights.codecs.packed_linear import Packed
from peftfn.weights.codecs.state_dict_entry import Entry


class Codec(NamedTuple):
    """One kind of base weight.

    Attributes:
        matches: whether a module's weight is of this kind.
        is_linear: whether such a module is a linear layer although it is no `nn.Linear`.
        run: `(module, *args) -> output`, what the layer's own forward computes; writes nothing to the module.
        product: `(module, x) -> (W, b)` where that is one product with W, dense or packed, and no more; else `None`.
        shape: `(module, name) -> shape` of the weight as a dense tensor.
        read: `(module, name) -> tensor`, the weight as a dense tensor in the layer's own layout.
        find: `(params, name, module or None) -> Entry`: the weight among parameters by name, or `None` where what has
            that name is not of this kind.
        shared: `(module) -> objects` that belong to the weight and are never copied.
    """

    matches: Callable[[nn.Module], bool]
    is_linear: bool
    run: Callable[..., Any]
    product: Callable[[nn.Module, Tensor], tuple[Tensor | Packed, Tensor | None] | None]
    shape: Callable[[nn.Module, str], torch.Size]
    read: Callable[[nn.Module, str], Tensor]
    find: Callable[[Mapping[str, Tensor], str, nn.Module | None], Entry | None]
    shared: Callable[[nn.Module], list[Any]]


def _codec(of: Any, is_linear: bool = False) -> Codec:
    return Codec(of.matches, is_linear, of.run, of.product, of.shape, of.read, of.find, of.shared)


# --- dense floating-point weights: where no format claims the layer ---------------------------------------------------

# torch's own forwards: one that somebody put in their place may compute more.
_FORWARDS = frozenset((nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward))
_PLAIN = (Tensor, nn.Parameter)  # a subclass may be packed, or spread over devices


def _is_dense(module: nn.Module) -> bool:
    return True  # what no other codec claims


def has_own_forward(module: nn.Module) -> bool:
    """Whether a dense layer's class computes something else than its kind: then it is adapted through its weight."""
    cls = type(module)
    return cls.forward not in _FORWARDS and _computes_its_own(cls, cls.forward) and of(module) is DENSE


@transforms.constant_result
def _computes_its_own(cls: type[nn.Module], forward: Any) -> bool:
    home = next(one for one in cls.__mro__ if "forward" in vars(one))
    is_conv1d = home.__name__ == "Conv1D" and home.__module__.startswith("transformers.")
    is_known = forward is nn.Embedding.forward or is_conv1d
    return not is_known and not _multiplies_what_it_looks_up(cls)


# All that the forward of transformers' scaled embeddings names: `super().forward(ids) * self.embed_scale`.
_SCALED = frozenset(("super", "forward", "embed_scale", "to", "weight", "dtype"))


@transforms.constant_result
def _multiplies_what_it_looks_up(cls: type[nn.Module]) -> bool:
    home: Any = next(one for one in cls.__mro__ if "forward" in vars(one))
    is_named = home.__name__.endswith("ScaledWordEmbedding") and home.__module__.startswith("transformers.")
    return is_named and issubclass(cls, nn.Embedding) and {*home.forward.__code__.co_names} <= _SCALED


def lookup_scale(module: nn.Module) -> Any:
    """What an embedding multiplies its rows by after looking them up (Gemma's does), or `None`."""
    return cast("Any", module).embed_scale if _multiplies_what_it_looks_up(type(module)) else None


def compute(module: nn.Module, weight: Tensor | None, bias: Tensor | None, input: Tensor) -> Tensor:  # noqa: A002
    """What a layer whose forward is its kind's computes with these tensors in place of its own."""
    assert weight is not None, "a layer has a weight"
    if isinstance(module, nn.Embedding):
        ways = module.padding_idx, None, module.norm_type, module.scale_grad_by_freq, module.sparse
        found, scale = F.embedding(input, weight, *ways), lookup_scale(module)
        return found if scale is None else found * (scale.to(weight.dtype) if isinstance(scale, Tensor) else scale)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return cast("Any", module)._conv_forward(input, weight, bias)  # noqa: SLF001  # all of its forward but the names
    if isinstance(module, nn.Linear):
        return F.linear(input, weight, bias)
    flat = input.view(-1, input.shape[-1])  # transformers' Conv1D, by the same product: the same bits
    product = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return product.view(*input.shape[:-1], -1)


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # What adapters make of the weight is put before the module's own (`models.read_weights`): Dynamo may not see it.
    is_before = torch.compiler.is_compiling() or "weight" in module.__dict__
    if not is_before or has_own_forward(module) or module._parameters.get("weight") is None:
        return type(module).forward(module, *args, **kwargs)
    weight = cast("Tensor", module._parameters["weight"])
    return compute(module, weight, _beside(weight, module._parameters.get("bias")), *args, **kwargs)


def _beside(weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias in the weight's dtype: one that an adapter has put in place of a half-precision one may be wider."""
    return bias if bias is None or bias.dtype == weight.dtype else bias.to(weight.dtype)


def _product(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    if type(module).forward not in _FORWARDS:
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return None if weight is None or type(weight) not in _PLAIN else (weight, _beside(weight, bias))


def _shape(module: nn.Module, name: str) -> torch.Size:
    return _held(module, name).shape


def _read(module: nn.Module, name: str) -> Tensor:
    found = _held(module, name)
    # A tensor that accelerate keeps elsewhere is read from there.
    there = offloaded.value(module, name) if found.is_meta else None
    return found if there is None else there


def _held(module: nn.Module, name: str) -> Tensor:
    # Not by getattr where it can be helped: parametrizations and bound modules have a property of that name.
    own = module._parameters.get(name)
    return getattr(module, name) if own is None else own


def _find(params: Mapping[str, Tensor], name: str, module: nn.Module | None) -> Entry | None:
    return None  # it needs no unpacking


def _shared(module: nn.Module) -> list[Any]:
    return []


DENSE = Codec(_is_dense, False, _run, _product, _shape, _read, _find, _shared)

# --- the table --------------------------------------------------------------------------------------------------------

TABLE: tuple[Codec, ...] = (
    _codec(bitsandbytes_4bit),
    _codec(bitsandbytes_8bit),
    _codec(gptq, is_linear=True),
    _codec(any_linear, is_linear=True),
    DENSE,
)
BY_RUN: dict[Any, Codec] = {codec.run: codec for codec in TABLE}

_KEPT = "_peftfn_codec"
_BY_CLASS: dict[tuple[type, type], Codec] = {}


def of(module: nn.Module) -> Codec:
    """The codec of a module's weight: the first of the table that matches its class, and that of its weight."""
    if _KEPT in module.__dict__:
        return cast("Codec", module.__dict__[_KEPT])
    if torch.compiler.is_compiling():  # Dynamo would guard on what is in the dictionary, and compile again
        return next(codec for codec in TABLE if codec.matches(module))
    cls = type(module), type(cast("object", module._parameters.get("weight")))
    found = _BY_CLASS.get(cls)
    if found is None:
        found = _BY_CLASS[cls] = next(codec for codec in TABLE if codec.matches(module))
    return found


def keep(attributes: dict[str, Any], codec: Codec) -> None:
    """Note the codec in a twin's attributes: `of` still finds it when a dense weight replaces the packed one."""
    if codec is not DENSE:
        attributes[_KEPT] = codec


def bias(module: nn.Module) -> Tensor | None:
    """A module's bias; a packed layer may hold it as a buffer, or as an attribute that is neither (HQQ's)."""
    if of(module) is DENSE:
        return module._parameters.get("bias")
    return {**module.__dict__, **module._buffers, **module._parameters}.get("bias")


def replaceable(module: nn.Module) -> set[str]:
    """The names of the parameters that can be trained in place of a module's own: a packed weight's is `weight`."""
    if of(module) is DENSE:
        return {name for name, one in module._parameters.items() if one is not None}
    return {"weight"} | ({"bias"} if bias(module) is not None else set())


def holds_packed(model: nn.Module, name: str) -> bool:
    """Whether a name is that of a weight that its module holds packed, under other names, or of a bias beside it."""
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return own in ("weight", "bias") and of(module) is not DENSE


def packed_modules(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Codec]]:
    """Those of the modules whose weight is packed, with their codecs."""
    for module in modules:
        codec = of(module)
        if codec is not DENSE:
            yield module, codec


def shared(root: nn.Module) -> list[Any]:
    """The objects beside parameters and buffers (quant states) that a copy which shares the weights must share too."""
    return [one for module, codec in packed_modules(root.modules()) for one in codec.shared(module)]


def find(params: Mapping[str, Tensor], name: str, module: nn.Module | None = None) -> Entry | None:
    """The packed weight of that name among parameters by name, or `None` for a dense one."""
    found = (codec.find(params, name, module) for codec in TABLE)
    return next((entry for entry in found if entry is not None), None)
