"""LoRA adapters combined into one: PEFT's `add_weighted_adapter` (0.21.2), on tensors.

With ΔW = s·B·A, weights w and `t` for the sign of w·s:

- cat: A = [w·s·A, ...], B = [B, ...]: Σ w·ΔW exactly, with the sum of the ranks.
- svd: the best approximation of Σ w·ΔW of the given rank. Σ w·ΔW is never formed: its singular vectors lie in the spans
  of all B and of all A, so a QR decomposition of each leaves a matrix as small as the sum of the ranks.
- linear: A = Σ t·√|w·s|·A, B = Σ √|w·s|·B. Of two adapters this is w₁ΔW₁ + w₂ΔW₂ and two cross terms B₁A₂ and B₂A₁, so
  it is no sum of deltas. (PEFT 0.5.0 has A = Σ w·s·A and B = Σ B.)
- ties, dare_*, magnitude_prune: as linear, of factors that were pruned first; `*_svd`: the same to ΔW, then svd.

Computed in float32, or float64 where a factor is; the result has the widest dtype of the factors.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Adapter, Leaf, Tree
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.low_rank import leaf_shapes
from peftfn.methods.low_rank.weighted_sum import Recipe, mixed
from peftfn.models import layers, matching

Pair = tuple[Tensor, Tensor]


class _Part(NamedTuple):
    """One adapter's share of a site: A (n, r, in) and B (n, out, r) for n groups or experts, the weight and scaling."""

    a: Tensor
    b: Tensor
    weight: Tensor
    scaling: Tensor


