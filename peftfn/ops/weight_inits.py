"""Inits that read the base: an adapter, and the weights of the base that go with it.

PEFT's `init_lora_weights` of "pissa", "olora" and "loftq" writes to the base; here the new weights are a value beside
the adapter, for `apply(model, adapter, batch, params=params)`. Both are needed from then on: the adapter alone does not
say what it computes. `combine([trained, started], [1, -1], "cat")` is the same for the unchanged base, exactly, where
nothing was rounded: of twice the rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from peftfn.core.adapter import Adapter, SiteInfo, Tree, sorted_tree
from peftfn.methods.lora_config import LoraConfig
from peftfn.models import layers
from peftfn.models.layers import Place
from peftfn.ops.init import init
from peftfn.weights import codecs
from peftfn.weights.codecs import bitsandbytes_4bit, bitsandbytes_8bit
from peftfn.weights.codecs.state_dict_entry import library

Params = dict[str, Tensor]


class Home(NamedTuple):
    """Where the weight of a site is kept.

    Attributes:
        weight: W, (out, in), in float32 or wider.
        put: `(W) -> entries`: a new weight as the base holds it, by name.
        get: `(entries) -> W`, what it is there.
    """

    weight: Tensor
    put: Callable[[Tensor], Params]
    get: Callable[[Params], Tensor]


Factors = tuple[Tensor, Tensor]  # A, (r, in), and B, (out, r)
Start = Callable[[Home, int, float], tuple[Factors, Params]]


def pissa(model: nn.Module, config: LoraConfig, *, dtype: torch.dtype | None = None) -> tuple[Adapter, Params]:
    """An adapter of each weight's largest singular values, and the base's weights without them.

    With W = U S Vᵀ: A = (S/s)^½ Vᵀ and B = U (S/s)^½ of the r largest, W' = W - s·B·A (PiSSA,
    https://arxiv.org/abs/2404.02948, section 3). What is trained then moves W where it is largest. Of a packed base, W'
    is packed again, and its rounding is all that the two together are off by.

    Args:
        model: the base; nothing of it is changed.
        config: its `init_lora_weights` is left at its default.
        dtype: of A and B, as in `init`.

    Returns:
        The adapter, and every parameter of the base by name, of which those of the adapter's sites are new.

    Raises:
        ValueError: a site is no linear layer of its own, r is more than its weight has, a packed weight cannot be
            packed again, `init_lora_weights` is set, or as in `init`.
        TypeError: the config is no LoraConfig.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> adapter, params = pf.pissa(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> x = torch.ones(1, 6)
        >>> torch.allclose(pf.apply(model, adapter, x, params=params), model(x), atol=1e-6)
        True
    """
    return _started(model, config, _principal, None, dtype)


def olora(model: nn.Module, config: LoraConfig, *, dtype: torch.dtype | None = None) -> tuple[Adapter, Params]:
    """An adapter of the first columns of each weight's Q R, and the base's weights without them.

    With W = Q R: A = the first r rows of R, B = the first r columns of Q, W' = W - s·B·A (OLoRA,
    https://arxiv.org/abs/2406.01775, algorithm 1).

    Args:
        model: the base; nothing of it is changed.
        config: its `init_lora_weights` is left at its default.
        dtype: of A and B, as in `init`.

    Returns:
        As `pissa`: the adapter, and every parameter of the base by name, of which those of its sites are new.

    Raises:
        ValueError: as `pissa`.
        TypeError: the config is no LoraConfig.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> adapter, params = pf.olora(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> B = adapter.params["0"]["lora_B"]
        >>> torch.allclose(B.T @ B, torch.eye(2), atol=1e-6)
        True
    """
    return _started(model, config, _orthogonal, None, dtype)


def loftq(
    model: nn.Module,
    config: LoraConfig,
    *,
    bits: int | None = None,
    iterations: int = 1,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Adapter, Params]:
    """An adapter that makes up for a quantization, and the quantized weights of the base.

    Alternately Q = quantized(W - s·B·A) and s·B·A = the r largest singular values of W - Q, from A = B = 0 on (LoftQ,
    https://arxiv.org/abs/2310.08659, algorithm 1). Nothing promises that W - Q - s·B·A gets smaller each time, for
    quantization is no projection; of trained weights it did. PEFT leaves the scaling s out of A and B, so that its
    start is off where alpha is not r; here s·B·A is what the algorithm says for any alpha.

    Args:
        model: the base; nothing of it is changed. A dense one gets the values of the quantized weights, as dense
            tensors; one that is packed already (bitsandbytes, GPTQ) is packed again, in its own format.
        config: its `init_lora_weights` is left at its default, or "loftq".
        bits: for a dense base, 4 (bitsandbytes' nf4, the default) or 8 (a scale for each row).
        iterations: how often both are done.
        weights: the dense weights by name, as a state dict has them, where they are not the model's own: those of a
            packed base from before it was.
        dtype: of A and B, as in `init`.

    Returns:
        The adapter, and every parameter of the base by name, of which those of the adapter's sites are new.

    Raises:
        ValueError: as `pissa`; `bits` or `iterations` is out of its range; or the base is packed already and `weights`
            is missing, or `bits` is given.
        TypeError: the config is no LoraConfig.
        KeyError: `weights` lacks one.
        ImportError: bitsandbytes, which quantizes a dense base, is not installed.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> adapter, params = pf.loftq(model, pf.LoraConfig(r=8, target_modules=["0"]), bits=4, iterations=3)
        >>> quantized = params["0.weight"]
        >>> ours = pf.merge(params, adapter)["0.weight"]
        >>> bool((ours - model[0].weight).norm() < (quantized - model[0].weight).norm())
        True
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations!r}; expected 1 or more.")
    if bits not in (None, *_ROUNDED):
        raise ValueError(f"bits={bits!r}; expected 4 (nf4) or 8.")

    def start(home: Home, r: int, scaling: float) -> tuple[Factors, Params]:
        a, b = home.weight.new_zeros(r, home.weight.shape[1]), home.weight.new_zeros(home.weight.shape[0], r)
        entries: Params = {}
        for _ in range(iterations):
            entries = home.put(home.weight - scaling * b @ a)
            a, b = _largest(home.weight - home.get(entries), r, scaling)
        return (a, b), entries

    rounded = _Rounded(bits, weights)
    return _started(model, config, start, rounded, dtype)


class _Rounded(NamedTuple):
    """What `loftq` was given beside the model."""

    bits: int | None
    weights: Mapping[str, Tensor] | None


def _principal(home: Home, r: int, scaling: float) -> tuple[Factors, Params]:
    a, b = _largest(home.weight, r, scaling)
    return (a, b), home.put(home.weight - scaling * b @ a)


def _orthogonal(home: Home, r: int, scaling: float) -> tuple[Factors, Params]:
    q, rest = cast("tuple[Tensor, Tensor]", torch.linalg.qr(home.weight))
    a, b = rest[:r], q[:, :r]
    return (a, b), home.put(home.weight - scaling * b @ a)


def _largest(matrix: Tensor, r: int, scaling: float) -> Factors:
    """A and B of which s·B·A is the best approximation of rank r."""
    u, s, v = cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(matrix, full_matrices=False))
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * v[:r], u[:, :r] * root


@torch.no_grad()
def _started(
    model: nn.Module, config: LoraConfig, start: Start, rounded: _Rounded | None, dtype: torch.dtype | None
) -> tuple[Adapter, Params]:
    if not isinstance(cast("object", config), LoraConfig):
        raise TypeError(f"expected a LoraConfig, got a {type(config).__name__}: these inits are LoRA's.")
    if config.init_lora_weights is not True and not (rounded and config.init_lora_weights == "loftq"):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r}, and this function is another init; leave it out."
        )
    adapter = init(model, dataclasses.replace(config, init_lora_weights=True), dtype=dtype)
    params: Params = dict(model.named_parameters(remove_duplicate=False))
    tree: Tree = {path: dict(leaf) for path, leaf in adapter.params.items()}
    paths = [path for path, leaf in tree.items() if any(name.startswith("lora_") for name in leaf)]
    for path in tqdm(paths, desc="reading weights", leave=False, disable=None):
        home = _home(model, path, adapter.sites[path], rounded)
        a, b = tree[path]["lora_A"], tree[path]["lora_B"]
        if a.shape[0] > min(home.weight.shape):
            raise ValueError(
                f"{path}: r={a.shape[0]} is more than a weight of shape {tuple(home.weight.shape)} has; choose a "
                "smaller one for it in rank_pattern."
            )
        new, entries = start(home, a.shape[0], float(adapter.buffers[path]["scaling"]))
        for name, old, factor in (("lora_A", a, new[0]), ("lora_B", b, new[1])):
            tree[path][name] = factor.to(old.dtype).contiguous()
        params.update(entries)
    return adapter.replace(params=sorted_tree(tree)), params


