"""VB-LoRA: LoRA whose A and B are made of vectors from one bank for all layers (https://arxiv.org/abs/2405.15179).

Each piece of `vector_length` numbers of a row of A, and of a column of B, is a mixture of the bank's `topk` vectors of
the largest logits, weighted by the softmax of these. The bank (num_vectors, vector_length) and the logits of each piece
are trained. So a fresh adapter is not quite the identity: A and B are small random matrices.

With `save_only_topk_weights` files hold, in place of the logits, the numbers of those vectors and their weights. An
adapter that is read from one has the logits that give them, and `FAR` for all other vectors: trained further, it keeps
its choice. (PEFT refuses to train it.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import SHARED, Leaf, Tree
from peftfn.core.config import LayeredConfig
from peftfn.methods import builders, slots
from peftfn.methods.lora_config import check_positive, described
from peftfn.methods.method import Method, constant, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Sharing, Stacking, Targets, by_type
from peftfn.models import layouts
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

FAR = -1e4
"""The logit of a vector that a file says nothing of."""


@dataclasses.dataclass(frozen=True)
class VBLoRAConfig(LayeredConfig):
    """VB-LoRA's config, with PEFT's fields and defaults.

    Attributes:
        r: rank of A and B.
        num_vectors: how many vectors the bank has.
        vector_length: how long they are; it has to divide the inputs and the outputs of each layer.
        topk: how many vectors a piece of A or B mixes.
        save_only_topk_weights: whether files hold those vectors' numbers and weights in place of all logits.
        vblora_dropout: probability with which what goes into A is dropped, in training mode.
        fan_in_fan_out: whether weights are stored (in, out); found out by itself.
        bias: biases to train along: "none", "all", or "vblora_only" (those of adapted layers).
        init_vector_bank_bound: the bank begins uniform between minus this and this.
        init_logits_std: the logits begin normal, with this standard deviation.

    Raises:
        ValueError: a size is not positive, `topk` is more than `num_vectors`, the dropout no probability, or a bias of
            another kind.

    Example:
        >>> config = VBLoRAConfig(r=4, num_vectors=90, vector_length=64, target_modules=["q_proj", "v_proj"])
        >>> config.topk, config.save_only_topk_weights
        (2, False)
    """

    peft_type: ClassVar[str] = "VBLORA"

    r: int = dataclasses.field(default=4, metadata=described("Rank of A and B."))
    num_vectors: int = dataclasses.field(default=256, metadata=described("How many vectors the bank has."))
    vector_length: int = dataclasses.field(default=256, metadata=described("How long they are."))
    topk: int = dataclasses.field(default=2, metadata=described("How many vectors a piece mixes."))
    save_only_topk_weights: bool = dataclasses.field(
        default=False, metadata=described("Whether files hold numbers and weights of the chosen vectors alone.")
    )
    vblora_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input of A in training."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or vblora_only."))
    init_vector_bank_bound: float = dataclasses.field(default=0.02, metadata=described("Bound of the bank's start."))
    init_logits_std: float = dataclasses.field(default=0.1, metadata=described("Spread of the logits' start."))

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("r", "num_vectors", "vector_length", "topk"):
            check_positive(field, getattr(self, field))
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} of num_vectors={self.num_vectors}; expected no more than there are.")
        if not 0 <= self.vblora_dropout < 1:
            raise ValueError(f"vblora_dropout={self.vblora_dropout!r}; expected a probability of at least 0, below 1.")
        if self.bias not in ("none", "all", "vblora_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'vblora_only'.")


# --- its tensors ------------------------------------------------------------------------------------------------------


def _a(config: VBLoRAConfig, weight: WeightShape, r: int) -> Shape | None:
    pieces, rest = divmod(weight.inputs, config.vector_length)
    return None if rest else (config.r, pieces, config.num_vectors)


def _b(config: VBLoRAConfig, weight: WeightShape, r: int) -> Shape | None:
    pieces, rest = divmod(weight.outputs, config.vector_length)
    return None if rest else (pieces, config.r, config.num_vectors)


def _bank(config: VBLoRAConfig, weight: WeightShape, r: int) -> Shape:
    return (config.num_vectors, config.vector_length)


def _in_files_alone(config: VBLoRAConfig, weight: WeightShape, r: int) -> None:
    return None


def _has_choice(config: VBLoRAConfig) -> bool:
    return config.save_only_topk_weights


_NUMBERS, _WEIGHTS = "_topk_indices", "_topk_weights"
_LOGITS = ("vblora_logits_A", "vblora_logits_B")
_CHOICE = [name + what for name in _LOGITS for what in (_NUMBERS, _WEIGHTS)]

SLOTS = {
    "vblora_logits_A": Slot(_a),
    "vblora_logits_B": Slot(_b),
    "vblora_vector_bank": Slot(_bank, shared=True),
    "scaling": Slot(trained=False, off=0.0),
    **dict.fromkeys(_CHOICE, Slot(_in_files_alone, trained=False, stored=_has_choice)),
}


def init(config: VBLoRAConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """Random logits of one layer."""
    weight = layouts.of_site(site)
    shapes = slots.shapes(SLOTS, config, weight, 0)
    if len(shapes) < 2:
        raise ValueError(
            f"{path}: {weight.outputs} outputs and {weight.inputs} inputs are not both multiples of vector_length="
            f"{config.vector_length}; choose another one, or exclude_modules=[{path!r}]."
        )
    drawn = {name: config.init_logits_std * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: like_weight(tensor, site.stored, dtype) for name, tensor in drawn.items()}


def bank(
    config: VBLoRAConfig, sites: Mapping[str, Site], generator: torch.Generator, dtype: torch.dtype | None
) -> Tree:
    """A fresh bank."""
    bound = config.init_vector_bank_bound
    drawn = torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound, generator=generator)
    return {SHARED: {"vblora_vector_bank": like_weight(drawn, next(iter(sites.values())).stored, dtype)}}


def constants(config: VBLoRAConfig, path: str, leaf: Leaf) -> Leaf:
    """What ΔW is multiplied by: 1, and 0 where a row of a batch has no adapter."""
    return {"scaling": constant(1.0, leaf)}


# --- files ------------------------------------------------------------------------------------------------------------


def _numbers_dtype(config: VBLoRAConfig) -> torch.dtype:
    small = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
    return next((dtype for most, dtype in small if config.num_vectors < most), torch.int64)


def to_file(config: VBLoRAConfig, leaf: Leaf) -> Leaf:
    """Of the vectors that are mixed, their numbers and all weights but the last, if the config asks for that."""
    if not config.save_only_topk_weights:
        return leaf
    made = {name: tensor for name, tensor in leaf.items() if name not in _LOGITS}
    for name in _LOGITS:
        logits, numbers = leaf[name].topk(config.topk, dim=-1)
        made[name + _NUMBERS] = numbers.to(_numbers_dtype(config))
        made[name + _WEIGHTS] = logits.softmax(-1)[..., :-1].contiguous()
    return made


def from_file(config: VBLoRAConfig, leaf: Leaf) -> Leaf:
    """The logits that give the weights of a file."""
    made = {name: tensor for name, tensor in leaf.items() if not name.endswith((_NUMBERS, _WEIGHTS))}
    for name in _LOGITS:
        if name + _NUMBERS in leaf:
            numbers, most = leaf[name + _NUMBERS].long(), leaf[name + _WEIGHTS]
            weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], -1)
            far = weights.new_full((*weights.shape[:-1], config.num_vectors), FAR)
            made[name] = far.scatter(-1, numbers, weights.log().clamp(min=FAR / 2))
    return made


# --- what it does -----------------------------------------------------------------------------------------------------


def factors(config: VBLoRAConfig, leaf: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A, (r, in), and B, (out, r)."""
    a, b = (_mixed(config, leaf[name], leaf["vblora_vector_bank"]) for name in _LOGITS)
    return a.flatten(1), b.mT.reshape(-1, config.r)


