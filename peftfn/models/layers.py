"""The kinds of layer that a method can act on, and `Site`: one such layer during one call."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core.adapter import SiteInfo
from peftfn.core.row_runs import Runs
from peftfn.weights import codecs
from peftfn.weights.codecs.packed_linear import Packed

LINEAR = "linear"
TRANSPOSED = "transposed linear"  # transformers' Conv1D: the weight is stored (in, out)
EMBEDDING = "embedding"
CONVOLUTION = "convolution"
PARAMETER = "parameter"  # a bare tensor: an MoE's experts, the projections of nn.MultiheadAttention
EXPERTS_TRANSPOSED = "transposed parameter"  # experts stored (experts, in, out)

MODULE = "module"  # any module at all, of whose own tensors copies are trained
ATTENTION = "attention"  # an attention module of a transformer, whole
MODEL = "model"  # the model itself: its call, not a layer

WEIGHT_KINDS = frozenset({PARAMETER, EXPERTS_TRANSPOSED})
"""Kinds whose tensor is read by the base itself: there the adapted tensor takes its place."""


class Place(NamedTuple):
    """Where a site is in a model.

    Attributes:
        owner: the path of the module that owns the tensor.
        weight: the tensor's name there.
        kind: one of the kinds of this file.
        rows: the output rows that the site is, where it is a part of a fused projection (`models.fused_projections`).
    """

    owner: str
    weight: str
    kind: str
    rows: Runs | None = None

    @property
    def name(self) -> str:
        """The tensor's name in `named_parameters()`."""
        return f"{self.owner}.{self.weight}" if self.owner else self.weight