def _home(model: nn.Module, path: str, info: SiteInfo, rounded: _Rounded | None) -> Home:
    place = cast("Place", layers.find(model, path))
    if place.kind not in (layers.LINEAR, layers.TRANSPOSED) or info.rows is not None:
        what = "a part of a fused projection" if info.rows is not None else f"of kind {place.kind!r}"
        raise ValueError(
            f"{path} is {what}, and this init reads linear layers of their own; exclude_modules=[{path!r}]."
        )
    module = model.get_submodule(place.owner)
    every: dict[str, Any] = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    entry = codecs.find(every, place.name, module)
    given = rounded.weights if rounded else None
    if given is not None and place.name not in given:
        raise KeyError(f"weights has no {place.name!r}; give the state dict of the model before it was quantized.")
    if entry is None:
        own = every[place.name]
        return _dense(place, own if given is None else given[place.name], own.dtype, rounded)
    if rounded and (given is None or rounded.bits is not None):
        raise ValueError(
            f"{path} is packed already: "
            + (
                "give the dense weights from before, weights={...}."
                if given is None
                else "its own format is taken; leave bits out."
            )
        )
    weight = entry.dense if given is None else given[place.name].to(entry.dense.device)

    def get(entries: Params) -> Tensor:
        found = codecs.find(entries, place.name, module)
        assert found is not None
        return _wide(found.dense)

    def put(new: Tensor) -> Params:
        return entry.pack(new.to(entry.dense.dtype))

    return Home(_wide(weight), put, get)