def _mixed(config: VBLoRAConfig, logits: Tensor, vectors: Tensor) -> Tensor:
    largest, numbers = logits.topk(config.topk, dim=-1)
    return (largest.softmax(-1).unsqueeze(-1) * vectors[numbers]).sum(-2)


def delta(config: VBLoRAConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """B·A, (out, in)."""
    a, b = factors(config, leaf)
    return leaf["scaling"] * (b @ a)


def forward(
    config: VBLoRAConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What the layer computes, and B·A·drop(x)."""
    y: Tensor = site(x, *args, **kwargs)
    a, b = factors(config, leaf)
    seen = F.dropout(x.to(a.dtype), config.vblora_dropout, site.training)
    return (y + leaf["scaling"] * F.linear(F.linear(seen, a), b)).to(y.dtype)


DEFAULTS = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(("bart", "opt"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    **dict.fromkeys(("bert", "roberta"), ("query", "value")),
    **dict.fromkeys(("gptj", "gpt_neo", "llama", "llama4", "gemma", "gemma2", "gemma3_text"), ("q_proj", "v_proj")),
    **dict.fromkeys(("qwen2", "qwen3"), ("q_proj", "v_proj")),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


METHOD = Method(
    config=VBLoRAConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=builders.additive(delta, forward=forward, kinds=builders.MATRICES),
    files=Files(write=to_file, read=from_file),
    sharing=Sharing(bank),
    targets=Targets(by_type(DEFAULTS)),
    stacking=Stacking(varies=("save_only_topk_weights", "init_vector_bank_bound", "init_logits_std")),
)
