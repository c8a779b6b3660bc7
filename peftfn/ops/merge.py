"""`merge`: the base's weights with an adapter in them, as new tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import UNKNOWN, Adapter, Leaf, SiteInfo, as_tuple, leaf_of, site_paths
from peftfn.core.config import PeftConfig
from peftfn.core.transforms import is_traced
from peftfn.methods import Method, companions, leaf_dtypes
from peftfn.models import layers, layouts
from peftfn.models.layers import Place
from peftfn.ops import tied_names, tied_tables, validate
from peftfn.weights import codecs, offloaded
from peftfn.weights.codecs.state_dict_entry import Entry


def merge(
    params: Mapping[str, Tensor],
    adapter: Adapter | Iterable[Adapter],
    *,
    model: nn.Module | None = None,
    requantize: bool = False,
) -> dict[str, Tensor]:
    """A new dict of base parameters in which the adapter's sites hold adapted weights.

    `functional_call(model, merge(params, a), batch)` computes what `apply(model, a, batch)` does. Entries that the
    adapter does not touch are the same tensor objects; `params` itself is left as it is, so dropping the adapter is
    going on with the old dict. Differentiable in params and adapter.

    Of a quantized model, the entries of the adapter's sites become dense tensors in the dtype that they had before they
    were quantized (float32 from 8 bits), and entries that only served to read them go; `apply(..., params=merged)`
    takes them, and so does a model of plain layers. With `requantize` they are quantized again, in the same format with
    the same settings and under the same names: what is lost is the format's own rounding, of the sum.

    Weights that the model ties come apart where the adapter changes only one of them. With `model=` both names are in
    the result, the other one with the weight as it was: run it with `apply(model, (), batch, params=merged)` or
    `functional_call(..., tie_weights=False)`. Loaded into a model that ties them, one would overwrite the other:
    `bind(model, a).save_pretrained(folder, merge=True)` and `merge_folder` write a model that does not tie.

    Args:
        params: base parameters by name, `dict(model.named_parameters())` or a state dict. Give biases too: a method may
            change them with their weights.
        adapter: one adapter or several, merged in order.
        model: says what it ties, and is needed where shapes do not tell how a square weight is stored (transposed
            experts; a mix of `nn.Linear` and transformers' `Conv1D`), and for packed weights that cannot be read
            without their module; the error says so.
        requantize: whether packed weights are packed again.

    Raises:
        TypeError: `params` is no mapping, or something else than single adapters was given: a stack is merged one by
            one.
        KeyError: `params` lacks a weight that the adapter changes.
        ValueError: a tensor does not fit, the adapter or a packed weight holds NaN or infinity, or what a packed weight
            is read by does not fit it; or, without `model`, names of one tensor come apart.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> params = dict(model.named_parameters())
        >>> merged = pf.merge(params, pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])))
        >>> merged["0.weight"] is params["0.weight"], merged["0.bias"] is params["0.bias"]
        (False, True)
    """
    validate.refuse_other_than_mapping(params)
    given = frozenset(params)
    merged = dict(params) if model is None else tied_names.every(offloaded.filled(model, params), model)
    params = dict(merged)
    packed: dict[str, Entry] = {}
    adapters = as_tuple(adapter)
    for one in adapters:
        if one.members is not None:
            raise TypeError(
                "merge was given a stack; merge its adapters one by one (peftfn.unstack), or under torch.vmap."
            )
        validate.refuse_not_finite(one)
    for number, one in [(n, piece) for n, several in enumerate(adapters) for piece in companions.pieces(several)]:
        method = methods.of(one.config)
        for path in site_paths(one):
            packed.update(_unpack(merged, one, method, path, model))
            here = change(merged, one, path, model)
            there = tied_tables.followers(here.table, here.info, merged, adapters[number], model)
            made = changed(here, merged)
            merged.update(tied_tables.followed(there, here, made, merged, changed))
            merged.update(made)
    for name, entry in packed.items():
        if requantize:
            again = entry.pack(merged[name])
            if name not in again:  # what is packed has names of its own
                del merged[name]
            merged.update(again)
    if model is None:
        tied_names.refuse_apart(merged, params)
    else:
        tied_names.settle(merged, params, given, model)
    return merged


def _unpack(
    merged: dict[str, Tensor], adapter: Adapter, method: Method, path: str, model: nn.Module | None
) -> dict[str, Entry]:
    """Put a dense tensor in place of a site's packed weight, and say what was there."""
    leaf = leaf_of(adapter, path)
    name = f"{path}.weight" if path else "weight"
    module = layers.module_at(model, path) if model is not None else None
    bias = None if module is None or codecs.of(module) is codecs.DENSE else codecs.bias(module)
    if bias is not None:  # one that is neither a parameter nor a buffer would be lost
        merged.setdefault(f"{path}.bias" if path else "bias", bias)
    if method.on_weights is None or ("weight" not in leaf and all(method.replaces(one) for one in leaf)):
        return {}
    entry = codecs.find(merged, name, module)
    if entry is None:
        return {}
    if not entry.dense.is_meta and not is_traced(entry.dense) and not bool(torch.isfinite(entry.dense).all()):
        raise ValueError(f"{name}: unpacked, it has values that are NaN or infinite; its scales are spoilt.")
    merged[name] = entry.dense
    for companion in entry.companions:
        del merged[companion]
    return {name: entry}


