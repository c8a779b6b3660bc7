"""HiRA: W + W ∘ (B·A), an update of low rank that each weight is multiplied by (https://openreview.net/pdf?id=TwJrTz9cRS).

The update itself has a rank as high as W's. A is (r, in, *kernel) and B (out, r), of an embedding (r, tokens) and
(dim, r). A layer's output is y plus what the layer gives with W ∘ (B·A) for its weight and no bias: the weight is
read in every forward, and a packed one is unpacked for it.

Two adapters that are active together follow each other here, as any two that change a weight by what it is: the second
multiplies what the first one made. PEFT adds up what each of them makes of the base's weight.

PEFT refuses convolutions with groups; there A has the inputs of one group. Those are ours alone, and so is an effect of
`rank_pattern`, which PEFT 0.21 reads and does not use: it cannot load an adapter with other ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, lora, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking
from peftfn.models import layers, layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class HiraConfig(LayeredConfig):
    """HiRA's config, with PEFT's fields and defaults: W + W ∘ (B·A) (https://openreview.net/pdf?id=TwJrTz9cRS).

    Attributes:
        r: the rank of B·A, (out, in), by which the weights are multiplied.
        hira_dropout: the probability in training that a number of the update's input is dropped; not of an embedding's.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        init_weights: `True` (A as torch's linear layers, B = 0), `"gaussian"` (A normal of deviation 1/r, B = 0), or
            `False` (both normal: not the identity). `None` is `False`, and `True` for embeddings, as in PEFT.
        rank_pattern: other ranks, by module name or regex; the first one that matches a path counts. PEFT ignores it.

    Raises:
        ValueError: a rank is no positive integer, `hira_dropout` no probability below 1, or `init_weights` unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.HiraConfig(r=16, target_modules=["query", "value"], hira_dropout=0.1)
        >>> config.init_weights
        True
    """

    peft_type: ClassVar[str] = "HIRA"

    r: int = dataclasses.field(default=32, metadata=described("Rank of what the weights are multiplied by."))
    hira_dropout: float = dataclasses.field(
        default=0.0, metadata=described("Dropout on what the update is given in training; an embedding has none.")
    )
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    init_weights: bool | str | None = dataclasses.field(
        default=True, metadata=described("True (B = 0), gaussian (A normal, B = 0), or False (not the identity).")
    )
    rank_pattern: Mapping[str, int] | None = dataclasses.field(
        default_factory=dict[str, int], metadata=described("Other ranks, by module name or regex.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            check_positive("r", rank)
        if not 0 <= self.hira_dropout < 1:
            raise ValueError(f"hira_dropout={self.hira_dropout!r}; expected a probability of at least 0 and below 1.")
        if isinstance(self.init_weights, str) and self.init_weights.lower() != "gaussian":
            raise ValueError(f"init_weights={self.init_weights!r}; expected True, False or 'gaussian'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _a(config: HiraConfig, weight: WeightShape, r: int) -> Shape | None:
    return None if weight.kind == layers.EMBEDDING else (r, weight.inputs, *weight.kernel)


def _b(config: HiraConfig, weight: WeightShape, r: int) -> Shape | None:
    return None if weight.kind == layers.EMBEDDING else (weight.outputs, r, *(1 for _ in weight.kernel))


def _embedding_a(config: HiraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (r, weight.inputs) if weight.kind == layers.EMBEDDING else None


def _embedding_b(config: HiraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (weight.outputs, r) if weight.kind == layers.EMBEDDING else None


SLOTS = {
    "hira_A": Slot(_a, rank=0, off=0.0),
    "hira_B": Slot(_b, rank=1, off=0.0),
    "hira_embedding_A": Slot(_embedding_a, rank=0, off=0.0),
    "hira_embedding_B": Slot(_embedding_b, rank=1, off=0.0),
}


def init(config: HiraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A and B as PEFT draws them: one of them zero, unless a random start is asked for."""
    weight = layouts.of_site(site)
    shapes = slots.shapes(SLOTS, config, weight, matching.rank(config, path))
    (name_a, shape_a), (name_b, shape_b) = shapes.items()
    if config.init_weights is False or (config.init_weights is None and weight.kind != layers.EMBEDDING):
        drawn = torch.randn(shape_a, generator=generator), torch.randn(shape_b, generator=generator)
    elif weight.kind == layers.EMBEDDING:
        drawn = torch.zeros(shape_a), torch.randn(shape_b, generator=generator)
    elif isinstance(config.init_weights, str) and not weight.kernel:  # PEFT draws a convolution's as with True
        drawn = torch.randn(shape_a, generator=generator) / shape_a[0], torch.zeros(shape_b)
    else:
        drawn = (2 * torch.rand(shape_a, generator=generator) - 1) / weight.fan_in**0.5, torch.zeros(shape_b)
    made = zip((name_a, name_b), drawn, strict=True)
    return {name: like_weight(one, site.stored, dtype) for name, one in made}


# --- what it does -----------------------------------------------------------------------------------------------------


def _factor(leaf: Mapping[str, Tensor]) -> Tensor:
    """B·A, (out, in, *kernel)."""
    (a,) = (one for name, one in leaf.items() if name.endswith("A"))
    (b,) = (one for name, one in leaf.items() if name.endswith("B"))
    return (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])


def _weight(config: HiraConfig, leaf: Mapping[str, Tensor], shape: WeightShape, weight: Tensor) -> Tensor:
    return weight + weight * _factor(leaf)


def forward(config: HiraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x), plus what the layer gives with W ∘ (B·A) for its weight and no bias."""
    y, change = site(x, *args, **kwargs), layouts.seen(site.kind, site.weight) * _factor(leaf)
    if config.hira_dropout and site.training and x.is_floating_point():
        x = F.dropout(x, config.hira_dropout, training=True)
    return builders.added(site, y, change, x, *args, **kwargs)


# --- its files --------------------------------------------------------------------------------------------------------


def check_file(config: HiraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file without one of the factors, and one of another rank than its config says."""
    if {name.rpartition("_")[2] for name in leaf} != {"A", "B"}:
        raise KeyError(f"{sorted(leaf)}, and HiRA has an A and a B")
    (rank,) = (one.shape[0] for name, one in leaf.items() if name.endswith("A"))
    if rank != matching.rank(config, path):
        raise ValueError(
            f"rank {rank}, and the config says {matching.rank(config, path)} (peft 0.21 makes every site of rank r, "
            f"whatever rank_pattern says: then take that out of adapter_config.json),"
        )


METHOD = Method(
    config=HiraConfig,
    slots=SLOTS,
    init=init,
    action=builders.reweighted(_weight, forward=forward),
    targets=lora.METHOD.targets,  # as in PEFT
    files=Files(check_file),
    stacking=Stacking(matching.rank, varies=("r", "rank_pattern", "init_weights")),
)
