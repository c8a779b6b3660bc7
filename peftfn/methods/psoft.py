"""PSOFT: W + s·B·(R - I)·A, R a rotation of W's r largest directions (https://openreview.net/forum?id=FSHrinMArK).

A and B are made of the base's weight, W ≈ s·B·A by its r largest singular values, and are not trained; with
`psoft_init` A = Vᵀ and B = U·S/s, with `pissa_init` each has the root of S/s. R = diag(b)·Rot·diag(a), where Rot is
(I + Q)·(I - Q)⁻¹ of a skew matrix Q, whose upper triangle is trained, or PEFT's sum of powers with
`use_cayley_neumann`, or any matrix without `psoft_orth`.

Files hold R alone: A and B are made again of the base's weight, so they are read with the model. The signs of
singular vectors are those that this machine's SVD gives, as in PEFT: where another machine's gives others, the trained
R means something else there.

PEFT has linear layers; transformers' `Conv1D` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, lora, oft, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class PsoftConfig(LayeredConfig):
    """PSOFT's config, with PEFT's fields and defaults: W + s·B·(R - I)·A (https://openreview.net/forum?id=FSHrinMArK).

    Attributes:
        r: how many singular directions of W are rotated: R is (r, r).
        psoft_alpha: the scaling s is psoft_alpha / r; s·B·A is W's part of rank r whatever it is.
        psoft_dropout: the probability in training that a number of A's input is dropped.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        ab_svd_init: of W ≈ U·S·Vᵀ: `"psoft_init"` (A = Vᵀ, B = U·S/s), or `"pissa_init"` (each has the root of S/s).
        psoft_svd: `"full"`, or `"lowrank"`, by random projection.
        psoft_svd_lowrank_niter: how many power iterations `"lowrank"` has.
        random_seed: the seed of its projection.
        psoft_orth: whether R is a rotation but for its gains; otherwise it is any matrix.
        psoft_mag_b: whether R has a gain for each number that it puts out.
        psoft_mag_a: whether it has one for each number that it takes in.
        use_cayley_neumann: whether the rotation is a sum of powers of the skew matrix Q: only near a rotation.
        num_cayley_neumann_terms: how many terms that sum has.
        cayley_neumann_eps: the largest norm of Q in it; `None` is any.
        init_weights: `True` (R = I), or `False` (random, near it).

    Raises:
        ValueError: `r` or `num_cayley_neumann_terms` is no positive integer, `psoft_dropout` no probability below 1,
            `ab_svd_init` or `psoft_svd` unknown, or `cayley_neumann_eps` not between 0 and 1.

    Example:
        >>> import peftfn as pf
        >>> config = pf.PsoftConfig(r=16, psoft_alpha=16, target_modules=["query", "value"])
        >>> config.r, config.psoft_orth
        (16, True)
    """

    peft_type: ClassVar[str] = "PSOFT"

    r: int = dataclasses.field(default=32, metadata=described("How many singular directions are rotated."))
    psoft_alpha: float = dataclasses.field(default=32, metadata=described("Scaling is psoft_alpha / r."))
    psoft_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input of A in training."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    ab_svd_init: str = dataclasses.field(
        default="psoft_init", metadata=described("psoft_init (A has orthonormal rows) or pissa_init.")
    )
    psoft_svd: str = dataclasses.field(default="full", metadata=described("full, or lowrank (by random projection)."))
    psoft_svd_lowrank_niter: int = dataclasses.field(default=10, metadata=described("Power iterations of lowrank."))
    random_seed: int = dataclasses.field(default=0, metadata=described("Seed of the projection of lowrank."))
    psoft_orth: bool = dataclasses.field(default=True, metadata=described("Whether R is made of a rotation."))
    psoft_mag_b: bool = dataclasses.field(default=True, metadata=described("Whether R's outputs are scaled."))
    psoft_mag_a: bool = dataclasses.field(default=True, metadata=described("Whether R's inputs are scaled."))
    use_cayley_neumann: bool = dataclasses.field(
        default=False, metadata=described("Whether the rotation is a sum of powers, and not exact.")
    )
    num_cayley_neumann_terms: int = dataclasses.field(default=5, metadata=described("How many powers that has."))
    cayley_neumann_eps: float | None = dataclasses.field(
        default=None, metadata=described("The largest norm of Q in the sum of powers.")
    )
    init_weights: bool = dataclasses.field(default=True, metadata=described("True (R = I), or False (near it)."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        check_positive("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        if not 0 <= self.psoft_dropout < 1:
            raise ValueError(f"psoft_dropout={self.psoft_dropout!r}; expected a probability of at least 0, below 1.")
        for field, known in (("ab_svd_init", ("psoft_init", "pissa_init")), ("psoft_svd", ("full", "lowrank"))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r}; expected {' or '.join(map(repr, known))}.")
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ValueError(f"cayley_neumann_eps={self.cayley_neumann_eps!r}; expected a number between 0 and 1.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _matrix(config: PsoftConfig, weight: WeightShape, r: int) -> Shape:
    return (config.r * (config.r - 1) // 2,) if config.psoft_orth else (config.r, config.r)


def _a_gain(config: PsoftConfig, weight: WeightShape, r: int) -> Shape | None:
    return (config.r,) if config.psoft_mag_a else None


def _b_gain(config: PsoftConfig, weight: WeightShape, r: int) -> Shape | None:
    return (config.r,) if config.psoft_mag_b else None


SLOTS = {
    "psoft_R": Slot(_matrix, "psoft_R.weight"),
    "psoft_vector_a": Slot(_a_gain, "psoft_R.vector_a"),
    "psoft_vector_b": Slot(_b_gain, "psoft_R.vector_b"),
    "psoft_A": Slot(trained=False),
    "psoft_B": Slot(trained=False),
    "scaling": Slot(trained=False, off=0.0),
}


def init(config: PsoftConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """R = I, or near it, and the factors of the base's weight."""
    shapes = slots.shapes(SLOTS, config, layouts.of_site(site), 0)

    def drawn(name: str, shape: Shape) -> Tensor:
        if name != "psoft_R":
            return torch.ones(shape)
        start = torch.zeros(shape) if config.psoft_orth else torch.eye(config.r)
        return start if config.init_weights else start + 0.1 * torch.randn(shape, generator=generator)

    made = {name: like_weight(drawn(name, shape), site.stored, dtype) for name, shape in shapes.items()}
    return {**made, **derived(config, path, {}, site)}


def constants(config: PsoftConfig, path: str, leaf: Leaf) -> Leaf:
    """The scaling, a 0-d tensor."""
    return {"scaling": constant(config.psoft_alpha / config.r, leaf)}


def derived(config: PsoftConfig, path: str, leaf: Leaf, site: Site | None) -> Leaf:
    """A and B of the base's weight."""
    if site is None:
        raise builders.needs_base("PsoftConfig")
    shape = layouts.of_site(site)
    if config.r > min(shape.outputs, shape.inputs):
        raise ValueError(
            f"{site.path}: r={config.r}, and the weight has no more than {min(shape.outputs, shape.inputs)} singular "
            f"values; choose a smaller r, or exclude_modules=[{site.path!r}]."
        )
    u, s, vh = _decomposed(config, builders.in_float32(site, "PSOFT's factors are made of the weight"))
    s = s / (config.psoft_alpha / config.r)
    left, right = (s.sqrt(), s.sqrt()) if config.ab_svd_init == "pissa_init" else (s, torch.ones_like(s))
    return {
        "psoft_A": like_weight((right.unsqueeze(1) * vh).contiguous(), site.stored, None),
        "psoft_B": like_weight((u * left).contiguous(), site.stored, None),
    }


def _decomposed(config: PsoftConfig, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of the r largest singular values."""
    r, linalg = config.r, cast("Any", torch.linalg)  # torch does not say what these return
    if config.psoft_svd == "full":
        u, s, vh = linalg.svd(weight, full_matrices=False)
        return u[:, :r], s[:r], vh[:r]
    # torch.svd_lowrank with random numbers of our own: it takes no generator, and these are what a seed gives there.
    generator = torch.Generator(weight.device).manual_seed(config.random_seed)
    is_wide = weight.shape[0] < weight.shape[1]
    a = weight.mH if is_wide else weight
    q = linalg.qr(a @ torch.randn(a.shape[1], r, dtype=a.dtype, device=a.device, generator=generator)).Q
    for _ in range(config.psoft_svd_lowrank_niter):
        q = linalg.qr(a @ linalg.qr(a.mH @ q).Q).Q
    u, s, vh = linalg.svd(q.mH @ a, full_matrices=False)
    u, v = q @ u, vh.mH
    return (v, s, u.mH) if is_wide else (u, s, v.mH)


# --- what it does -----------------------------------------------------------------------------------------------------


def rotation(config: PsoftConfig, leaf: Mapping[str, Tensor]) -> Tensor:
    """R, (r, r)."""
    r, given = config.r, leaf["psoft_R"]
    matrix = given
    if config.psoft_orth:
        rows, columns = torch.triu_indices(r, r, 1, device=given.device)
        upper = given.new_zeros(r * r).index_copy(0, rows * r + columns, given).view(r, r)
        matrix = _rotation(config, upper - upper.mT)
    if config.psoft_mag_b:
        matrix = leaf["psoft_vector_b"].unsqueeze(1) * matrix
    return matrix * leaf["psoft_vector_a"] if config.psoft_mag_a else matrix


def _rotation(config: PsoftConfig, skew: Tensor) -> Tensor:
    eye = torch.eye(config.r, dtype=skew.dtype, device=skew.device)
    if not config.use_cayley_neumann:
        return cast("Tensor", torch.linalg.solve(eye - skew, eye + skew, left=False))
    if config.cayley_neumann_eps is not None:
        square = skew.square().sum()
        norm = torch.where(square > 0, square, 1.0).sqrt()  # a norm of 0 has no gradient
        most = config.cayley_neumann_eps
        skew = skew * torch.where((norm > most) & (square > 0), most / (norm + 1e-12), 1.0)
    return oft.series(skew, eye, config.num_cayley_neumann_terms)


def _turn(config: PsoftConfig, leaf: Mapping[str, Tensor]) -> Tensor:
    """R - I."""
    matrix = rotation(config, leaf).to(leaf["psoft_A"].dtype)
    return matrix - torch.eye(config.r, dtype=matrix.dtype, device=matrix.device)


def delta(config: PsoftConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """s·B·(R - I)·A, (out, in)."""
    return leaf["scaling"] * (leaf["psoft_B"] @ _turn(config, leaf) @ leaf["psoft_A"])


def forward(
    config: PsoftConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """site(x) + s·B·(R - I)·A·drop(x)."""
    y: Tensor = site(x, *args, **kwargs)
    seen = F.dropout(x.to(leaf["psoft_A"].dtype), config.psoft_dropout, site.training)
    change = F.linear(F.linear(F.linear(seen, leaf["psoft_A"]), _turn(config, leaf)), leaf["psoft_B"])
    return (y + leaf["scaling"] * change).to(y.dtype)


_OF_FACTORS = ("ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed")

METHOD = Method(
    config=PsoftConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    files=Files(derived=derived),
    targets=Targets(lora.resolve),  # as in PEFT
    stacking=Stacking(varies=("psoft_alpha", "init_weights", *_OF_FACTORS)),
)
