"""AdaLoRA: W + s·P·Λ·Q with W frozen, Λ diagonal (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

P, Λ and Q are PEFT's `lora_B`, `lora_E` (a column) and `lora_A`. The scaling s is lora_alpha / (ranknum + 1e-5), where
ranknum is the rank at the start and stays so: which ranks are left is a matter of zeros in Λ. Those are written by
`peftfn.adalora.allocate`, and noted in the buffer `mask`; files hold the rows that are left, and in the config's
`rank_pattern` which of the first ones they are. An adapter from such a file has these rows alone, and the pattern in
its config.

PEFT has linear layers, transformers' `Conv1D` and `nn.Conv2d` without groups, where Q reads flattened patches; the
same of `nn.Conv1d` and `nn.Conv3d` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn import layers, targets
from peftfn.adapter import Adapter, Leaf
from peftfn.layers import Site
from peftfn.methods import lowrank, method, running
from peftfn.methods.adalora_config import AdaLoraConfig
from peftfn.methods.adalora_targets import TARGETS
from peftfn.methods.adapted import Delta
from peftfn.methods.method import Method

NAMES = ("lora_A", "lora_B", "lora_E")
"""Q (r, in), P (out, r) and Λ (r, 1)."""

_EPS = 1e-5
_KINDS = (layers.LINEAR, layers.TRANSPOSED, layers.CONVOLUTION)


def resolve(model: nn.Module, config: AdaLoraConfig) -> AdaLoraConfig:
    """The config with the targets that the model decides, and its heads, filled in.

    Raises:
        ValueError: a field is set that PEFT has and ignores, or that only a file may have.
    """
    ignored = {"r": 8, "use_rslora": False}
    for field in [name for name, default in ignored.items() if getattr(config, name) != default]:
        raise ValueError(
            f"{field}={getattr(config, field)!r} changes nothing in AdaLoRA, whose rank is init_r and whose scaling is "
            "lora_alpha / init_r; leave it out."
        )
    for field in [name for name in ("alpha_pattern", "target_parameters", "rank_pattern") if getattr(config, name)]:
        hint = "it comes from training: set it to None" if field == "rank_pattern" else "AdaLoRA has no such choice"
        raise ValueError(f"{field}={getattr(config, field)!r} cannot be asked for in a fresh adapter; {hint}.")
    return targets.resolved(model, config, TARGETS)


def init(
    config: AdaLoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> tuple[Leaf, Leaf]:
    """P and Q with normal numbers of deviation 0.02 and Λ = 0, as PEFT 0.21 draws them, and the scaling.

    Without `init_lora_weights` all of them are standard normal: not the identity.
    """
    method.refuse_other_kinds("AdaLoRA", site, _KINDS)
    if lowrank.weight_groups(site.layer) > 1:
        raise ValueError(
            f"{site.path}: AdaLoRA has no convolutions with groups, in peft neither. Leave it out: "
            f"exclude_modules=[{site.path!r}]."
        )
    stored, r = site.stored, config.init_r
    how = config.init_lora_weights
    size = 0.02 if how else 1.0
    a, b = (size * torch.randn(shape, generator=generator) for shape in _shapes(site, r))
    e = torch.zeros(r, 1) if how else torch.randn(r, 1, generator=generator)
    leaf = {name: method.like_weight(tensor, stored, dtype) for name, tensor in zip(NAMES, (a, b, e), strict=True)}
    return leaf, buffers(config, path, leaf)


def _shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """PEFT's shapes of Q and P: two axes each, also for a convolution."""
    a, b = lowrank.TABLE[site.kind].shapes(site.layer, site.shape, r)
    return (r, int(torch.Size(a[1:]).numel())), b[:2]


def buffers(config: AdaLoraConfig, path: str, leaf: Leaf) -> Leaf:
    """The two numbers of the scaling, 0-d, and which ranks are left, (r,)."""
    e = leaf["lora_E"]
    options: dict[str, Any] = {
        "dtype": torch.float64 if e.dtype == torch.float64 else torch.float32,
        "device": e.device,
    }
    return {
        "scaling": torch.tensor(config.lora_alpha if config.lora_alpha > 0 else config.init_r, **options),
        "ranknum": torch.tensor(config.init_r, **options),
        "mask": torch.ones(e.shape[0], dtype=torch.bool, device=e.device),
    }


