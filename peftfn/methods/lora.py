"""LoRA: W + s·B·A with W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Scaling s is alpha / r, or alpha / sqrt(r) with `use_rslora` (https://arxiv.org/abs/2312.03732). It is a tensor in the
adapter's buffers, so that adapters of unlike alpha and rank share one compiled graph and can be stacked.

dtype rules, the same as PEFT's. Outside autocast the delta is computed in the dtype of A and B: x is cast to it, the
sum is taken in the wider of the two dtypes, and the result is cast back to the dtype of the base's output. Under
autocast the matrix products run in autocast's dtype. Where the base reads the tensor itself (attention projections,
experts) the delta is computed in the dtype of A and B, added, and the sum is cast to the dtype of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn import layers, matching, targets
from peftfn.adapter import Leaf
from peftfn.layers import Place, Site
from peftfn.methods import lora_combine, lowrank, ranks, running
from peftfn.methods.adapted import Delta
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, like_weight


def resolve(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the targets that the model decides, and its heads, filled in."""
    return targets.resolved(model, config, TARGETS)


def sites(model: nn.Module, config: LoraConfig) -> dict[str, Place]:
    """The config's sites in the model; patterns that match none of them are an error."""
    found = targets.sites(model, config)
    for field in ("rank_pattern", "alpha_pattern"):
        targets.refuse_unused_patterns(field, getattr(config, field), found)
    return found


def _rank(config: LoraConfig, path: str) -> int:
    return matching.pattern_value(config.rank_pattern, path, config.r)