def _dense(place: Place, weight: Tensor, dtype: torch.dtype, rounded: _Rounded | None) -> Home:
    transposed = place.kind == layers.TRANSPOSED
    quantized = _ROUNDED[rounded.bits or 4] if rounded else _as_it_is

    def put(new: Tensor) -> Params:
        made = quantized(new, place.name).to(dtype)
        return {place.name: made.T.contiguous() if transposed else made}

    def get(entries: Params) -> Tensor:
        return _wide(entries[place.name].T if transposed else entries[place.name])

    return Home(_wide(weight.T if transposed else weight), put, get)


def _wide(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _as_it_is(weight: Tensor, name: str) -> Tensor:
    del name
    return weight


def _nf4(weight: Tensor, name: str) -> Tensor:
    make = library("bitsandbytes.nn").Params4bit
    made = make(weight.float(), False, quant_type="nf4", compress_statistics=False).to(weight.device)
    return bitsandbytes_4bit.unpacked(made, made.quant_state, name)


def _int8(weight: Tensor, name: str) -> Tensor:
    made = library("bitsandbytes.nn").Int8Params(weight.float(), requires_grad=False).to(weight.device)
    return bitsandbytes_8bit.unpacked(made, made.SCB, name)


_ROUNDED: dict[int, Callable[[Tensor, str], Tensor]] = {4: _nf4, 8: _int8}
