"""FRoD: W = U·diag(l)·Vᵀ, of which l and some places beside the diagonal are trained: W' = U·(S + diag(l))·Vᵀ.

V (in, in) is made once for all layers of one category, those that play the same part in their block, out of their
weights; U and the first l of a layer follow from V and its own weight. S is zero but for `sparse_rate` of its places
beside the diagonal, drawn from a seed for each category. Files hold V, the places, l and the numbers of S; U is made
again of the base's weight when they are read, which takes the base.

Written as W + U·(S + diag(l - l₀))·Vᵀ, the base's own weight stays as it is: a fresh adapter is the identity to the
bit, where PEFT's is off by the rounding of the decomposition. A layer whose V is singular keeps what U·diag(l₀)·Vᵀ
lacks of W. There is no paper that PEFT names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import SHARED, Leaf, Tree
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, slots, vera
from peftfn.methods.lora_config import check_bias, check_probability, described
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Sharing, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

linalg: Any = torch.linalg  # torch does not say what its functions return


@dataclasses.dataclass(frozen=True)
class FrodConfig(LayeredConfig):
    """FRoD's config, with PEFT's fields and defaults.

    Attributes:
        projection_prng_key: the seed of the places in S.
        save_projection: whether files hold V and the places; else they are made again, of the base's weights.
        frod_dropout: probability with which the input of what is added to W is dropped, in training mode.
        fan_in_fan_out: whether weights are stored (in, out); found out by itself.
        bias: biases to train along: "none", "all", or "frod_only" (those of adapted layers).
        init_weights: whether it begins as the base; `False` adds random numbers to l and S.
        sparse_rate: the share of the places of S that are trained.
        regularization_alpha: what is added to the diagonal of a matrix that is inverted on the way to V.
        progressbar: kept for PEFT's files; nothing is shown here.
        runtime_offload_base_weight: kept for PEFT's files; the base's weights stay where they are.

    Raises:
        ValueError: the rate is no share, the dropout no probability, or a bias of another kind.

    Example:
        >>> config = FrodConfig(sparse_rate=0.02, target_modules=["query", "value"])
        >>> config.sparse_rate, config.save_projection
        (0.02, True)
    """

    peft_type: ClassVar[str] = "FROD"

    projection_prng_key: int = dataclasses.field(default=0, metadata=described("Seed of the places in S."))
    save_projection: bool = dataclasses.field(default=True, metadata=described("Whether files hold V and the places."))
    frod_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input in training."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or frod_only."))
    init_weights: bool = dataclasses.field(default=True, metadata=described("Whether it begins as the base."))
    sparse_rate: float = dataclasses.field(default=0.01, metadata=described("Share of the places of S trained."))
    regularization_alpha: float = dataclasses.field(
        default=1e-3, metadata=described("Added to the diagonal of what is inverted on the way to V.")
    )
    progressbar: bool = dataclasses.field(default=True, metadata=described("Kept for PEFT's files."))
    runtime_offload_base_weight: bool = dataclasses.field(default=False, metadata=described("Kept for PEFT's files."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("frod_dropout", self.frod_dropout)
        check_bias(self.bias, "frod_only")
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"sparse_rate={self.sparse_rate!r}; expected a share, from 0 to 1.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _is_saved(config: FrodConfig) -> bool:
    return config.save_projection


def _l(config: FrodConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.inputs,)


def _values(config: FrodConfig, weight: WeightShape, r: int) -> Shape:
    size = weight.inputs
    count = min(int(size * size * config.sparse_rate), size * (size - 1))
    return (max(1, count) if config.sparse_rate > 0 and size > 1 else count,)


def _v(config: FrodConfig, weight: WeightShape, r: int) -> Shape:
    return (weight.inputs, weight.inputs)


def _places(config: FrodConfig, weight: WeightShape, r: int) -> Shape:
    return (2, *_values(config, weight, r))


def _two(config: FrodConfig, weight: WeightShape, r: int) -> Shape:
    return (2,)


_OF_CATEGORY: dict[str, Any] = {"trained": False, "stored": _is_saved, "shared": True}

SLOTS = {
    "frod_lambda_l": Slot(_l),
    "frod_lambda_s_values": Slot(_values),
    "frod_V": Slot(_v, **_OF_CATEGORY),
    "frod_s_indices": Slot(_places, **_OF_CATEGORY),
    "frod_s_size": Slot(_two, **_OF_CATEGORY),
    "frod_U": Slot(trained=False),
    "frod_start": Slot(trained=False),
    "active": Slot(trained=False, off=0.0),
}


def init(config: FrodConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The numbers of S; l needs all layers of its category, `joint` has it."""
    shape = slots.shapes(SLOTS, config, layouts.of_site(site), 0)["frod_lambda_s_values"]
    drawn = torch.zeros(shape) if config.init_weights else 0.1 * torch.randn(shape, generator=generator)
    return {"frod_lambda_s_values": like_weight(drawn, site.stored, dtype)}