def _factors(leaf: Mapping[str, Tensor], kind: str, weight: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Λ·Q, P and s, in the shapes that LoRA's have."""
    a, b = leaf["lora_A"] * leaf["lora_E"], leaf["lora_B"]
    scaling = leaf["scaling"] / (leaf["ranknum"] + _EPS)
    if kind == layers.CONVOLUTION:
        a, b = a.view(-1, *weight[1:]), b.view(*b.shape, *(1 for _ in weight[2:]))
    return a, b, scaling


def forward(
    config: AdaLoraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """W x + s·P·Λ·Q·dropout(x), in the dtype of W x."""
    if not leaf["lora_E"].shape[0]:  # no rank is left, and torch has no convolution with no channels
        return site(x, *args, **kwargs)
    delta = Delta(*_factors(leaf, site.kind, _kernel(site)))
    return running.forward(site, delta, config.lora_dropout, x, *args, **kwargs)


def _kernel(site: Site) -> torch.Size:
    return site.shape if site.kind == layers.CONVOLUTION else torch.Size()


def merge(
    config: AdaLoraConfig, leaf: Mapping[str, Tensor], kind: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """W + s·P·Λ·Q, in the dtype of W; the bias stays."""
    weight = tensors["weight"]
    return {"weight": lowrank.merged(kind, *_factors(leaf, kind, weight.shape), weight)}


def of_rows(leaf: Leaf, kind: str, rows: slice) -> Leaf | None:
    """The leaf of some rows of the weight, where it has one."""
    return lowrank.of_rows(NAMES[:2], leaf, kind, rows)


def silence(leaf: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The leaf with its scaling times `keep`."""
    return {**leaf, "scaling": leaf["scaling"] * keep}


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with a leaf for this site, or `None`."""
    if site.kind not in _KINDS:
        return f"cannot act on this {site.kind}, expected one of {', '.join(_KINDS)}"
    rows = leaf["lora_E"].shape[0]
    expected = dict(zip(NAMES, (*_shapes(site, rows), (rows, 1)), strict=True))
    found = {name: tuple(leaf[name].shape) for name in NAMES if name in leaf}
    return None if found == expected else f"has {found}, expected {expected}"


def rows_of(config: AdaLoraConfig, path: str) -> int:
    """How many rows a site's tensors have: those that a pattern in the config left, or `init_r`."""
    return sum(pattern_of(config, path))


def pattern_of(config: AdaLoraConfig, path: str) -> Sequence[bool]:
    """Which of the first `init_r` rows of a site are there."""
    name = f"{path}.lora_E"  # PEFT adds the adapter's name until it saves the adapter
    found = (rows for key, rows in (config.rank_pattern or {}).items() if key == name or key.startswith(f"{name}."))
    return next(found, (True,) * config.init_r)


def check_file(config: AdaLoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse one factor without the others, and a rank that is not the config's: the scaling would be wrong."""
    missing = [name for name in NAMES if name not in leaf]
    if missing:
        raise KeyError(f"{sorted(leaf)}, but no {' or '.join(missing)}")
    rank, rows = rows_of(config, path), leaf["lora_E"].shape[0]
    if rows != rank or len(pattern_of(config, path)) != config.init_r:
        raise ValueError(f"rank {rows}, and the config says {rank} of {config.init_r}")


def kinds(leaf: Mapping[str, Tensor], weight: torch.Size) -> list[str]:
    """The kinds of layer whose weight of this shape the leaf fits."""
    shape = (leaf["lora_B"].shape[0], leaf["lora_A"].shape[1])
    if len(weight) > 2:
        return [layers.CONVOLUTION] if (weight[0], weight[1:].numel()) == shape else []
    fitting = {layers.LINEAR: tuple(weight), layers.TRANSPOSED: tuple(weight[::-1])}
    return [kind for kind, size in fitting.items() if size == shape]


def _pad(configs: Sequence[AdaLoraConfig], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves with zeros up to the largest rank; an adapter without this site gets zeros.

    Zeros in all of P, Λ and Q have zero gradients, so training never fills them.
    """
    there = [leaf for leaf in leaves if leaf is not None]
    most = max(leaf["lora_E"].shape[0] for leaf in there)
    padded = iter([_resized(leaf, most) for leaf in there])
    filled = [None if leaf is None else next(padded) for leaf in leaves]
    model = next(leaf for leaf in filled if leaf is not None)
    return [{name: torch.zeros_like(t) for name, t in model.items()} if leaf is None else leaf for leaf in filled]


def _trim(config: AdaLoraConfig, configs: Sequence[AdaLoraConfig], path: str, leaf: Leaf) -> Leaf:
    """The leaf without the zeros that `_pad` added."""
    return _resized(leaf, rows_of(config, path))


_RANK_AXES = {"lora_A": 0, "lora_B": 1, "lora_E": 0, "mask": 0}


def _resized(leaf: Leaf, rows: int) -> Leaf:
    resized = dict(leaf)
    for name, axis in _RANK_AXES.items():
        tensor = leaf[name].narrow(axis, 0, min(rows, leaf[name].shape[axis]))
        shape = list(tensor.shape)
        shape[axis] = rows - tensor.shape[axis]
        resized[name] = torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor
    return resized


def _left(leaf: Mapping[str, Tensor]) -> Tensor:
    """The rows to write, (r,): those that allocation left, and any that a later step of training filled again."""
    return leaf["mask"] | (leaf["lora_E"][:, 0] != 0)


def to_file(leaf: Leaf) -> Leaf:
    """The factors of the ranks that are left."""
    if "mask" not in leaf:
        return leaf
    left = _left(leaf)
    return {"lora_A": leaf["lora_A"][left], "lora_B": leaf["lora_B"][:, left], "lora_E": leaf["lora_E"][left]}


def file_config(adapter: Adapter) -> AdaLoraConfig:
    """The config with the ranks that are left, if any is gone."""
    config = adapter.config
    assert isinstance(config, AdaLoraConfig)
    patterns: dict[str, Sequence[bool]] = {}
    for path, leaf in adapter.params.items():
        if "lora_E" in leaf:
            left = iter(cast("list[bool]", _left({**leaf, **adapter.buffers[path]}).tolist()))
            patterns[f"{path}.lora_E"] = [there and next(left) for there in pattern_of(config, path)]
    is_whole = all(all(pattern) for pattern in patterns.values())
    return dataclasses.replace(config, rank_pattern=None if is_whole else patterns)


METHOD = Method(
    config=AdaLoraConfig,
    names={name: name for name in NAMES},
    held=frozenset({"scaling", "ranknum", "mask", "transposed"}),
    resolve=resolve,
    init=init,
    buffers=buffers,
    forward=forward,
    merge=merge,
    reads=("weight",),
    of_rows=of_rows,
    silence=silence,
    check=check,
    check_file=check_file,
    kinds=kinds,
    pad=_pad,
    by_column=frozenset({"lora_B"}),
    trim=_trim,
    file_config=file_config,
    to_file=to_file,
)
