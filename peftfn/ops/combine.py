"""`combine`: a weighted combination of adapters, as a new adapter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftfn import methods
from peftfn.core.adapter import Adapter, Leaf, SiteInfo, Sites, Tree, as_tuple, sorted_tree
from peftfn.core.config import PeftConfig
from peftfn.methods import Method
from peftfn.methods.low_rank import weighted_sum
from peftfn.methods.low_rank.weighted_sum import Recipe
from peftfn.models import layers, matching
from peftfn.ops import common_sites


def combine(
    adapters: Iterable[Adapter],
    weights: Sequence[float | Tensor] | Tensor,
    method: str = "svd",
    *,
    rank: int | None = None,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> Adapter:
    """The weighted combination of adapters of one method: PEFT's `add_weighted_adapter`, with the formulas of 0.21.2.

    For LoRA, with ΔW = s·B·A for each adapter (see `peftfn.methods.low_rank.lora_combine`):

    | method | what it gives | rank |
    |---|---|---|
    | `cat` | Σ w·ΔW, exactly | the sum of the ranks |
    | `svd` | the nearest to Σ w·ΔW of this rank | `rank`, or the largest of the adapters |
    | `linear` | the product of weighted sums of A and of B: Σ w·ΔW and cross terms | theirs, which has to be one |
    | `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | as linear, of pruned factors | the same |
    | `ties_svd`, ... | pruned ΔW, then as svd | as svd |

    Methods other than LoRA combine as their own file says, or not at all. One adapter alone is combined as `linear`, as
    in PEFT, unless `rank` is given. Weights may be negative. Adapters may differ in alpha, and in sites: one that
    lacks a site counts as zero there. With `linear` and `cat` the result is differentiable in adapters and weights
    (with `linear`, where no weight is zero); with `svd`, where the singular values are distinct.

    Whole modules and biases beside the method (`modules_to_save`, `bias`) have no weighted sum without the base: they
    are kept where one adapter alone has them or all have the same, and an error otherwise.

    Args:
        adapters: single adapters, for one base.
        weights: one number for each, or a tensor of them.
        method: one of the above.
        rank: of the result, for `svd` and `*_svd`; convolutions with groups take the next multiple of their groups.
        clamp: for the same, cut values above this quantile (between 0 and 1) of all values of the factors.
        full_matrices: as in `torch.linalg.svd`; False is as good, and faster for `*_svd`.
        driver: as in `torch.linalg.svd`; on CUDA only.
        density: the share of values that pruning keeps, above 0 and at most 1.
        majority_sign_method: for TIES, "total" or "frequency".
        generator: where the random numbers of `dare_*` come from; by default a new one seeded with 0.

    Returns:
        An adapter of rank r and scaling 1 (`lora_alpha` = r) at each site, `rank_pattern` holding the exceptions. It
        is computed in float32 or wider, and has the widest dtype of the adapters. Fields of the config that say
        nothing of the above (dropout, task type, base) are those of the first adapter.

    Raises:
        ValueError: an argument is missing, unknown, out of its range, or of no meaning for this method; the adapters
            are of several methods or do not fit together.
        TypeError: something is no adapter, or a stack.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> made = [pf.init(model, pf.LoraConfig(r=r, target_modules=["0"])) for r in (2, 3)]
        >>> pf.combine(made, [0.7, -0.3], "cat").params["0"]["lora_A"].shape
        torch.Size([5, 4])
    """
    adapters = as_tuple(list(adapters) if not isinstance(adapters, Adapter) else adapters)
    one = _common_method(adapters)
    _check_method(method, density, majority_sign_method)
    _check_svd(method, rank, clamp, driver)
    is_alone = len(adapters) == 1 and rank is None
    recipe = Recipe(
        "linear" if is_alone else method,
        _as_weights(weights, len(adapters)),
        rank,
        clamp,
        full_matrices,
        driver,
        None if is_alone else density,
        majority_sign_method,
        generator if generator is not None else torch.Generator().manual_seed(0),
    )
    configs = [adapter.config for adapter in adapters]
    combining = one.combining
    if combining is None:
        raise ValueError(f"combine: {one.called} has no weighted combination.")
    own = [_own(one, adapter) for adapter in adapters]
    params: Tree = {}
    buffers: Tree = {}
    sites: dict[str, SiteInfo] = {}
    paths = {path for tree in own for path in tree}
    for path in sorted(paths):
        at = layers.pattern_path(path, paths)
        sites[path], leaves = common_sites.together("combine", one, path, [tree.get(path) for tree in own], adapters)
        params[path], buffers[path] = combining.leaf(recipe, configs, at, leaves)
    config = combining.config(_union(cast("Any", configs), sorted(paths), sites), adapters, params)
    _keep_replaced(one, adapters, params, buffers)
    return Adapter(sorted_tree(params), sorted_tree(buffers), config, sites)


def _common_method(adapters: Sequence[Adapter]) -> Method:
    if not adapters:
        raise ValueError("combine was given no adapter; expected at least one.")
    if any(adapter.members is not None for adapter in adapters):
        raise TypeError("combine was given a stack; expected single adapters: combine(peftfn.unstack(stacked), ...).")
    kinds = sorted({methods.of(adapter.config).called for adapter in adapters})
    if len(kinds) > 1:
        raise ValueError(f"combine was given adapters of {', '.join(kinds)}; expected adapters of one method.")
    return methods.of(adapters[0].config)


def _as_weights(weights: Sequence[float | Tensor] | Tensor, count: int) -> tuple[Tensor, ...]:
    if isinstance(weights, Tensor) and weights.dim() != 1:
        raise ValueError(f"weights is a tensor of shape {tuple(weights.shape)}; expected one axis of {count}.")
    given = tuple(
        one if isinstance(one, Tensor) else torch.tensor(one, dtype=torch.float64, device="cpu") for one in weights
    )
    if len(given) != count:
        raise ValueError(f"combine was given {count} adapters and {len(given)} weights; expected one for each.")
    if any(one.dim() for one in given):
        raise ValueError(f"weights has shapes {[tuple(one.shape) for one in given]}; expected numbers.")
    return given


def _check_method(method: str, density: float | None, majority_sign_method: str) -> None:
    if method not in weighted_sum.NAMES:
        raise ValueError(f"method={method!r} is unknown; expected one of {', '.join(weighted_sum.NAMES)}.")
    if method in weighted_sum.PRUNED and density is None:
        raise ValueError(f"method={method!r} needs density=..., the share of values that it keeps, e.g. 0.5.")
    if density is not None and (method not in weighted_sum.PRUNED or not 0 < density <= 1):
        expected = (
            "a number above 0 and at most 1" if method in weighted_sum.PRUNED else f"none: {method!r} prunes nothing"
        )
        raise ValueError(f"density={density!r}; expected {expected}.")
    if majority_sign_method not in weighted_sum.SIGNS:
        raise ValueError(f"majority_sign_method={majority_sign_method!r}; expected {' or '.join(weighted_sum.SIGNS)}.")


def _check_svd(method: str, rank: int | None, clamp: float | None, driver: str | None) -> None:
    for name, value in (("rank", rank), ("clamp", clamp), ("driver", driver)):
        if value is not None and not method.endswith("svd"):
            raise ValueError(f"{name}={value!r} has no meaning for method={method!r}; expected 'svd' or a '*_svd'.")
    if rank is not None and (isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r}; expected a positive integer.")
    if clamp is not None and not 0 <= clamp <= 1:
        raise ValueError(f"clamp={clamp!r}; expected a quantile, between 0 and 1.")


def _own(method: Method, adapter: Adapter) -> dict[str, Leaf]:
    """The method's own tensors, by site."""
    found: dict[str, Leaf] = {}
    for path, leaf in adapter.params.items():
        if not all(map(method.replaces, leaf)):
            both = {**leaf, **adapter.buffers.get(path, {})}
            found[path] = {name: tensor for name, tensor in both.items() if not method.replaces(name)}
    return found


def _keep_replaced(method: Method, adapters: Sequence[Adapter], params: Tree, buffers: Tree) -> None:
    """Put into the trees what the adapters hold in place of the base's own tensors."""
    for adapter in adapters:
        for made, tree in ((params, adapter.params), (buffers, adapter.buffers)):
            for path, name in [(path, name) for path, leaf in tree.items() for name in filter(method.replaces, leaf)]:
                tensor = tree[path][name]
                kept = made.setdefault(path, {}).setdefault(name, tensor)
                if kept is not tensor and not _equal(kept, tensor):
                    raise ValueError(
                        f"combine: several adapters hold {path}.{name}, with different values (modules_to_save or "
                        "trained biases), and these have no weighted sum without the base. Keep one, and leave "
                        f"{path!r} out of the others: a.replace(params=..., buffers=...)."
                    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


# --- which modules the combination names -----------------------------------------------------------------------------

_LIMITS = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _union(configs: Sequence[Any], paths: Sequence[str], sites: Sites) -> PeftConfig:
    """The first config, naming what any of them names."""
    first = configs[0]
    changes: dict[str, Any] = {"peft_version": None}
    if hasattr(first, "modules_to_save"):
        changes["modules_to_save"] = _names(configs, "modules_to_save") or None
    if hasattr(first, "target_parameters"):
        changes["target_parameters"] = _longest(configs, "target_parameters")
    if len({getattr(config, "bias", "none") for config in configs}) > 1:
        raise ValueError(f"combine: the adapters have bias of {[config.bias for config in configs]}; expected one.")
    if hasattr(first, "target_modules"):
        changes |= _targets(configs, paths, sites, changes.get("target_parameters"))
    made: Any = dataclasses.replace(first, **changes)
    both = [path for path in paths if made.modules_to_save and matching.is_excluded(made, path)]
    if both:
        raise ValueError(
            f"combine: {both[0]!r} is adapted by one of the adapters and replaced whole by another one "
            f"(modules_to_save={list(made.modules_to_save)}); expected one of the two."
        )
    return made


def _targets(
    configs: Sequence[Any], paths: Sequence[str], sites: Sites, parameters: Sequence[str] | None
) -> dict[str, Any]:
    """`target_modules` of the union, or a regex of its paths where names and limits do not add up to it."""
    limits = dict.fromkeys(name for name in _LIMITS if hasattr(configs[0], name))
    alike = all(getattr(config, name) == getattr(configs[0], name) for config in configs for name in limits)
    given = [config.target_modules for config in configs if config.target_modules is not None]
    if alike and len({*given}) <= 1:
        return {"target_modules": given[0] if given else None}
    if alike and not any(isinstance(names, str) for names in given):
        return {"target_modules": _names(configs, "target_modules")}
    if alike and all(isinstance(names, str) for names in given):
        return {"target_modules": "|".join(f"({names})" for names in dict.fromkeys(given))}
    partial = [path for path in paths if sites[path].rows is not None]
    if partial:
        raise ValueError(
            f"combine: the adapters act on parts of {partial[0]!r} and differ in {', '.join(_LIMITS)} or in whether "
            "target_modules is a list; expected adapters that name their targets alike."
        )
    modules = [path for path in paths if not matching.ends_with(path, parameters or ())]
    return {"target_modules": "|".join(map(re.escape, modules)) or None, **limits}


def _names(configs: Sequence[Any], field: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for config in configs for name in getattr(config, field) or ()))


def _longest(configs: Sequence[Any], field: str) -> tuple[str, ...] | None:
    """The list that holds all the others: its order is the model's, which files depend on and a union would lose."""
    lists = [tuple(getattr(config, field) or ()) for config in configs]
    most = max(lists, key=len)
    if any(set(one) - set(most) for one in lists):
        raise ValueError(
            f"combine: the adapters name {field} of {[list(one) for one in lists]}; expected one that names all of "
            "them, since their order in the model is not known here."
        )
    return most or None