class Change(NamedTuple):
    """What one adapter does to the tensors at one of its sites.

    Attributes:
        adapter: the adapter.
        method: its method.
        path: the site.
        leaf: the method's tensors there, params and buffers together; empty where it only replaces.
        place: where the weight is that the leaf changes, or `None` where there is no leaf.
        replaced: tensors that take the place of others, by name.
    """

    adapter: Adapter
    method: Method
    path: str
    leaf: Leaf
    place: Place | None
    replaced: dict[str, Tensor]

    @property
    def info(self) -> SiteInfo:
        """What the adapter knows of the site."""
        return self.adapter.sites.get(self.path, UNKNOWN)

    @property
    def names(self) -> dict[str, str]:
        """The names of the tensors that the leaf reads, as the method calls them: a weight, and a layer's bias."""
        if self.place is None:
            return {}
        action = self.method.on_weights
        has_bias = action is not None and "bias" in action.reads and self.place.kind not in layers.WEIGHT_KINDS
        bias = {"bias": self.place._replace(weight="bias").name} if has_bias else {}
        return {"weight": self.place.name, **bias}

    @property
    def table(self) -> Place | None:
        """Where the table is that it changes, of a method of tables (`OnWeights.of_tables`)."""
        return self.place if self.method.of_tables else None


def change(params: Mapping[str, Tensor], adapter: Adapter, path: str, model: nn.Module | None) -> Change:
    """What the adapter does at one site; only the names and shapes of `params` are read.

    Raises:
        KeyError: `params` or the model lacks what the adapter changes.
        ValueError: shapes do not fit, or do not tell how the weight is stored; or the method cannot be merged.
    """
    method, trained = methods.of(adapter.config), adapter.params.get(path, {})
    both = leaf_of(adapter, path)
    leaf = {name: tensor for name, tensor in both.items() if not method.replaces(name)}
    replaced = {f"{path}.{name}" if path else name: both[name] for name in both.keys() - leaf.keys()}
    for name in both.keys() - leaf.keys():
        key = f"{path}.{name}" if path else name
        if key not in params and name in trained:  # buffers need not be among the parameters
            raise _missing(key, params)
    place = None
    if leaf:
        if method.on_weights is None:
            raise _without_weights(adapter.config)
        if method.invocation and getattr(adapter.config, method.invocation):
            raise ValueError(
                "alora_invocation_tokens: the adapter acts on some tokens alone, and no weight does that, so it cannot "
                "be merged. Run it with peftfn.apply or peftfn.bind."
            )
        place = layers.find(model, path) if model is not None else _guess(params, adapter, method, path, leaf)
        if place is None:
            raise KeyError(f"the adapter has a site {path!r}, which {type(model).__name__} does not have.")
        if place.name not in params:
            raise _missing(place.name, params)
    return Change(adapter, method, path, leaf, place, replaced)


def _without_weights(config: PeftConfig) -> ValueError:
    """The error about a method that changes what a module is given, not a weight."""
    return ValueError(
        f"{type(config).__name__}: this method changes what the model is given, not its weights, so it cannot be "
        "merged. Run it with peftfn.apply or peftfn.bind."
    )


