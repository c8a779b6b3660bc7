"""C3A: W + C, C of blocks that are circulant: each row is the one above it, turned by one (https://arxiv.org/abs/2407.19342).

A block of size b is made of b trained numbers k: C[u, t] = k[(t - u) mod b] / in. So a block of C times x
is the circular correlation of k and x, computed as a product of their Fourier transforms: in·out / b products where a
dense C takes in·out. By default it begins at random, as in PEFT: `init_weights=True` makes a fresh adapter the
identity.

PEFT has `nn.Linear`; transformers' `Conv1D` is ours alone. There two active adapters feed one another (the second gets
what the first gave); here their sum is added, as in the merged weight. PEFT computes in float32 whatever the dtype;
here float64 stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, lora
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import DENSE_TARGETS
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Stacking, Targets, by_type
from peftfn.models import layouts, matching
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class C3AConfig(LayeredConfig):
    """C3A's config, with PEFT's fields and defaults: W + C, C of circulant blocks (https://arxiv.org/abs/2407.19342).

    Attributes:
        block_size: b, the side of a block, in weights; has to divide a layer's inputs and outputs. A layer trains
            out·in / b numbers, (out/b, in/b, b).
        bias: which biases to train too: `"none"`, `"all"`, or `"c3a_only"`, those of the adapted layers.
        block_size_pattern: other sizes, by module name or regex; the first one that matches a path counts.
        init_weights: `True` (zeros), or a random start, which is not the identity: `"xavier_uniform"` (PEFT's
            default, and what `False` means), `"kaiming_uniform"` or `"gaussian"`.

    Raises:
        ValueError: a size is no positive integer, or `bias` or `init_weights` is unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.C3AConfig(block_size=64, target_modules=["query", "value"], init_weights=True)
        >>> config.block_size
        64
    """

    peft_type: ClassVar[str] = "C3A"

    block_size: int = dataclasses.field(
        default=256, metadata=described("Size of a circulant block; divides a layer's inputs and outputs.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or c3a_only."))
    block_size_pattern: Mapping[str, int] | None = dataclasses.field(
        default_factory=dict[str, int], metadata=described("Other block sizes, by module name or regex.")
    )
    init_weights: bool | str = dataclasses.field(
        default="xavier_uniform",
        metadata=described("True (zeros), or at random: xavier_uniform (also False), kaiming_uniform, gaussian."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in (self.block_size, *(self.block_size_pattern or {}).values()):
            check_positive("block_size", size)
        if self.bias not in ("none", "all", "c3a_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'c3a_only'.")
        if self.init_weights not in (True, False, "xavier_uniform", "kaiming_uniform", "gaussian"):
            raise ValueError(
                f"init_weights={self.init_weights!r}; expected True, 'xavier_uniform', 'kaiming_uniform' or 'gaussian'."
            )


def block_size(config: C3AConfig, path: str) -> int:
    """The size of a block of a site."""
    return matching.pattern_value(config.block_size_pattern, path, config.block_size)


def _shape(config: C3AConfig, weight: WeightShape, block: int) -> Shape | None:
    if weight.outputs % block or weight.inputs % block:
        return None
    return (weight.outputs // block, weight.inputs // block, block)


SLOTS = {"c3a_kernel": Slot(_shape, off=0.0)}


def init(config: C3AConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The numbers of all blocks, (out/b, in/b, b): zeros, or drawn as PEFT draws them."""
    weight, block = layouts.of_site(site), block_size(config, path)
    shape = _shape(config, weight, block)
    if shape is None:
        raise ValueError(
            f"{site.path}: block_size={block} does not divide its {weight.inputs} inputs and {weight.outputs} outputs; "
            f"expected a divisor of {math.gcd(weight.inputs, weight.outputs)}. Choose another one for it in "
            "block_size_pattern."
        )
    if config.init_weights is True:
        made = torch.zeros(shape)
    elif config.init_weights == "gaussian":
        made = torch.randn(shape, generator=generator)
    else:
        is_kaiming = config.init_weights == "kaiming_uniform"
        bound = math.sqrt(1 / weight.inputs if is_kaiming else 6 / (weight.inputs + weight.outputs))
        made = (2 * torch.rand(shape, generator=generator) - 1) * bound
    return {"c3a_kernel": like_weight(made, site.stored, dtype)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # torch transforms no halves


def delta(config: C3AConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """C, (out, in)."""
    kernel = _wide(leaf["c3a_kernel"])
    steps = torch.arange(kernel.shape[-1], device=kernel.device)
    blocks = kernel[:, :, (steps - steps[:, None]) % len(steps)]  # (out/b, in/b, b, b)
    return blocks.transpose(1, 2).reshape(weight.outputs, weight.inputs) / weight.inputs


def forward(config: C3AConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x) + C x."""
    y, kernel = site(x, *args, **kwargs), _wide(leaf["c3a_kernel"])
    split = x.to(kernel.dtype).reshape(*x.shape[:-1], *kernel.shape[1:])  # (..., in/b, b)
    product = torch.einsum("...nf,mnf->...mf", torch.fft.rfft(split), torch.fft.rfft(kernel).conj())
    change = cast("Tensor", torch.fft.irfft(product, n=kernel.shape[-1]))  # torch does not say what it returns
    return (y + change.flatten(-2) / x.shape[-1]).to(y.dtype)


METHOD = Method(
    config=C3AConfig,
    slots=SLOTS,
    init=init,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    targets=Targets(by_type(DENSE_TARGETS, has_exclusions=False), lora.sites),
    stacking=Stacking(block_size, varies=("bias", "init_weights")),
)