def combine(
    recipe: Recipe, configs: Sequence[LoraConfig], path: str, leaves: Sequence[Leaf | None]
) -> tuple[Leaf, Leaf]:
    """A and B of the combination at one site, with a scaling of 1; an adapter without the site counts as zero."""
    there = [number for number, leaf in enumerate(leaves) if leaf is not None]
    found = [leaf for leaf in leaves if leaf is not None]
    first, second = leaf_shapes.pair(found[0])
    _check_names(path, found, first, second)
    found = _one_layout(found, first, second)
    wanted = functools.reduce(torch.promote_types, (leaf[name].dtype for leaf in found for name in (first, second)))
    dtype = torch.float64 if wanted == torch.float64 else torch.float32
    parts: list[_Part] = []
    for number, leaf in zip(there, found, strict=True):
        a, b = _matrices(leaf[first].to(dtype), leaf[second].to(dtype), matching.rank(configs[number], path))
        weight = recipe.weights[number].to(a.device, dtype)
        parts.append(_Part(a, b, weight, leaf["scaling"].to(a.device, dtype)))
    _check_shapes(path, parts)
    if recipe.method == "cat":
        a, b = _concatenated(parts)
    elif recipe.method.endswith("svd"):
        groups = matching.rank(configs[there[0]], path) // parts[0].a.shape[1]
        is_swapped = first.startswith("lora_embedding") or configs[there[0]].fan_in_fan_out
        a, b = _truncated(recipe, parts, -(-_new_rank(recipe, configs) // groups), is_swapped)
    else:
        a, b = _summed(recipe, path, parts)
    a, b = _as_before(a.to(wanted), b.to(wanted), found[0][first], found[0][second])
    return {first: a, second: b}, {"scaling": torch.ones((), dtype=dtype, device=a.device)}


def combined(config: LoraConfig, adapters: Sequence[Adapter], params: Tree) -> LoraConfig:
    """The config with the rank of each site, and as much alpha: a scaling of 1 everywhere."""
    for field in ("alora_invocation_tokens", "trainable_token_indices"):
        if len({getattr(adapter.config, field) for adapter in adapters}) > 1:
            raise ValueError(f"combine: the adapters have unlike {field}; expected one value.")
    found: dict[str, int] = {}
    for path, leaf in params.items():
        at = layers.pattern_path(path, params)
        first, second = leaf_shapes.pair(leaf)
        one = next(adapter for adapter in adapters if first in adapter.params.get(path, {}))
        before = matching.rank(cast("LoraConfig", one.config), layers.pattern_path(path, one.params))
        old = one.params[path]
        found[at] = before * _rows(leaf[first], leaf[second]) // _rows(old[first], old[second])
    ((r, _),) = collections.Counter(found.values()).most_common(1)
    # PEFT looks for `(.*\.)?pattern$`: the caret keeps a path from naming longer ones.
    others = {f"^{re.escape(path)}": rank for path, rank in sorted(found.items()) if rank != r}
    configs = [cast("LoraConfig", adapter.config) for adapter in adapters]
    return dataclasses.replace(
        config,
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=others,
        use_rslora=False,  # the scaling is in the factors; PEFT keeps the flag, and so scales by sqrt(r) again
        fan_in_fan_out=any(one.fan_in_fan_out for one in configs),
    )


def _rows(a: Tensor, b: Tensor) -> int:
    """The rank of a site, times the number of experts if it is one of experts."""
    return a.shape[0] * a.shape[1] if a.dim() > b.dim() else a.shape[0]


def _new_rank(recipe: Recipe, configs: Sequence[LoraConfig]) -> int:
    return recipe.rank or max(rank for one in configs for rank in (one.r, *(one.rank_pattern or {}).values()))


def _check_names(path: str, leaves: Sequence[Leaf], first: str, second: str) -> None:
    for leaf in leaves:
        given = leaf.keys() - {"scaling"}
        if given != {first, second}:
            raise ValueError(
                f"combine: an adapter holds {sorted(given)} at {path!r}; expected {first} and {second}, the factors of "
                "a plain LoRA, in each. Merge others into the base one by one (peftfn.merge)."
            )


def _check_shapes(path: str, parts: Sequence[_Part]) -> None:
    sizes = sorted({(part.a.shape[0], part.b.shape[1], part.a.shape[2]) for part in parts})
    if len(sizes) > 1:
        shown = ", ".join(f"{out}×{inputs}" + (f" ({n} times)" if n > 1 else "") for n, out, inputs in sizes)
        raise ValueError(f"combine: at {path!r} the adapters change weights of {shown}; expected adapters of one base.")


def _one_layout(leaves: list[Leaf], first: str, second: str) -> list[Leaf]:
    """Convolutions with groups all dense, as in PEFT's files, if one of them is."""
    if len({leaf[first].dim() for leaf in leaves}) == 1:
        return leaves
    return [{**leaf, **leaf_shapes.to_file({first: leaf[first], second: leaf[second]})} for leaf in leaves]


def _matrices(a: Tensor, b: Tensor, rank: int) -> Pair:
    """The factors as (n, r, in) and (n, out, r), one pair of matrices for each group or expert."""
    if a.dim() > b.dim():  # a convolution with groups: A is (g, r/g, in/g, *k), B is (out, r/g, 1...)
        return a.flatten(2), b.reshape(a.shape[0], -1, b.shape[1])
    if b.dim() > 2:  # a convolution: (r, in, *k) and (out, r/g, 1...)
        groups = a.shape[0] // b.shape[1]
        return a.reshape(groups, b.shape[1], -1), b.reshape(groups, -1, b.shape[1])
    # (E*r, in) and (out, r*E), the expert being B's fastest axis
    return a.reshape(-1, rank, a.shape[1]), b.reshape(b.shape[0], rank, -1).permute(2, 0, 1)


def _as_before(a: Tensor, b: Tensor, old_a: Tensor, old_b: Tensor) -> Pair:
    """The inverse of `_matrices`, in the layout of `old_a` and `old_b`."""
    n, rank, _ = a.shape
    if old_b.dim() > 2:
        kernel = (n, rank, *old_a.shape[2:]) if old_a.dim() > old_b.dim() else (n * rank, *old_a.shape[1:])
        return a.reshape(kernel), b.reshape(old_b.shape[0], rank, *old_b.shape[2:])
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _concatenated(parts: Sequence[_Part]) -> Pair:
    return torch.cat([p.a * (p.weight * p.scaling) for p in parts], 1), torch.cat([p.b for p in parts], 2)


def _summed(recipe: Recipe, path: str, parts: Sequence[_Part]) -> Pair:
    found = sorted({part.a.shape[1] for part in parts})
    if len(found) > 1:
        raise ValueError(
            f"combine: at {path!r} the adapters have ranks {found}, and method={recipe.method!r} adds their factors; "
            "expected one rank. Use method='svd' or 'cat', which take any."
        )
    whole = [part.weight * part.scaling for part in parts]
    roots = [one.abs().sqrt() for one in whole]
    signed = [one.sign() * root for one, root in zip(whole, roots, strict=True)]
    a = mixed([part.a for part in parts], signed, recipe)
    return a, mixed([part.b for part in parts], roots, recipe)


def _truncated(recipe: Recipe, parts: Sequence[_Part], rank: int, is_swapped: bool) -> Pair:
    """Vᵀ as A and U·S as B, of the `rank` largest singular values.

    Random numbers are drawn in the order of the weight as it is stored (`is_swapped`: (in, out)), as in PEFT.
    """
    rank = min(rank, parts[0].b.shape[1], parts[0].a.shape[2])
    if recipe.method == "svd" and recipe.clamp is None:
        return _decomposed(*_concatenated(parts), recipe, rank)
    deltas = [part.b @ part.a * part.scaling for part in parts]
    stored = [delta.mT if is_swapped else delta for delta in deltas]
    mix = mixed(stored, [part.weight for part in parts], recipe)
    u, s, vh = _svd(mix.mT if is_swapped else mix, recipe)
    a, b = vh[:, :rank], u[:, :, :rank] * s[:, None, :rank]
    if recipe.clamp is not None:
        # As in PEFT, a quantile of the signed values, not of their magnitudes. So it depends on the signs of U and V:
        # the whole matrix has to be decomposed for it, not the smaller one of `_decomposed`.
        most = torch.cat([b.flatten(), a.flatten()]).quantile(recipe.clamp)
        a, b = (torch.maximum(torch.minimum(one, most), -most) for one in (a, b))
    return a, b


def _decomposed(a: Tensor, b: Tensor, recipe: Recipe, rank: int) -> Pair:
    # Where `rank` is more than there is, zeros are added: the Q of a QR is orthonormal there too, so it can be trained.
    more = max(0, rank - a.shape[1])
    a = torch.cat([a, a.new_zeros(a.shape[0], more, a.shape[2])], 1)
    b = torch.cat([b, b.new_zeros(b.shape[0], b.shape[1], more)], 2)
    left, upper = _qr(b)  # (n, out, R), (n, R, R)
    right, lower = _qr(a.mT)
    u, s, vh = _svd(upper @ lower.mT, recipe)
    return vh[:, :rank] @ right.mT, left @ (u[:, :, :rank] * s[:, None, :rank])


def _qr(matrix: Tensor) -> Pair:
    return cast("Pair", torch.linalg.qr(matrix))  # torch does not say what it returns


def _svd(matrix: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    linalg: Any = torch.linalg  # torch does not say what svd returns
    u, s, vh = linalg.svd(matrix, full_matrices=recipe.full_matrices, driver=recipe.driver)
    return u, s, vh