class Site:
    """One layer of the base while a call runs (or, for `init`, as it stands).

    `site(x)` is what the layer would compute without the method: the base's own forward, or, where several
    adapters are active, the adapters before this one.

    Attributes:
        path: the module path, or the parameter path for a bare parameter.
        kind: one of the kinds of this file.
        layer: the module that owns the weight: a private twin during a call.
        weight_name: the attribute of `layer` that holds the weight.
        rows: the output rows to act on, or `None` for all.
        input_side: whether to act on what goes in, of a method that could act on either side.
    """

    __slots__ = ("_adapted", "_run", "input_side", "kind", "layer", "path", "rows", "weight_name")

    def __init__(
        self,
        path: str,
        kind: str,
        layer: nn.Module,
        weight_name: str,
        run: Callable[..., Any] | None = None,
        *,
        rows: Runs | None = None,
        input_side: bool = False,
        adapted: Callable[[], Mapping[str, Tensor | None]] | None = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.layer = layer
        self.weight_name = weight_name
        self._run = run
        self._adapted = adapted
        self.rows = rows
        self.input_side = input_side

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes without the method."""
        assert self._run is not None, "a site of init has nothing to run"
        return self._run(*args, **kwargs)

    def product(self, x: Tensor) -> tuple[Tensor | Packed, Tensor | None] | None:
        """Weight, dense or packed, and bias where `site(x)` is one product with it and no more; `None` elsewhere."""
        codec = codecs.BY_RUN.get(getattr(self._run, "func", None))
        return None if codec is None else codec.product(cast("Any", self._run).args[0], x)

    def running(self, run: Callable[..., Any]) -> Site:
        """This site with something else to run."""
        rows, side = self.rows, self.input_side
        return Site(
            self.path, self.kind, self.layer, self.weight_name, run, rows=rows, input_side=side, adapted=self._adapted
        )

    def run_with(self, tensors: Mapping[str, Tensor | None], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward computes with other tensors in place of its weight and bias.

        Args:
            tensors: `weight`, dense and in the layer's own layout, and `bias`.
            x: the input, which gets the weight's dtype.
            *args: what else the forward takes.
            **kwargs: the same.
        """
        layer, weight = self.layer, cast("Tensor", tensors["weight"])
        x = x.to(weight.dtype) if x.is_floating_point() else x
        if self.kind == TRANSPOSED or codecs.of(layer) is not codecs.DENSE:
            return F.linear(x, weight.mT if self.kind == TRANSPOSED else weight, tensors["bias"])
        return codecs.compute(layer, weight, tensors["bias"], x, *args, **kwargs)

    @property
    def tensors(self) -> Mapping[str, Tensor | None]:
        """Weight and bias, dense, as the adapters before this one leave them."""
        if self._adapted is not None:
            return self._adapted()
        return {"weight": codecs.of(self.layer).read(self.layer, self.weight_name), "bias": codecs.bias(self.layer)}

    @property
    def weight(self) -> Tensor:
        """The weight as a dense tensor in the layer's own layout, as the adapters before this one leave it."""
        return cast("Tensor", self.tensors["weight"])

    @property
    def bias(self) -> Tensor | None:
        """The bias alone, as those adapters leave it; nothing is unpacked for it."""
        return codecs.bias(self.layer) if self._adapted is None else self._adapted()["bias"]

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight, read without unpacking anything."""
        return codecs.of(self.layer).shape(self.layer, self.weight_name)

    @property
    def stored(self) -> Tensor:
        """The weight as it is held, packed or not, or another tensor of the layer: for its device and its dtype."""
        own = self.layer._parameters.get(self.weight_name)
        own = getattr(self.layer, self.weight_name, None) if own is None else own
        return own if isinstance(own, Tensor) else next(iter([*self.layer.parameters(), *self.layer.buffers()]))

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        return self.layer.training


def site_of(
    layer: nn.Module,
    place: Place,
    path: str,
    info: SiteInfo,
    run: Callable[..., Any] | None = None,
    adapted: Callable[[], Mapping[str, Tensor | None]] | None = None,
) -> Site:
    """The site at a path, with the rows and the side that the adapter knows of it."""
    rows, input_side = info.rows, info.input_side
    return Site(path, place.kind, layer, place.weight, run, rows=rows, input_side=input_side, adapted=adapted)


def shape_of(module: nn.Module, name: str) -> torch.Size:
    """The shape of a module's weight as a dense tensor."""
    return codecs.of(module).shape(module, name)


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or `None`."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, nn.Module]]:
    """`model.named_modules()`, with the types that torch leaves out."""
    return list(cast("Iterator[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=remove_duplicate)))


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module that is itself a site, or `None`."""
    cls = type(module)
    if cls not in _KINDS:
        _KINDS[cls] = _classify(module)
    return _KINDS[cls]


_KINDS: dict[type[nn.Module], str | None] = {}


def _classify(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear) or codecs.of(module).is_linear:
        return LINEAR
    if is_conv1d(module):
        return TRANSPOSED
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return CONVOLUTION
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, a linear layer with the weight stored (in, out)."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(module).__mro__)


def places(model: nn.Module, path: str) -> dict[str, Place]:
    """The sites that the module at `path` stands for, by site path; empty where no method can act.

    `nn.MultiheadAttention` stands for two: its input projection and its `out_proj`. Both weights are read by
    the attention itself (the forward of `out_proj` never runs), so both are parameters.
    """
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        if module._parameters.get("in_proj_weight") is None:
            raise ValueError(
                f"{path!r} is an nn.MultiheadAttention with separate projections (kdim or vdim differ); it has no "
                "in_proj_weight. Name them instead: target_parameters=['q_proj_weight', 'v_proj_weight']."
            )
        return {path: Place(path, "in_proj_weight", PARAMETER), **places(model, _join(path, "out_proj"))}
    parent = model.get_submodule(path.rpartition(".")[0]) if path else model
    kind = kind_of(module)
    if kind is None:
        return {}
    if isinstance(parent, nn.MultiheadAttention):
        kind = PARAMETER
    return {path: Place(path, "weight", kind)}


def modules_with_tensors(model: nn.Module, path: str) -> dict[str, Place]:
    """The module at `path` and those inside it that have parameters, each as a place of its own."""
    inside = named_modules(model.get_submodule(path))
    found = [path + (f".{name}" if name else "") for name, module in inside if codecs.replaceable(module)]
    return {one: Place(one, "", MODULE) for one in found}


def place_of_parameter(model: nn.Module, name: str) -> Place:
    """The place of a bare parameter, by its name."""
    owner, _, weight = name.rpartition(".")
    module = model.get_submodule(owner)
    transposed = getattr(module, weight).ndim == 3 and getattr(module, "is_transposed", False)
    return Place(owner, weight, EXPERTS_TRANSPOSED if transposed else PARAMETER)


def may_own(model: nn.Module | None, path: str, name: str) -> bool:
    """Whether the module at a path can own the parameter that a config calls so; without a model, by its path alone."""
    suffix, _, own = name.rpartition(".")
    module = None if model is None else module_at(model, path)
    is_there = module is None or own in module._parameters
    return is_there and (not suffix or path == suffix or path.endswith(f".{suffix}"))


def pattern_path(path: str, paths: Container[str]) -> str:
    """The path that rank and alpha patterns see: PEFT gives an attention's `out_proj` those of the attention."""
    parent, _, name = path.rpartition(".")
    return parent if name == "out_proj" and parent in paths else path


def find(model: nn.Module, path: str) -> Place | None:
    """The place that a site path names in this model, or `None` where the model has no such site."""
    try:
        model.get_submodule(path)
    except AttributeError:
        owner, _, weight = path.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            return None
        return place_of_parameter(model, path) if weight in module._parameters else None
    return places(model, path).get(path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