def changed(one: Change, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a change makes, by name, from those of `params` that it reads."""
    found = {
        name: leaf_dtypes.in_place_of(params[name], tensor, one.method) if name in params else tensor
        for name, tensor in one.replaced.items()
    }
    if one.place is None:
        return found
    if params[one.place.name].is_meta and not all(tensor.is_meta for tensor in one.leaf.values() if tensor.dim()):
        raise ValueError(
            f"{one.place.name} is on the meta device and has no values to merge into. If accelerate offloads it, pass "
            "model=model; else load the model with its weights."
        )
    try:
        there = {key: found.get(key, params.get(key)) for key in one.names.values()}
        given = {name: tensor for name, key in one.names.items() if (tensor := there[key]) is not None}
        action = one.method.on_weights
        assert action is not None, "change has refused others"
        shape = layouts.of_tensor(one.place.kind, params[one.place.name], one.info)
        leaf = leaf_dtypes.widened(one.leaf, params[one.place.name].dtype)
        made = action.merge(one.adapter.config, leaf, shape, given)
    except (RuntimeError, ValueError) as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in one.leaf.items() if tensor.dim()}
        raise ValueError(
            f"{one.path}: cannot merge {shapes} into {one.place.name} of shape "
            f"{tuple(params[one.place.name].shape)}: {error}"
        ) from error
    return {**found, **{one.names[name]: tensor for name, tensor in made.items()}}


def of_rows(one: Change, rows: slice) -> Change | None:
    """The change of some rows of a weight alone; `None` where more changes, or its method has nothing of the kind."""
    is_whole = one.place is not None and not one.replaced and one.info.rows is None
    leaf = one.method.of_rows(one.leaf, one.place.kind, rows) if one.place and is_whole else None
    return None if leaf is None else one._replace(leaf=leaf)


def _guess(params: Mapping[str, Tensor], adapter: Adapter, method: Method, path: str, leaf: Leaf) -> Place:
    """Where a site's weight is, from names, shapes and what the adapter knows of the site."""
    info = adapter.sites.get(path, UNKNOWN)
    owner, _, name = path.rpartition(".")
    for place in (Place(path, "weight", ""), Place(path, "in_proj_weight", ""), Place(owner, name, "")):
        if place.name in params:
            weight = params[place.name]
            bare = place.weight == "in_proj_weight" or place.owner != path
            kinds = [
                kind
                for kind in method.kinds(adapter.config, path, leaf, weight.shape, info)
                if (kind in layers.WEIGHT_KINDS) == bare
            ]
            as_noted = layouts.output_axis(info.kind)
            kinds = [kind for kind in kinds if info.kind and layouts.output_axis(kind) == as_noted] or kinds
            if len({layouts.output_axis(kind) for kind in kinds}) > 1 and not method.of_tables:
                kinds = [_stored(params, adapter, method, path, kinds)]
            if not kinds:
                shapes = {name: tuple(tensor.shape) for name, tensor in leaf.items() if tensor.dim()}
                raise ValueError(
                    f"{path}: the adapter has {shapes}, which fits no layer with a weight of shape "
                    f"{tuple(weight.shape)}; it was made for a model of another size."
                )
            return place._replace(kind=kinds[0])
    raise _missing(f"{path}.weight", params)


def _stored(params: Mapping[str, Tensor], adapter: Adapter, method: Method, path: str, kinds: list[str]) -> str:
    """The kind of a square weight, which may be stored either way: as the config says, if others agree."""
    config: Any = adapter.config
    if kinds == [layers.LINEAR, layers.TRANSPOSED]:
        stated = kinds[bool(getattr(config, "fan_in_fan_out", False))]
        others = [
            method.kinds(config, other, leaf, params[f"{other}.weight"].shape, adapter.sites.get(other, UNKNOWN))
            for other, leaf in adapter.params.items()
            if f"{other}.weight" in params and not all(method.replaces(name) for name in leaf)
        ]
        seen = {one[0] for one in others if len(one) == 1 and one[0] in kinds}
        if seen <= {stated}:
            return stated
    raise ValueError(
        f"{path}: a square weight, and nothing here says whether it is stored (out, in) or (in, out); pass model=... "
        "to merge."
    )


def _missing(name: str, params: Mapping[str, Tensor]) -> KeyError:
    last = name.rpartition(".")[2]
    near = [key for key in params if key.endswith(last)][:3]
    return KeyError(
        f"params has no {name!r}, which the adapter changes (it has e.g. {', '.join(near or list(params)[:3])}). Give "
        "dict(model.named_parameters(remove_duplicate=False)) or model.state_dict(), which has tied weights under each "
        "name."
    )
