"""`init` makes an adapter for a base."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftfn import methods
from peftfn.core.adapter import Adapter, SiteInfo, Tree, sorted_tree
from peftfn.core.config import PeftConfig
from peftfn.methods import Method, companions
from peftfn.models import layers, layouts, matching, targets, tied_weights, twins
from peftfn.ops import resized_tables
from peftfn.weights import codecs


def init(
    model: nn.Module,
    config: PeftConfig,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """A fresh adapter for the model: with the default init, one that changes nothing yet.

    A pure function: the same arguments give the same adapter, and the model and the global random state are left
    as they are.

    Args:
        model: the base; only its structure, shapes, dtypes and devices are read. It may be on the meta device.
        config: what to adapt, and how.
        generator: where random numbers come from; by default a new one seeded with 0. Give differently seeded ones
            to get different adapters.
        dtype: of the method's tensors. By default the weight's own, but float32 for a half-precision or packed one.

    Returns:
        The adapter. Its `config` is the given one with what the model decided filled in: target modules, heads, the
        base's name. Where the model's embeddings were resized since it was loaded, copies are among its buffers,
        and in its files, for the base has no such rows.

    Raises:
        ValueError: the config names nothing in this model (near names are offered), or something that its method
            cannot act on.
        TypeError: the config is of none of peftfn's methods; one of peft's is named with what makes one of ours.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
        >>> {path: sorted(leaf) for path, leaf in adapter.params.items()}
        {'0': ['lora_A', 'lora_B'], '2': ['bias', 'weight']}
    """
    method = methods.of(config)
    targets.check_task(model, config.task_type)
    _refuse_lazy(model)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    first = _of_method(model, method, config, generator, dtype)
    others = [
        _of_method(model, methods.of(other), other, generator, dtype)
        for other in methods.companion_configs(first.config)
    ]
    if method.on_weights is not None:
        first = _with_tables(model, first)
    return companions.united(first, tuple(others))


def _with_tables(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with the embeddings that the base on disk does not have so, where it trains none of their tensors."""
    found = {path: one for path, one in resized_tables.copies(model).items() if path not in adapter.params}
    return adapter.replace(buffers=sorted_tree({**adapter.buffers, **found})) if found else adapter


def _of_method(
    model: nn.Module, method: Method, config: PeftConfig, generator: torch.Generator, dtype: torch.dtype | None
) -> Adapter:
    """What a config asks for of its own method, and the modules that it trains whole."""
    heads = matching.HEADS.get(config.task_type or "", ())
    resolved = method.targets.resolve(model, config)
    params: Tree = {}
    buffers: Tree = {}
    sites: dict[str, SiteInfo] = {}
    places = method.targets.sites(model, resolved)
    _refuse_twice(places)
    found: dict[str, layers.Site] = {}
    # Where numbers are drawn, and as what, whatever torch's defaults are; methods move them.
    with generator.device, _as_float32():
        for path, place in places.items():
            owner, at = model.get_submodule(place.owner), layers.pattern_path(path, places)
            on_inputs = method.targets.input_side
            side = on_inputs is not None and on_inputs(resolved, at)
            is_made = place.weight and place.weight not in owner._parameters and codecs.of(owner) is codecs.DENSE
            if is_made:  # at each reading, which may write (spectral_norm)
                owner = twins.Twins(owner).root
            site = layers.Site(path, place.kind, owner, place.weight, rows=place.rows, input_side=side)
            tied = method.of_tables and place.kind == layers.EMBEDDING
            sites[path] = _noted(site, tied_weights.holders(model, path) if tied else ())
            params[path], buffers[path] = method.fresh(resolved, at, site, generator, dtype)
            found[path] = site
        if method.sharing is not None:
            for path, leaf in method.sharing.init(resolved, found, generator, dtype).items():
                for name, tensor in leaf.items():
                    (buffers if method.is_held(name) else params).setdefault(path, {})[name] = tensor
            homes = method.sharing.homes(resolved, list(sites), found)
            sites = {path: info._replace(shares=homes[path]) for path, info in sites.items()}
    params = {path: _detached(leaf) for path, leaf in params.items()}
    _add_replaced(model, resolved, heads, places, params, buffers)
    resolved = _with_base(model, resolved, any(place.kind == layers.TRANSPOSED for place in places.values()))
    return Adapter(sorted_tree(params), sorted_tree(buffers), resolved, sites)


