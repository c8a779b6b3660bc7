"""Trainable tokens: some rows of an embedding are trained, and take the place of the base's.

W' is W with the rows of `token_indices` replaced by the trained ones, which begin as W's own: what is stored are rows,
not differences, so they mean the same on an embedding that was resized and drawn anew. Where other layers hold the
same weight (a tied output layer), their rows are replaced too, as in PEFT, unless they have tokens of their own.

An embedding looks tokens up in W and in the trained rows, and no copy of W is made; a linear layer computes the
outputs of the trained rows alone once more, with its bias (PEFT leaves that out).

LoRA's `trainable_token_indices` asks for such an adapter as a companion: an adapter of this method that is a part of
LoRA's (`peftfn.methods.companions`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import PeftConfig
from peftfn.methods.action import OnWeights
from peftfn.methods.lora_config import described
from peftfn.methods.method import Method, like_weight
from peftfn.methods.slots import Shape, Slot
from peftfn.methods.traits import Files, Stacking, Targets
from peftfn.models import layers, layouts, targets
from peftfn.models.layers import Place, Site
from peftfn.models.layouts import WeightShape

ROWS, ACTIVE = "trainable_tokens_delta", "trainable_tokens_active"


@dataclasses.dataclass(frozen=True)
class TrainableTokensConfig(PeftConfig):
    """The config of trainable tokens, with PEFT's fields and defaults: W with some rows replaced by trained ones.

    It has no paper. PEFT's has no `exclude_modules` and no `modules_to_save`, and neither has this.

    Attributes:
        token_indices: the ids of the tokens that are trained: rows (n, d) of an embedding of n tokens here. An adapter
            needs at least one.
        target_modules: names (a path's ending) or a regex of embeddings; by default the model's own input embedding.
        init_weights: `True` (the base's own rows), or `False` (normal numbers: not the identity).

    Raises:
        ValueError: a token is there twice, or negative.

    Example:
        >>> import peftfn as pf
        >>> config = pf.TrainableTokensConfig(token_indices=[31, 32], target_modules=["embed_tokens"])
        >>> config.token_indices
        (31, 32)
    """

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    exclude_modules: ClassVar[None] = None  # PEFT's has neither
    modules_to_save: ClassVar[None] = None

    token_indices: Sequence[int] = dataclasses.field(
        default=(), metadata=described("The tokens whose embeddings are trained.")
    )
    target_modules: Sequence[str] | str | None = dataclasses.field(
        default=None, metadata=described("Names or a regex of embeddings; by default the model's own.")
    )
    init_weights: bool = dataclasses.field(
        default=True, metadata=described("True (the base's own rows), or False (random ones).")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.token_indices)) < len(self.token_indices) or any(one < 0 for one in self.token_indices):
            raise ValueError(
                f"token_indices={list(self.token_indices)}; expected numbers of tokens from 0, each of them once."
            )


def of_config(config: Any) -> tuple[TrainableTokensConfig, ...]:
    """The companions that a LoraConfig asks for with `trainable_token_indices`, one for each embedding."""
    given: Mapping[str, Sequence[int]] | Sequence[int] = config.trainable_token_indices
    if not isinstance(given, Mapping):
        return (TrainableTokensConfig(token_indices=given),)
    twice = sorted({*given} & {*(config.modules_to_save or ())})
    if twice:
        raise ValueError(
            f"modules_to_save and trainable_token_indices both name {twice}; expected a module to be trained whole, or "
            "some of its tokens."
        )
    return tuple(TrainableTokensConfig(token_indices=ids, target_modules=(name,)) for name, ids in given.items())


# --- where it acts ----------------------------------------------------------------------------------------------------


def resolve(model: nn.Module, config: TrainableTokensConfig) -> TrainableTokensConfig:
    """The config with the model's input embedding filled in."""
    if not config.token_indices:
        raise ValueError("token_indices is empty; expected the numbers of the tokens to train.")
    named = dataclasses.replace(config, target_modules=_named(model, config))
    # PEFT reads no config that names both ends of a tie.
    found, every = sites(model, named), targets.sites(model, cast("Any", named))
    return named if len(found) == len(every) else dataclasses.replace(named, target_modules=tuple(found))


def _named(model: nn.Module, config: TrainableTokensConfig) -> Sequence[str] | str:
    if config.target_modules is not None:
        return cast("Sequence[str] | str", targets.in_present_names(model, config.target_modules))
    get = getattr(model, "get_input_embeddings", None)
    own = get() if callable(get) else None
    return tuple(path for path, module in layers.named_modules(model) if module is own)[:1] or ("embed_tokens",)


def sites(model: nn.Module, config: TrainableTokensConfig) -> dict[str, Place]:
    """The embeddings and linear layers that the config names; of those that hold one weight, the first."""
    named = dataclasses.replace(config, target_modules=_named(model, config))
    found: dict[str, Place] = {}
    weights: list[Tensor] = []
    for path, place in targets.sites(model, cast("Any", named)).items():
        own = model.get_submodule(place.owner)._parameters.get(place.weight)
        if own is None or not any(own is one for one in weights):
            found[path] = place
            weights += [] if own is None else [own]
    return found


# --- its tensors ------------------------------------------------------------------------------------------------------


def _sizes(weight: WeightShape) -> tuple[int, int]:
    """How many rows the table has, and how many numbers each."""
    is_embedding = weight.kind == layers.EMBEDDING
    return (weight.inputs, weight.outputs) if is_embedding else (weight.outputs, weight.inputs)


def _rows(config: TrainableTokensConfig, weight: WeightShape, r: int) -> Shape:
    return (len(config.token_indices), _sizes(weight)[1])


def _each(config: TrainableTokensConfig, weight: WeightShape, r: int) -> Shape:
    return (len(config.token_indices),)


SLOTS = {ROWS: Slot(_rows), ACTIVE: Slot(_each, trained=False, off=0.0)}


def init(
    config: TrainableTokensConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> Leaf:
    """The base's own rows, or random ones."""
    weight = layouts.of_site(site)
    ids = _ids(config, weight, site.path, torch.device("cpu"))
    if not config.init_weights:
        return {ROWS: like_weight(torch.randn(_rows(config, weight, 0), generator=generator), site.stored, dtype)}
    if site.stored.is_meta:
        raise ValueError(
            f"{site.path}: tokens begin as the base's own, and the model is on the meta device; load it with its "
            "weights first, or pass init_weights=False."
        )
    table = site.weight.detach()
    return {ROWS: like_weight(table[ids.to(table.device)], site.stored, dtype)}


def constants(config: TrainableTokensConfig, path: str, leaf: Leaf) -> Leaf:
    """`active`, (n,): 1 for each row; in a stack 0 for the rows of tokens that an adapter does not train."""
    rows = leaf[ROWS]
    return {ACTIVE: torch.ones(rows.shape[0], dtype=torch.float32, device=rows.device)}


def _ids(config: TrainableTokensConfig, weight: WeightShape, path: str, device: torch.device) -> Tensor:
    """The numbers of the tokens, (n,)."""
    count, most = _sizes(weight)[0], max(config.token_indices)
    if most >= count:
        raise ValueError(
            f"{path or 'the weight'}: token_indices has {most}, and there are {count} tokens here; resize the "
            "embedding to what it was when the adapter was made."
        )
    return torch.tensor(config.token_indices, device=device)


# --- what it does -----------------------------------------------------------------------------------------------------


def _table(config: TrainableTokensConfig, leaf: Mapping[str, Tensor], shape: WeightShape, table: Tensor) -> Tensor:
    """W as it is stored, a row for each token, with the trained rows in their places."""
    ids = _ids(config, shape, "", table.device)
    rows = torch.where(leaf[ACTIVE].unsqueeze(-1) > 0, leaf[ROWS].to(table.dtype), table.index_select(0, ids))
    return table.index_copy(0, ids, rows)


def merge(
    config: TrainableTokensConfig, leaf: Mapping[str, Tensor], shape: WeightShape, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weight with the trained rows in their places."""
    return {"weight": _table(config, leaf, shape, tensors["weight"])}


def forward(
    config: TrainableTokensConfig, leaf: Mapping[str, Tensor], site: Site, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """What the layer computes with the trained rows."""
    if not _is_plain(config, site.layer):
        weight = _table(config, leaf, layouts.of_site(site), site.weight)
        return site.run_with({**site.tensors, "weight": weight}, x, *args, **kwargs)
    y: Tensor = site(x, *args, **kwargs)
    ids, rows = _ids(config, layouts.of_site(site), site.path, y.device), leaf[ROWS].to(y.dtype)
    if site.kind == layers.EMBEDDING:
        is_one = x.unsqueeze(-1) == ids  # (..., n)
        number = is_one.to(torch.uint8).argmax(-1)
        is_trained = is_one.any(-1) & (leaf[ACTIVE] > 0)[number]
        return torch.where(is_trained.unsqueeze(-1), F.embedding(number, rows), y)
    bias = site.tensors["bias"]
    own = F.linear(x.to(y.dtype), rows, None if bias is None else bias.index_select(0, ids).to(y.dtype))
    return y.index_copy(-1, ids, torch.where(leaf[ACTIVE] > 0, own, y.index_select(-1, ids)))


def _is_plain(config: TrainableTokensConfig, layer: nn.Module) -> bool:
    """Whether a layer is a plain lookup or product, which neither scales nor drops the gradient of a trained row."""
    if not isinstance(layer, nn.Embedding):
        return not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward
    is_told = layer.scale_grad_by_freq or layer.padding_idx in config.token_indices
    return type(layer).forward is nn.Embedding.forward and not is_told


# --- stacks of adapters that train unlike tokens ----------------------------------------------------------------------


def _shared(configs: Sequence[TrainableTokensConfig]) -> TrainableTokensConfig:
    every = sorted({one for config in configs for one in config.token_indices})
    return dataclasses.replace(configs[0], token_indices=tuple(every))


def _pad(configs: Sequence[TrainableTokensConfig], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves with a row for each token that any of the adapters trains; the others' rows are not active."""
    every = _shared(configs).token_indices
    model = next(leaf for leaf in leaves if leaf is not None)

    def padded(config: TrainableTokensConfig, leaf: Leaf | None) -> Leaf:
        empty = {name: one.new_zeros(len(every), *one.shape[1:]) for name, one in model.items()}
        if leaf is None:
            return empty
        at = torch.tensor([every.index(one) for one in config.token_indices], device=leaf[ROWS].device)
        return {name: one.index_copy(0, at, leaf[name]) for name, one in empty.items()}

    return [padded(config, leaf) for config, leaf in zip(configs, leaves, strict=True)]


def _trim(config: TrainableTokensConfig, configs: Sequence[TrainableTokensConfig], path: str, leaf: Leaf) -> Leaf:
    every = _shared(configs).token_indices
    at = torch.tensor([every.index(one) for one in config.token_indices], device=leaf[ROWS].device)
    return {name: one.index_select(0, at) for name, one in leaf.items()}


METHOD = Method(
    config=TrainableTokensConfig,
    slots=SLOTS,
    init=init,
    constants=constants,
    action=OnWeights((layers.EMBEDDING, layers.LINEAR), forward, merge, ("weight",), of_tables=True),
    targets=Targets(resolve, sites),
    files=Files(inside="token_adapter"),
    stacking=Stacking(pad=_pad, trim=_trim, shared=_shared, varies=("token_indices", "init_weights")),
)
