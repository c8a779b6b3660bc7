"""LoRA: W + s·B·A with W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Scaling s is alpha / r, or alpha / sqrt(r) with `use_rslora` (https://arxiv.org/abs/2312.03732). It is a tensor in the
adapter's buffers, so that adapters of unlike alpha and rank share one compiled graph and can be stacked.

dtype rules, the same as PEFT's. Outside autocast the delta is computed in the dtype of A and B: x is cast to it, the
sum is taken in the wider of the two dtypes, and the result is cast back to the dtype of the base's output. Under
autocast the matrix products run in autocast's dtype. Where the base reads the tensor itself (attention projections,
experts) the delta is computed in the dtype of A and B, added, and the sum is cast to the dtype of the weight.

Of a convolution with groups, an A as PEFT has it, dense, reads channels that W cannot, so its delta has no place in W.
Ours is grouped like W, (g, r/g, in/g, *kernel): one axis more, so that the two are never confused. A file of PEFT's
with groups runs as it did there, and cannot be merged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import TargetedConfig
from peftfn.core.config_values import patterns_of
from peftfn.methods import builders, slots, trainable_tokens
from peftfn.methods.lora_config import LoraConfig
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.low_rank import leaf_shapes, lora_combine, site_forward
from peftfn.methods.low_rank.linear_kernel import Delta
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Combining, Companions, Files, Stacking, Targets
from peftfn.models import layers, layouts, matching, replicated_layers, targets
from peftfn.models.layers import Place, Site
from peftfn.models.layouts import WeightShape


def _a(config: LoraConfig, weight: WeightShape, r: int) -> Shape | None:
    if weight.kind == layers.EMBEDDING:
        return None
    first = (r * weight.experts,) if weight.groups == 1 else (weight.groups, r // weight.groups)
    return (*first, weight.inputs, *weight.kernel)


def _dense_a(config: LoraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (r, weight.inputs * weight.groups, *weight.kernel)


def _dense_b(config: LoraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (weight.outputs, r, *(1 for _ in weight.kernel))


def _b(config: LoraConfig, weight: WeightShape, r: int) -> Shape | None:
    if weight.kind == layers.EMBEDDING:
        return None
    return (weight.outputs, r * weight.experts // weight.groups, *(1 for _ in weight.kernel))


def _embedding_a(config: LoraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (r, weight.inputs) if weight.kind == layers.EMBEDDING else None


def _embedding_b(config: LoraConfig, weight: WeightShape, r: int) -> Shape | None:
    return (weight.outputs, r) if weight.kind == layers.EMBEDDING else None


SLOTS = {
    "lora_A": Slot(_a, "lora_A.weight", rank=0, inputs=1, also=_dense_a),
    "lora_B": Slot(_b, "lora_B.weight", rank=1, outputs=0, column_major=True, also=_dense_b),
    "lora_embedding_A": Slot(_embedding_a, rank=0, inputs=1),
    "lora_embedding_B": Slot(_embedding_b, rank=1, outputs=0),
    "scaling": Slot(trained=False, off=0.0),
}


def resolve(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The config with the targets that the model decides, its heads, and its repeated layers, filled in."""
    ranges = replicated_layers.replication_of(model) if hasattr(config, "layer_replication") else None  # LoRA's alone
    if ranges and config.layer_replication is None:
        config = dataclasses.replace(config, layer_replication=ranges)
    return targets.resolved(model, config, TARGETS)


def sites(model: nn.Module, config: TargetedConfig) -> dict[str, Place]:
    """The config's sites in the model; patterns that match none of them are an error.

    Raises:
        ValueError: also, layers are to be repeated that the model does not repeat, or the other way round.
    """
    asked, ranges = getattr(config, "layer_replication", None), replicated_layers.replication_of(model)
    if hasattr(config, "layer_replication") and asked != ranges:
        wanted = "the base itself" if asked is None else f"peftfn.replicate_layers(model, {[[*one] for one in asked]})"
        raise ValueError(
            f"layer_replication={asked}, and the model repeats {'no layers' if ranges is None else ranges}; it goes "
            f"with {wanted} as its base."
        )
    found = targets.sites(model, config)
    for field, patterns in patterns_of(config).items():
        targets.refuse_unused_patterns(field, patterns, found)
    return found


