"""The config that prompt methods share, and how a model's sizes are filled into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.core.adapter import Leaf
from peftfn.core.config import PeftConfig
from peftfn.models import layers, matching
from peftfn.models import transformers_names as hf
from peftfn.models import transformers_positions as counted
from peftfn.models.layers import Place

Config = TypeVar("Config", bound="PromptLearningConfig")


@dataclasses.dataclass(frozen=True)
class PromptLearningConfig(PeftConfig):
    """The config of a method that puts virtual tokens before the input.

    Attributes:
        num_virtual_tokens: how many.
        token_dim: their width; `None` takes the model's.
        num_transformer_submodules: PEFT's number of copies: 2 for `SEQ_2_SEQ_LM`, of which the first is used.
        num_attention_heads: of keys and values; `None` takes the model's.
        num_layers: `None` takes the model's.
        modules_to_save: modules to train and save whole, such as a new head.

    Raises:
        ValueError: a number that is given is not positive.

    Example:
        >>> import peftfn as pf
        >>> isinstance(pf.PromptTuningConfig(num_virtual_tokens=8), pf.PromptLearningConfig)
        True
    """

    num_virtual_tokens: int | None = dataclasses.field(default=None, metadata={"help": "How many virtual tokens."})
    token_dim: int | None = dataclasses.field(default=None, metadata={"help": "Their width; the model's by default."})
    num_transformer_submodules: int | None = dataclasses.field(
        default=None, metadata={"help": "PEFT's number of copies; 2 for encoder-decoders."}
    )
    num_attention_heads: int | None = dataclasses.field(
        default=None, metadata={"help": "Heads of keys and values; the model's by default."}
    )
    num_layers: int | None = dataclasses.field(default=None, metadata={"help": "Layers; the model's by default."})
    modules_to_save: Sequence[str] | None = dataclasses.field(
        default=None, metadata={"help": "Modules to train and save whole, such as a new head."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_virtual_tokens", "token_dim", "num_transformer_submodules"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}({name}={value}): expected a positive integer.")

    @property
    def rows(self) -> int:
        """The number of virtual tokens that are trained, PEFT's copies included.

        Example:
            >>> import peftfn as pf
            >>> pf.PromptTuningConfig(num_virtual_tokens=8, num_transformer_submodules=2).rows
            16
        """
        return (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)


def resolve(model: nn.Module, config: Config, needed: Sequence[str] | None = None) -> Config:
    """The config with what the model decides filled in, by PEFT's rules.

    Args:
        model: the base.
        config: what is asked for.
        needed: the sizes that have to be known; all of them by default.

    Raises:
        ValueError: the number of virtual tokens is not given, or the model does not say a size.
    """
    if config.num_virtual_tokens is None:
        raise ValueError(f"{type(config).__name__}: num_virtual_tokens is None; expected a positive integer.")
    sizes = {name: getattr(config, name) or size(model, name) for name in _SIZES}
    for name, found in sizes.items():
        if found is None and name in (needed or _SIZES):
            raise ValueError(
                f"{type(config).__name__}: {name} is None, and {type(model).__name__} has no config that says it "
                f"({', '.join(_SIZES[name])}); give it."
            )
    copies = config.num_transformer_submodules or (2 if config.task_type == "SEQ_2_SEQ_LM" else 1)
    heads = matching.with_heads(config)
    return dataclasses.replace(config, **sizes, num_transformer_submodules=copies, modules_to_save=heads)


_SIZES = {
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


def size(model: nn.Module, field: str) -> int | None:
    """What the model's config says of a field, under any of the names that it has there; `None` if it has none."""
    config = text_config(model)
    found = (hf.said(config, name) for name in _SIZES[field])
    return next((one for one in found if isinstance(one, int)), None)


def refuse_many_vocabularies(model: nn.Module) -> None:
    """Refuse a model with several input embeddings, one for each of its vocabularies."""
    found = from_getter(model, "input_embeddings")
    if isinstance(found, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has {len(found)} input embeddings, one for each of its vocabularies, and a prompt "
            "or a prefix is of one; use a method that changes layers."
        )


def refuse_pictures(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse a call whose positions a model counts from its pictures: it does not where tokens are put before them."""
    name, positions = counted.counted_from_pictures(model, given), given.get(hf.POSITIONS)
    if isinstance(positions, Tensor) and positions.dim() > 2 and not counted.counts_on(model):
        is_known = not torch.compiler.is_compiling() and not transforms.is_mapped(positions)
        name = None if is_known and bool((positions == positions[-1:]).all()) else hf.POSITIONS
    if name is not None:
        raise ValueError(
            f"the batch has {name}, and {type(model).__name__} counts positions in space, of pictures and of the token "
            "ids, where a prompt or a prefix has none. Use a method that changes layers."
        )


def text_config(model: nn.Module) -> Any:
    """The model's config, of a multimodal one the language model's."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def sites(model: nn.Module, config: Any) -> dict[str, Place]:
    """The one site: the model itself."""
    return {"": Place("", "", layers.MODEL)}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder, as transformers' config says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def without_head(model: nn.Module) -> nn.Module:
    """The model inside the one with a head, or the model itself where there is none."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    return inner if isinstance(inner, nn.Module) else model


def writes(model: nn.Module) -> bool:
    """Whether transformers says that the model can generate."""
    says: Any = getattr(model, "can_generate", None)
    return callable(says) and bool(says())


def half(model: nn.Module, name: str) -> nn.Module:
    """The `encoder` or `decoder` of an encoder-decoder."""
    found = from_getter(model, name)
    if found is not None and is_encoder_decoder(found):
        found = from_getter(found, name) or found  # Florence's is a whole BART
    if found is None:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder without a get_{name}(); prompts need it.")
    return found


def from_getter(model: nn.Module, name: str) -> nn.Module | None:
    """What the model's own `get_...()` gives; `None` where it has none, or does not say."""
    find: Any = getattr(model, f"get_{name}", None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # transformers' own
        return None
    return found if isinstance(found, nn.Module) else None


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of an encoder-decoder."""
    return half(model, "decoder")


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The path of a module of the model."""
    return next(path for path, one in layers.named_modules(model) if one is module)


def table(model: nn.Module) -> Tensor:
    """The input embedding's weight, or else the model's first parameter: new tensors go to its device."""
    weight = getattr(from_getter(model, "input_embeddings"), "weight", None)
    return weight if isinstance(weight, Tensor) else next(model.parameters())


def dtype(model: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of the model's first floating-point weight, or another one. A bound model holds prompts of its own."""
    weights = (one for child in model.children() for one in child.parameters() if one.is_floating_point())
    return next((one.dtype for one in weights), otherwise)


def check_rows(config: PromptLearningConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file's prompt that has another length than its config says."""
    rows = leaf["prompt_embeddings"].shape[0]
    if rows not in (config.num_virtual_tokens, config.rows):
        raise ValueError(f"prompt_embeddings of {rows} rows, and its config says {config.rows}")
