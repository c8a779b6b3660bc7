"""What the configs of prompt methods share, and what a model fills in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftfn import layers, matching, signatures, transforms
from peftfn import transformers_names as hf
from peftfn.adapter import Leaf
from peftfn.config import PeftConfig
from peftfn.layers import Place, Site

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
        """The number of virtual tokens that are trained, PEFT's copies included."""
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


def resolve_input(model: nn.Module, config: Config) -> Config:
    """The same for tokens before the input: in some models the input embedding is not as wide as the layers."""
    if not signatures.takes(model.get_submodule(input_homes(model)[0]), hf.EMBEDS):
        raise ValueError(
            f"{type(model).__name__} takes no inputs_embeds, which is how a prompt gets before its input; use a "
            "method that changes layers."
        )
    if is_encoder_decoder(model) and not signatures.takes(decoder_of(model), hf.ENCODED_MASK):
        raise ValueError(
            f"{type(decoder_of(model)).__name__}.forward takes no {hf.ENCODED_MASK}, by which a decoder is told of a "
            "prompt before its encoder's input; use prefix tuning, or a method that changes layers."
        )
    _refuse_other_embeddings(model)
    reader = hf.layer_that_reads_ids(model)
    if reader is not None:
        raise ValueError(
            f"{reader} in {type(model).__name__} reads token ids beside what other layers give it, and a prompt's "
            "tokens have none; use prefix tuning, or a method that changes layers."
        )
    if config.token_dim is None:
        width = getattr(input_embedding(model), "embedding_dim", None)
        config = dataclasses.replace(config, token_dim=width)
    return resolve(model, config, needed=("token_dim",))


def _refuse_other_embeddings(model: nn.Module) -> None:
    """Refuse a model that makes more of a token than its row in one table, of which a prompt's tokens have none."""
    field = hf.ids_in_embedding(getattr(model, "config", None))
    if field is not None:
        raise ValueError(
            f"{type(model).__name__} embeds a token by more than its row (its config has {field}), and a prompt is "
            "rows alone; use a method that changes layers."
        )
    refuse_many_vocabularies(model)
    input_embedding(model)


def refuse_many_vocabularies(model: nn.Module) -> None:
    """Refuse a model whose input has several rows for each row of the batch, one of each vocabulary."""
    found = _found(model, "input_embeddings")
    if isinstance(found, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has {len(found)} input embeddings, one for each of its vocabularies, and a prompt "
            "or a prefix is of one; use a method that changes layers."
        )


def refuse_pictures(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse a call whose positions a model counts from its pictures: it does not where tokens are put before them."""
    name = hf.counted_from_pictures(model, given)
    positions = given.get(hf.POSITIONS)
    if name is None and isinstance(positions, Tensor) and positions.dim() > 2:
        is_known = not torch.compiler.is_compiling() and not transforms.is_mapped(positions)
        name = hf.POSITIONS if is_known and bool((positions != positions[-1:]).any()) else None
    if name is not None:
        raise ValueError(
            f"the batch has {name}, and {type(model).__name__} counts positions in space, of pictures and of the token "
            "ids, where a prompt or a prefix has none. Leave it out, or use a method that changes layers."
        )


def text_config(model: nn.Module) -> Any:
    """The model's config, of a multimodal one the language model's."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def sites(model: nn.Module, config: Any) -> dict[str, Place]:
    """The one site: the model itself."""
    return {"": Place("", "", layers.MODEL)}


def input_homes(model: nn.Module) -> Sequence[str]:
    """Where tokens are put before the input: in the model's call, or in its encoder's and decoder's."""
    if not is_encoder_decoder(model):
        return ("",)
    return path_of(model, _half(model, "encoder")), path_of(model, _half(model, "decoder"))


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


def _half(model: nn.Module, name: str) -> nn.Module:
    found = _found(model, name)
    if found is not None and is_encoder_decoder(found):
        found = _found(found, name) or found  # Florence's is a whole BART
    if found is None:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder without a get_{name}(); prompts need it.")
    return found


def _found(model: nn.Module, name: str) -> nn.Module | None:
    """What the model's own `get_...()` gives; `None` where it has none, or does not say."""
    find: Any = getattr(model, f"get_{name}", None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # transformers' own
        return None
    return found if isinstance(found, nn.Module) else None


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of an encoder-decoder."""
    return _half(model, "decoder")


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The path of a module of the model."""
    return next(path for path, one in layers.named_modules(model) if one is module)


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """(rows, length, dim), as the model itself embeds its tokens."""
    found = input_embedding(model)(ids)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the input embedding of {type(model).__name__} gives a {type(found).__name__}; expected a tensor, before "
            "which a prompt's tokens go. Use a method that changes layers."
        )
    return found


def input_embedding(model: nn.Module) -> nn.Module:
    """The model's input embedding.

    Raises:
        ValueError: it has none, or does not say which it is.
    """
    found = _found(model, "input_embeddings")
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings() that gives a module; a prompt goes before embedded "
            "tokens. Give the model that method, and a forward that takes inputs_embeds."
        )
    return found


def table(model: nn.Module) -> Tensor:
    """The input embedding's weight, or else the model's first one: new tensors go where it is."""
    weight = getattr(_found(model, "input_embeddings"), "weight", None)
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


def check_width(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with the width of a leaf's tokens for this model, or `None`."""
    width = getattr(input_embedding(site.layer), "embedding_dim", None)
    name = "prompt_embeddings" if "prompt_embeddings" in leaf else "embedding"
    if name not in leaf:
        return f"has {sorted(leaf)}, expected prompt_embeddings"
    shape = tuple(leaf[name].shape)
    right = len(shape) == 2 and width in (None, shape[1])
    return None if right else f"has {name} {shape}, expected (tokens, {width})"