def init(config: LoraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """A and B for one site, drawn as PEFT draws them.

    Without `dtype` they take the weight's, but float32 where it is a half or a packed one.
    """
    r, weight = matching.rank(config, path), layouts.of_site(site)
    if config.alora_invocation_tokens and site.kind not in (*builders.MATRICES, layers.EMBEDDING):
        raise ValueError(
            f"{site.path}: alora_invocation_tokens says on which tokens the adapter acts, and this {site.kind} has no "
            f"output for each token. Leave it out: exclude_modules=[{site.path!r}]."
        )
    if r % weight.groups:
        raise ValueError(
            f"{site.path}: r={r} is not divisible by the convolution's groups={weight.groups}. Choose another r for it "
            f"in rank_pattern, or exclude_modules=[{site.path!r}]."
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
    shapes = slots.shapes(SLOTS, config, weight, r)
    shape_a, shape_b = shapes.values()
    drawn = _draw(config, weight, shape_a, shape_b, r, generator)
    return {name: like_weight(one, site.stored, dtype) for name, one in zip(shapes, drawn, strict=True)}


def _draw(
    config: LoraConfig,
    weight: WeightShape,
    shape_a: Shape,
    shape_b: Shape,
    r: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    how = config.init_lora_weights
    if not isinstance(how, bool) and how != "gaussian":
        hint = "; peftfn.loftq(model, config) makes it, with the quantized weights" if how == "loftq" else ""
        raise ValueError(
            f"init_lora_weights={how!r} is read from files only{hint}. init offers True, False and 'gaussian'."
        )
    if weight.kind == layers.EMBEDDING:
        a = torch.zeros(shape_a) if how else torch.randn(shape_a, generator=generator)
        return a, torch.randn(shape_b, generator=generator)
    if how == "gaussian":
        a = torch.randn(shape_a, generator=generator) / r
    else:
        a = _uniform(shape_a, weight.fan_in, generator)
    return a, torch.zeros(shape_b) if how else _uniform(shape_b, math.prod(shape_b[1:]), generator)


def _uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    # kaiming_uniform_(a=sqrt(5)), the default of nn.Linear: within 1/sqrt(fan_in).
    bound = 1 / math.sqrt(fan_in)
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def constants(config: LoraConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling of one site, a 0-d tensor."""
    r = matching.rank(config, path)
    alpha = matching.pattern_value(config.alpha_pattern, path, config.lora_alpha)
    return {"scaling": constant(alpha / math.sqrt(r) if config.use_rslora else alpha / r, leaf)}


def check_file(config: LoraConfig, path: str, leaf: Leaf) -> None:
    """Refuse one factor without the other, and a rank that is not the config's: the scaling would be wrong."""
    for name in sorted(leaf):
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in leaf:
            raise KeyError(f"{sorted(leaf)}, but no {other}")
    rank, rows = matching.rank(config, path), next(leaf[name].shape[0] for name in leaf if name.endswith("_A"))
    # Of experts, the file has rank times their number.
    if rows % rank or (rows != rank and not config.target_parameters):
        raise ValueError(f"rank {rows}, and the config says {rank}")


def to_file(config: LoraConfig, leaf: Leaf) -> Leaf:
    """The leaf in PEFT's shapes."""
    return leaf_shapes.to_file(leaf)


def from_file(config: LoraConfig, leaf: Leaf) -> Leaf:
    """The leaf of a file, with a convolution's A in its groups."""
    return leaf_shapes.from_file(leaf) if any(tensor.dim() > 2 for tensor in leaf.values()) else leaf


def factors(config: LoraConfig, leaf: Mapping[str, Tensor], kind: str, shape: torch.Size) -> Delta:
    """A, B and s of one leaf."""
    first, second = ("lora_embedding_A", "lora_embedding_B") if kind == layers.EMBEDDING else ("lora_A", "lora_B")
    return Delta(leaf[first], leaf[second], leaf["scaling"])


_SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
VARIES = (*_SCALES, "init_lora_weights", "bias", "target_parameters", "alora_invocation_tokens")

ACTION = site_forward.low_rank(factors, takes_rows=True, takes_parts=True)

METHOD = Method(
    config=LoraConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=ACTION,
    targets=Targets(resolve, sites),
    stacking=Stacking(matching.rank, resize=leaf_shapes.resized, varies=VARIES),
    files=Files(check_file, write=to_file, read=from_file),
    combining=Combining(lora_combine.combine, lora_combine.combined),
    companions=Companions("trainable_token_indices", trainable_tokens.of_config),
    invocation="alora_invocation_tokens",
)