def init(
    config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> tuple[Leaf, Leaf]:
    """A and B for one site, drawn as PEFT draws them, and the scaling.

    Without `dtype` they take the weight's, but float32 where it is a half or a packed one.
    """
    r, weight = _rank(config, path), site.shape
    groups = lowrank.weight_groups(site.layer)
    if r % groups:
        raise ValueError(
            f"{site.path}: r={r} is not divisible by the convolution's groups={groups}. Choose another r for it in "
            f"rank_pattern, or exclude_modules=[{site.path!r}]."
        )
    if (
        site.kind in layers.WEIGHT_KINDS
        and config.lora_dropout
        and not isinstance(site.layer, (nn.MultiheadAttention, nn.Linear))
    ):
        raise ValueError(
            f"{site.path}: lora_dropout={config.lora_dropout} has no meaning for a bare parameter, which sees no "
            "input; set it to 0 or leave target_parameters out."
        )
    shape = weight if site.rows is None else _of_rows(weight, site.kind, len(site.rows))
    shape_a, shape_b = lowrank.TABLE[site.kind].shapes(site.layer, shape, r)
    a, b = _draw(config, site.kind, shape_a, shape_b, r, generator)
    a, b = like_weight(a, site.stored, dtype), like_weight(b, site.stored, dtype)
    leaf = dict(zip(_names(site.kind), (a, b), strict=True))
    part = {} if site.rows is None else part_of(site.rows.to(a.device), weight[_outputs(site.kind)])
    return leaf, {**buffers(config, path, leaf), **part}


def part_of(rows: Tensor, outputs: int) -> Leaf:
    """The buffers that make a leaf act on some output rows of its layer: which, and of how many."""
    return {"rows": rows, "outputs": torch.tensor(outputs, device=rows.device)}


def _outputs(kind: str) -> int:
    return 1 if kind == layers.TRANSPOSED else 0


def _of_rows(weight: torch.Size, kind: str, rows: int) -> torch.Size:
    return torch.Size((weight[0], rows) if kind == layers.TRANSPOSED else (rows, weight[1]))


def _draw(
    config: LoraConfig,
    kind: str,
    shape_a: tuple[int, ...],
    shape_b: tuple[int, ...],
    r: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    how = config.init_lora_weights
    if not isinstance(how, bool) and how != "gaussian":
        hint = "; peftfn.loftq(model, config) makes it, with the quantized weights" if how == "loftq" else ""
        raise ValueError(
            f"init_lora_weights={how!r} is read from files only{hint}. init offers True, False and 'gaussian'."
        )
    if kind == layers.EMBEDDING:
        a = torch.zeros(shape_a) if how else torch.randn(shape_a, generator=generator)
        return a, torch.randn(shape_b, generator=generator)
    if how == "gaussian":
        a = torch.randn(shape_a, generator=generator) / r
    else:
        # The one A with an axis more, of a convolution with groups, has its rank on two axes.
        a = _uniform(shape_a, math.prod(shape_a[1 + (len(shape_a) > len(shape_b)) :]), generator)
    return a, torch.zeros(shape_b) if how else _uniform(shape_b, math.prod(shape_b[1:]), generator)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    # kaiming_uniform_(a=sqrt(5)), the default of nn.Linear: within 1/sqrt(fan_in).
    bound = 1 / math.sqrt(fan_in)
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def buffers(config: LoraConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling of one site, a 0-d tensor."""
    r = _rank(config, path)
    alpha = matching.pattern_value(config.alpha_pattern, path, config.lora_alpha)
    one = next(iter(leaf.values()))
    dtype = torch.float64 if one.dtype == torch.float64 else torch.float32
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return {"scaling": torch.tensor(scaling, dtype=dtype, device=one.device)}


def _names(kind: str) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if kind == layers.EMBEDDING else ("lora_A", "lora_B")


def _factors(leaf: Mapping[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    first, second = _names(kind)
    return leaf[first], leaf[second]


def forward(config: LoraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + s·B·A·dropout(x), in the dtype of W x."""
    first, second = _names(site.kind)
    delta = Delta(leaf[first], leaf[second], leaf["scaling"])
    if "rows" not in leaf:
        return running.forward(site, delta, config.lora_dropout, x, *args, **kwargs)
    rows, y = leaf["rows"], site(x, *args, **kwargs)
    part = running.add(site, delta, config.lora_dropout, x, y.index_select(-1, rows))
    return y.index_copy(-1, rows, part)


def takes_rows(leaf: Mapping[str, Tensor], kind: str) -> bool:
    """Whether `forward` takes a leaf of its own for each row: on linear layers, but for parts of fused ones."""
    return kind in (layers.LINEAR, layers.TRANSPOSED) and "rows" not in leaf


def merge(
    config: LoraConfig, leaf: Mapping[str, Tensor], kind: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """W + s·B·A, in the dtype of W; the bias stays."""
    a, b = _factors(leaf, kind)
    rows, weight = leaf.get("rows"), tensors["weight"]
    if rows is None:
        return {"weight": lowrank.merged(kind, a, b, leaf["scaling"], weight)}
    part = lowrank.merged(kind, a, b, leaf["scaling"], weight.index_select(_outputs(kind), rows))
    return {"weight": weight.index_copy(_outputs(kind), rows, part)}


def of_rows(leaf: Leaf, kind: str, rows: slice) -> Leaf | None:
    """The leaf of some rows of the weight, where it has one."""
    return lowrank.of_rows(_names(kind), leaf, kind, rows)


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with a leaf for this site, or `None`."""
    first, second = _names(site.kind)
    if first not in leaf or second not in leaf:
        return f"has {sorted(leaf)}, expected {first} and {second} for a {site.kind}"
    a, b, weight = leaf[first].shape, leaf[second].shape, site.shape
    if "rows" in leaf:
        weight = _of_rows(weight, site.kind, leaf["rows"].shape[0])
    expected = lowrank.TABLE[site.kind].shapes(
        site.layer, weight, _rank_of(leaf[first], leaf[second], site.kind, weight)
    )
    if (tuple(a), tuple(b)) == expected:
        return None
    if site.kind == layers.CONVOLUTION and (a[0], site.layer.in_channels, *a[2:]) == tuple(a):
        return None  # PEFT's dense A on a convolution with groups
    return f"has {first} {tuple(a)} and {second} {tuple(b)}, expected {expected[0]} and {expected[1]}"


def check_file(config: LoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse one factor without the other, and a rank that is not the config's: the scaling would be wrong."""
    for name in sorted(leaf):
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in leaf:
            raise KeyError(f"{sorted(leaf)}, but no {other}")
    rank, rows = _rank(config, path), next(leaf[name].shape[0] for name in leaf if name.endswith("_A"))
    # Of experts, the file has rank times their number.
    if rows % rank or (rows != rank and not config.target_parameters):
        raise ValueError(f"rank {rows}, and the config says {rank}")


def kinds(leaf: Mapping[str, Tensor], weight: torch.Size) -> list[str]:
    """The kinds of layer whose weight of this shape the leaf fits."""
    if "lora_embedding_A" in leaf:
        a, b = leaf["lora_embedding_A"], leaf["lora_embedding_B"]
        return [layers.EMBEDDING] if (a.shape[1], b.shape[0]) == tuple(weight) else []
    a, b = leaf["lora_A"], leaf["lora_B"]
    if b.dim() > 2:
        fits = a.shape[a.dim() - b.dim() + 2 :] == weight[2:] and b.shape[0] == weight[0]
        return [layers.CONVOLUTION] if fits and len(weight) == b.dim() else []
    outputs, inputs, ends = int(leaf.get("outputs", b.shape[0])), a.shape[1], tuple(weight[-2:])
    stored = [layers.LINEAR, layers.PARAMETER] if len(weight) == 2 else [layers.PARAMETER]
    swapped = [layers.TRANSPOSED] if len(weight) == 2 else [layers.EXPERTS_TRANSPOSED]
    return (stored if ends == (outputs, inputs) else []) + (swapped if ends == (inputs, outputs) else [])


def _rank_of(a: Tensor, b: Tensor, kind: str, weight: torch.Size) -> int:
    if a.dim() > b.dim():
        return a.shape[0] * a.shape[1]
    return a.shape[0] // (weight[0] if kind in layers.WEIGHT_KINDS and len(weight) == 3 else 1)


def _pad(configs: Sequence[LoraConfig], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves padded to one rank; an adapter without this site gets zeros."""
    there = [(config, leaf) for config, leaf in zip(configs, leaves, strict=True) if leaf is not None]
    padded = iter(ranks.pad([leaf for _, leaf in there], [_rank(config, path) for config, _ in there]))
    filled = [None if leaf is None else next(padded) for leaf in leaves]
    model = next(leaf for leaf in filled if leaf is not None)
    return [{name: torch.zeros_like(t) for name, t in model.items()} if leaf is None else leaf for leaf in filled]


def _trim(config: LoraConfig, configs: Sequence[LoraConfig], path: str, leaf: Leaf) -> Leaf:
    """The leaf without the zeros that `_pad` added."""
    return ranks.trimmed(leaf, _rank(config, path), max(_rank(one, path) for one in configs))


def silence(leaf: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The leaf with its scaling times `keep`."""
    return {**leaf, "scaling": leaf["scaling"] * keep}


METHOD = Method(
    config=LoraConfig,
    takes_rows=takes_rows,
    held=frozenset({"scaling", "rows", "outputs", "transposed"}),
    names={
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
    },
    resolve=resolve,
    sites=sites,
    init=init,
    buffers=buffers,
    forward=forward,
    merge=merge,
    reads=("weight",),
    of_rows=of_rows,
    check=check,
    check_file=check_file,
    kinds=kinds,
    silence=silence,
    pad=_pad,
    by_column=frozenset({"lora_B"}),
    trim=_trim,
    combine=lora_combine.combine,
    combined=lora_combine.combined,
    to_file=ranks.to_file,
    from_file=ranks.from_file,
)
