"""GLoRA: W + W ∘ A + B, and b + b ∘ D + E + W·C (https://arxiv.org/abs/2306.07967).

A and B are each a product of low rank, a number for each output, one number, or nothing (`config_A_B`); C is a column
of rank r, a column, or nothing (`config_C`); D and E are vectors, numbers, or nothing (`config_D_E`). C, D and E need a
bias to act on: a layer without one has none of them. A layer's output is y plus what
the layer gives with the changes of W and b for its weight and bias: the weight is read in every forward, and a packed
one is unpacked for it.

For a part that is "none" PEFT's files hold zeros of the whole shape, (out, in) for A and B. They are in files
alone. Two adapters that are active together follow each other; PEFT adds up what each of them makes of W and b.

PEFT has linear layers; transformers' `Conv1D` is ours alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.core.config import TargetedConfig
from peftfn.methods import builders, slots
from peftfn.methods.action import OnWeights
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.lora_targets import TARGETS
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot, always
from peftfn.methods.traits import Files, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class GloraConfig(TargetedConfig):
    """GLoRA's config, with PEFT's: W + W ∘ A + B, b + b ∘ D + E + W·C (https://arxiv.org/abs/2306.07967).

    PEFT's has no `exclude_modules`: where it is given, an adapter's `target_modules` are the paths that are left.

    Attributes:
        r: the rank of what is `"lora"`.
        config_A_B: A and B: each `"lora"` ((out, r) times (r, in)), `"vector"` ((out, 1)), `"constant"` or `"none"`.
        config_C: C: `"lora"` ((in, r) times (r, 1)), `"vector"` ((in, 1)) or `"none"`; only where there is a bias.
        config_D_E: D and E: each `"vector"` ((out,)), `"constant"` or `"none"`; only where there is a bias.
        init_weights: `True` (zeros but for the second factors), or `False` (random: not the identity).
        bias: which biases to train too: `"none"`, `"all"`, or `"glora_only"`, those of the adapted layers.

    Raises:
        ValueError: `r` is no positive integer, or one of the others unknown.

    Example:
        >>> import peftfn as pf
        >>> pf.GloraConfig(r=4, config_A_B="vector", target_modules=["query", "value"]).config_C
        'lora'
    """

    peft_type: ClassVar[str] = "GLORA"

    r: int = dataclasses.field(default=8, metadata=described("Rank of what is of low rank."))
    config_A_B: str = dataclasses.field(  # noqa: N815  # PEFT's name
        default="lora", metadata=described("What weights are multiplied by and added to: lora, vector, constant, none.")
    )
    config_C: str = dataclasses.field(  # noqa: N815  # the same
        default="lora", metadata=described("What the weight gives to the bias: lora, vector, none.")
    )
    config_D_E: str = dataclasses.field(  # noqa: N815  # the same
        default="constant", metadata=described("What biases are multiplied by and added to: vector, constant, none.")
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (no change), or False (not the identity).")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or glora_only."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        for field, known in FORMS.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r}; expected one of {', '.join(known)}.")
        if self.bias not in ("none", "all", "glora_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'glora_only'.")


FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


# --- its tensors ------------------------------------------------------------------------------------------------------


def _shapes(config: GloraConfig, weight: WeightShape, r: int) -> dict[str, Shape]:
    """The shape of each tensor that there is."""
    out, inputs = weight.outputs, weight.inputs
    a_b: dict[str, dict[str, Shape]] = {
        "lora": {"Xd": (out, r), "Xu": (r, inputs)},
        "vector": {"X": (out, 1)},
        "constant": {"X": (1,)},
    }
    c: dict[str, dict[str, Shape]] = {"lora": {"Xd": (inputs, r), "Xu": (r, 1)}, "vector": {"X": (inputs, 1)}}
    d_e: dict[str, dict[str, Shape]] = {"vector": {"X": (out,)}, "constant": {"X": (1,)}}
    found = dict.fromkeys("AB", a_b.get(config.config_A_B, {}))
    if weight.has_bias:
        found |= {"C": c.get(config.config_C, {}), **dict.fromkeys("DE", d_e.get(config.config_D_E, {}))}
    return {f"glora_{which}_{name}": shape for which, form in found.items() for name, shape in form.items()}


def _slot(which: str, own: str) -> Slot:
    name = f"glora_{which}_{own}"
    return Slot(slots.among_shapes(_shapes, name), f"glora_{which}.{own}", rank={"Xd": 1, "Xu": 0}.get(own), off=0.0)


def _not_kept(config: GloraConfig, weight: WeightShape, r: int) -> None:
    return None


SLOTS = {
    **{f"glora_{which}_{own}": _slot(which, own) for which in "ABCDE" for own in ("Xd", "Xu", "X")},
    **{
        f"glora_{which}_zeros": Slot(_not_kept, f"glora_{which}.zeros", trained=False, stored=always)
        for which in "ABCDE"
    },
    "sizes": Slot(trained=False),  # the layer's outputs and inputs, as far as the zeros in a file need them
}


def _rank(config: GloraConfig, path: str) -> int:
    return config.r


def init(config: GloraConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Zeros but for Xu, or random numbers, as PEFT draws them."""
    weight = layouts.of_site(site)
    shapes = slots.shapes(SLOTS, config, weight, config.r)
    if not shapes:
        raise ValueError(
            f"{site.path}: nothing is left to train there: config_A_B is 'none', and C, D and E are none or have no "
            f"bias to act on. Leave it out: exclude_modules=[{site.path!r}]."
        )

    def drawn(name: str, shape: Shape) -> Tensor:
        if config.init_weights and not name.endswith("Xu"):
            return torch.zeros(shape)
        if shape == (1,):
            return 0.02 * torch.randn(shape, generator=generator)
        return (2 * torch.rand(shape, generator=generator) - 1) / shape[-1] ** 0.5

    made = {name: like_weight(drawn(name, shape), site.stored, dtype) for name, shape in shapes.items()}
    return {**made, **_sizes(made, weight.outputs, weight.inputs)}


# --- what it does -----------------------------------------------------------------------------------------------------


def _part(leaf: Mapping[str, Tensor], which: str) -> Tensor | None:
    """A, B, C, D or E, in a shape that spreads over what it acts on; `None` where there is none."""
    if f"glora_{which}_Xd" in leaf:
        return leaf[f"glora_{which}_Xd"] @ leaf[f"glora_{which}_Xu"]
    return leaf.get(f"glora_{which}_X")


def _sum(terms: list[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term
    return total


def _changes(leaf: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the weight (out, in), and to the bias; `None` where nothing is."""
    a, b, c, d, e = (_part(leaf, which) for which in "ABCDE")
    to_weight = _sum([*([] if a is None else [weight * a]), *([] if b is None else [b.expand(weight.shape)])])
    if bias is None:
        return to_weight, None
    to_bias = _sum(
        [
            *([] if d is None else [bias * d]),
            *([] if e is None else [e.expand(bias.shape)]),
            *([] if c is None else [(weight.to(c.dtype) @ c).squeeze(-1)]),
        ]
    )
    return to_weight, to_bias


def merge(
    config: GloraConfig, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The changed weight, and the changed bias where there is one."""
    old, bias = tensors["weight"], tensors.get("bias")
    if bias is None and set("CDE") - set(_absent(leaf)):
        raise ValueError("the adapter changes the layer's bias too, and it is not among the parameters")
    weight = layouts.seen(shape.kind, old)
    to_weight, to_bias = _changes(leaf, weight, bias)
    made: dict[str, Tensor] = {"weight": old}
    if to_weight is not None:
        made["weight"] = layouts.stored(shape.kind, weight + to_weight).to(old.dtype)
    if to_bias is not None and bias is not None:
        made["bias"] = (bias + to_bias).to(bias.dtype)
    return made


def forward(
    config: GloraConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """site(x), plus what the layer gives with the changes of W and b for its weight and bias."""
    y, tensors = site(x, *args, **kwargs), site.tensors
    weight = tensors["weight"]
    assert weight is not None, "every layer that GLoRA acts on has a weight"
    to_weight, to_bias = _changes(leaf, layouts.seen(site.kind, weight), tensors["bias"])
    if to_weight is None:
        return y if to_bias is None else (y + to_bias).to(y.dtype)
    to_bias = None if to_bias is None else to_bias.to(to_weight.dtype)
    changed = site.run_with({"weight": layouts.stored(site.kind, to_weight), "bias": to_bias}, x, *args, **kwargs)
    return (y + changed).to(y.dtype)


# --- its files --------------------------------------------------------------------------------------------------------


def _absent(leaf: Mapping[str, Tensor]) -> list[str]:
    return [which for which in "ABCDE" if f"glora_{which}_X" not in leaf and f"glora_{which}_Xd" not in leaf]


def _sizes(leaf: Mapping[str, Tensor], outputs: int, inputs: int) -> Leaf:
    """How many outputs and inputs the zeros of what is absent have; 0 where none of them is so long."""
    absent = _absent(leaf)
    if not absent:
        return {}
    needed = (outputs if {"A", "D"} & {*absent} else 0, inputs if {"A", "C"} & {*absent} else 0)
    return {"sizes": torch.tensor(needed, device=next(iter(leaf.values())).device)}


def to_file(config: Any, leaf: Leaf) -> Leaf:
    """The leaf with PEFT's zeros."""
    if "sizes" not in leaf:
        return leaf
    outputs, inputs = (int(size) for size in leaf["sizes"])
    like = next(one for name, one in leaf.items() if name != "sizes")
    shapes: dict[str, Shape] = {**dict.fromkeys("AB", (outputs, inputs)), "C": (inputs, 1)}
    shapes |= dict.fromkeys("DE", (outputs,))
    zeros = {f"glora_{which}_zeros": like.new_zeros(()).expand(shapes[which]) for which in _absent(leaf)}
    return {**{name: one for name, one in leaf.items() if name != "sizes"}, **zeros}


def from_file(config: GloraConfig, leaf: Leaf) -> Leaf:
    """The leaf without PEFT's zeros, of which it keeps the sizes."""
    own = {name: one for name, one in leaf.items() if not name.endswith("zeros")}
    shapes = {name: tuple(one.shape) for name, one in leaf.items() if name.endswith("zeros")}
    whole = shapes.get("glora_A_zeros", (0, 0))
    outputs = whole[0] or shapes.get("glora_D_zeros", (0,))[0]
    inputs = whole[1] or shapes.get("glora_C_zeros", (0,))[0]
    return {**own, **_sizes(own, outputs, inputs)}


def check_file(config: GloraConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file with numbers where there are to be zeros."""
    for name, one in leaf.items():
        if name.endswith("zeros") and bool(one.any()):
            raise ValueError(f"{SLOTS[name].key} with numbers that are not 0")


METHOD = Method(
    config=GloraConfig,
    slots=SLOTS,
    init=init,
    action=OnWeights(builders.MATRICES, forward, merge),
    targets=Targets(by_type(TARGETS, has_exclusions=False)),
    files=Files(check_file, write=to_file, read=from_file),
    stacking=Stacking(_rank, varies=("r", "bias", "init_weights")),
)