def constants(config: FrodConfig, path: str, leaf: Leaf) -> Leaf:
    """`active`, a 0-d tensor: 1, and 0 where a row of a batch has no adapter."""
    return {"active": constant(1.0, leaf)}


def category(path: str) -> str:
    """The category of a layer, by the last two parts of its path, as PEFT has it."""
    *above, name = path.split(".")
    if not above or above[-1].isdigit():
        return name
    if (above[-1], name) == ("output", "dense") and above[-2:-1] == ["attention"]:
        return "attention_output"
    return f"{above[-1]}_{name}"


def _block(path: str, otherwise: int) -> int:
    """The number of a layer's block: after `layers`, else the first number of its path."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    numbers = [part for part in (*after, *parts) if part.isdigit()]
    return int(numbers[0]) if numbers else otherwise


def _homes(config: FrodConfig, paths: Sequence[str], sites: Mapping[str, Site]) -> dict[str, str]:
    return {path: f"{SHARED}.{category(path)}" for path in paths}


def joint(config: FrodConfig, sites: Mapping[str, Site], generator: torch.Generator, dtype: torch.dtype | None) -> Tree:
    """V and the places of each category, and l, l₀ and U of each layer."""
    made = _categories(config, sites, dtype)
    for path, site in sites.items():
        own = _own(site, made[f"{SHARED}.{category(path)}"]["frod_V"])
        start = like_weight(own["frod_start"].clone(), site.stored, dtype)
        if not config.init_weights:
            start = start + 0.1 * torch.randn(start.shape, generator=generator).to(start)
        made[path] = {**own, "frod_lambda_l": start}
    return made


def _categories(config: FrodConfig, sites: Mapping[str, Site], dtype: torch.dtype | None) -> Tree:
    weights = {path: builders.in_float32(site, "FRoD decomposes the weight") for path, site in sites.items()}
    found: dict[str, dict[int, str]] = {}  # of two layers of one block and category PEFT takes the last
    for number, path in enumerate(sites):
        found.setdefault(category(path), {})[_block(path, number)] = path
    places = torch.Generator().manual_seed(config.projection_prng_key)
    made: Tree = {}
    for name in sorted(found):
        widths = {path: weights[path].shape[1] for path in sites if category(path) == name}
        if len({*widths.values()}) > 1:
            raise ValueError(
                f"FRoD has one V for {', '.join(widths)}, whose inputs are of unlike numbers ({[*widths.values()]}); "
                "adapt them by adapters of their own, or exclude_modules=[...]."
            )
        paths = [path for _, path in sorted(found[name].items())]
        first = sites[paths[0]]
        v = _projection([weights[path].cpu() for path in paths], config.regularization_alpha)
        size, shape = v.shape[0], _values(config, layouts.of_site(first), 0)
        order = torch.randperm(size * (size - 1), generator=places, device="cpu")[: shape[0]]
        rows, columns = order // max(1, size - 1), order % max(1, size - 1)
        device = "cpu" if first.stored.is_meta else first.stored.device
        made[f"{SHARED}.{name}"] = {
            "frod_V": like_weight(v.to(first.weight.dtype), first.stored, dtype),  # PEFT rounds it to that
            "frod_s_indices": torch.stack([rows, columns + (columns >= rows)]).to(device),
            "frod_s_size": torch.tensor([size, size], device=device),
        }
    return made


def _projection(weights: Sequence[Tensor], ridge: float) -> Tensor:
    """V of a category, in float32."""
    stacked = torch.cat(list(weights))
    if stacked.shape[0] < stacked.shape[1]:
        return cast("tuple[Tensor, Tensor, Tensor]", linalg.svd(stacked, full_matrices=True))[2].T
    q, r = cast("tuple[Tensor, Tensor]", linalg.qr(stacked))
    eye, total = torch.eye(len(r), dtype=r.dtype, device="cpu"), torch.zeros_like(r)
    for part in torch.split(q, [len(one) for one in weights]):
        total += cast("Tensor", linalg.inv(part.T @ part + ridge * eye))
    _, vectors = cast("tuple[Tensor, Tensor]", linalg.eigh(total / len(weights)))
    return r.T @ vectors


def _own(site: Site, v: Tensor) -> Leaf:
    """U (out, in) and l₀ (in,): U·diag(l₀)·Vᵀ is the weight, and the columns of U have length 1."""
    held = site.weight.dtype
    weight = layouts.seen(site.kind, site.weight.detach()).double().cpu()
    wide = v.to(held).double().cpu()
    try:
        both = cast("Tensor", linalg.solve(wide, weight.T)).T
    except RuntimeError:  # singular
        both = weight @ cast("Tensor", linalg.pinv(wide, rtol=1e-6)).T
    start = cast("Tensor", linalg.vector_norm(both, dim=0))
    u = torch.where(start > 1e-12, both / start.clamp(min=1e-12), 0)
    rounded = {"frod_U": u.float().to(held), "frod_start": start.float().to(held)}  # as PEFT rounds them
    return {name: like_weight(one.contiguous(), site.stored, v.dtype) for name, one in rounded.items()}


def derived(config: FrodConfig, tree: Tree, sites: Mapping[str, Site]) -> Tree:
    """U and l₀ of each layer; V and the places where a file has them not."""
    if not sites:
        raise builders.needs_base("FrodConfig")
    made: Tree = {}
    if not all("frod_V" in tree.get(home, {}) for home in _homes(config, list(sites), sites).values()):
        dtype = next(leaf["frod_lambda_l"].dtype for leaf in tree.values() if "active" in leaf)
        made = _categories(config, sites, dtype)
    for path, site in sites.items():
        home = f"{SHARED}.{category(path)}"
        made[path] = _own(site, {**made.get(home, {}), **tree.get(home, {})}["frod_V"])
    return made


# --- what it does -----------------------------------------------------------------------------------------------------


def _inner(leaf: Mapping[str, Tensor]) -> Tensor:
    """S + diag(l - l₀), (in, in)."""
    size = leaf["frod_V"].shape[0]
    flat = leaf["frod_s_indices"][0] * size + leaf["frod_s_indices"][1]
    values = leaf["frod_lambda_s_values"]
    s = torch.zeros(size * size, dtype=values.dtype, device=values.device).scatter(0, flat, values).view(size, size)
    return leaf["active"] * (s + torch.diag_embed(leaf["frod_lambda_l"] - leaf["frod_start"]))


def delta(config: FrodConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """U·(S + diag(l - l₀))·Vᵀ, (out, in)."""
    inner = _inner(leaf)
    u, v = (leaf[name].to(inner.dtype) for name in ("frod_U", "frod_V"))
    return u @ inner @ v.mT


def forward(config: FrodConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the layer computes, and U·(S + diag(l - l₀))·Vᵀ·drop(x)."""
    y: Tensor = site(x, *args, **kwargs)
    inner = _inner(leaf)
    u, v = (leaf[name].to(inner.dtype) for name in ("frod_U", "frod_V"))  # PEFT's files may have fewer bits of V
    seen = F.dropout(x.to(inner.dtype), config.frod_dropout, site.training)
    return (y + F.linear(F.linear(seen @ v, inner), u)).to(y.dtype)


DEFAULTS = {**vera.DEFAULTS, "vit": ("query", "value")}

_FREE = ("projection_prng_key", "save_projection", "init_weights", "regularization_alpha")

METHOD = Method(
    config=FrodConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    sharing=Sharing(joint, _homes, derived),
    targets=Targets(by_type(DEFAULTS)),
    stacking=Stacking(varies=(*_FREE, "progressbar", "runtime_offload_base_weight")),
)