def _refuse_lazy(model: nn.Module) -> None:
    """Refuse a model whose layers do not know their sizes yet."""
    lazy = [name for name, one in model.named_parameters() if nn.parameter.is_lazy(one)]
    if lazy:
        raise ValueError(
            f"{lazy[0]} has no shape yet: its layer is a lazy one, which takes it from the first batch. Run the model "
            "on one batch before."
        )


def _refuse_twice(places: Mapping[str, layers.Place]) -> None:
    """Refuse two sites that are one weight: in PEFT's files they have one key."""
    first: dict[tuple[str, str], str] = {}
    for path, place in places.items():
        other = first.setdefault((place.owner, place.weight), path)
        if other != path and place.rows is None and places[other].rows is None and place.weight:
            raise ValueError(
                f"{place.name} is named twice, as {other!r} and as {path!r}: target_modules and target_parameters name "
                "the same weight. Name it in one of them."
            )


def _as_float32() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if torch.get_default_dtype() == torch.float32 else _Float32()


class _Float32(TorchFunctionMode):
    """A context in which float32 is torch's default dtype, in this thread alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What the function makes."""
        given = dict(kwargs or {})
        if given.get("dtype") is None and func in _MAKE_FLOATS:
            return func(*args, **given | {"dtype": torch.float32})
        made = func(*args, **given)
        if given.get("dtype") is None and func in _INFER and made.dtype == torch.get_default_dtype():
            return func(*args, **given | {"dtype": torch.float32})
        return made


_MAKE_FLOATS = frozenset((torch.empty, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn, torch.linspace))
_INFER = frozenset((torch.tensor, torch.full, torch.arange))


def _noted(site: layers.Site, tied: Sequence[str]) -> SiteInfo:
    outputs = 0 if site.rows is None else site.shape[layouts.output_axis(site.kind)]
    return SiteInfo(site.kind, site.rows, outputs, site.input_side, tuple(tied))


def _detached(leaf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in leaf.items()}


def _add_replaced(
    model: nn.Module,
    config: PeftConfig,
    heads: Sequence[str],
    places: Mapping[str, layers.Place],
    params: Tree,
    buffers: Tree,
) -> None:
    """Whole modules (sites that are, `modules_to_save`) and biases that are trained: copies of the base's own."""
    names = cast("Sequence[str]", getattr(config, "modules_to_save", None) or ())
    whole = {path: model.get_submodule(path) for path, place in places.items() if place.kind == layers.MODULE}
    for path, module in {**whole, **targets.saved_modules(model, names, optional=heads)}.items():
        trained, kept = _own(module)
        params.setdefault(path, {}).update(_copies(trained))
        buffers.setdefault(path, {}).update(_copies(kept))
    for path in targets.biased(model, config, places):
        params.setdefault(path, {}).update(_copies({"bias": codecs.bias(model.get_submodule(path))}))


def _own(module: nn.Module) -> tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]]:
    """A module's parameters and persistent buffers; a packed weight, which cannot be trained as it is, is dense."""
    codec = codecs.of(module)
    if codec is not codecs.DENSE:
        return {"weight": codec.read(module, "weight"), "bias": codecs.bias(module)}, {}
    gone = module._non_persistent_buffers_set
    return module._parameters, {name: buffer for name, buffer in module._buffers.items() if name not in gone}


def _copies(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}


def _with_base(model: nn.Module, config: PeftConfig, transposed: bool) -> PeftConfig:
    changes: dict[str, Any] = {}
    if config.base_model_name_or_path is None:
        found = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
        if isinstance(found, str) and found:
            changes["base_model_name_or_path"] = found
    if config.task_type is None and config.auto_mapping is None:
        changes["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    if getattr(config, "fan_in_fan_out", transposed) != transposed:
        changes["fan_in_fan_out"] = transposed  # as PEFT, which corrects it from the layers that it finds
    return dataclasses.replace(config, **changes)
