"""Prefix tuning: trained keys and values before those of the input, in each layer (https://arxiv.org/abs/2101.00190).

They are put into the model's own cache, of whatever class, before its layers run: so each layer sees them as the past.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.methods.action import OnCall
from peftfn.methods.method import Method, like_weight
from peftfn.methods.prompt import insert_tokens, model_call, places, prefix_keys, prompt_config, prompt_rows
from peftfn.methods.prompt.model_call import Added, Call
from peftfn.methods.prompt.prompt_config import PromptLearningConfig
from peftfn.methods.slots import Slot
from peftfn.methods.traits import Files, Targets
from peftfn.models import signatures
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.models import transformers_positions as counted
from peftfn.models.layers import Site


@dataclasses.dataclass(frozen=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning's config, with PEFT's fields and defaults.

    Attributes:
        encoder_hidden_size: of the projection; `None` takes `token_dim`.
        prefix_projection: whether a network of two layers makes the prefix (tanh between them).
        init_weights: `"zero"` starts with keys and values of zero, `None` at random.

    Raises:
        ValueError: `init_weights` is neither.

    Example:
        >>> import peftfn as pf
        >>> pf.PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM").prefix_projection
        False
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"

    encoder_hidden_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Width of the projection; the model's by default."}
    )
    prefix_projection: bool = dataclasses.field(
        default=False, metadata={"help": "Whether a network of two layers makes the prefix."}
    )
    init_weights: str | None = dataclasses.field(
        default=None, metadata={"help": "zero: keys and values start at zero; else at random."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights={self.init_weights!r}; expected None or 'zero'.")


def resolve(model: nn.Module, config: PrefixTuningConfig) -> PrefixTuningConfig:
    """The config with the model's sizes, and the projection's."""
    found = prefix_keys.resolve(model, config)
    return dataclasses.replace(found, encoder_hidden_size=config.encoder_hidden_size or found.token_dim)


def width(config: PromptLearningConfig) -> int:
    """How many numbers one token has: its keys and values in all layers."""
    return (config.num_layers or 0) * 2 * (config.token_dim or 0)


def init(
    config: PrefixTuningConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> Leaf:
    """The prefix, (tokens, layers * 2 * dim), or what a projection makes it from."""
    tokens, whole = config.rows // (config.num_transformer_submodules or 1), width(config)
    dim, hidden = (config.token_dim or 0), (config.encoder_hidden_size or 0)
    scale = 0.0 if config.init_weights == "zero" else 1.0
    if config.prefix_projection:
        first, second = 1 / math.sqrt(dim), 1 / math.sqrt(hidden)
        leaf = {
            "embedding": torch.randn(tokens, dim, generator=generator),
            "transform_0_weight": first * (2 * torch.rand(hidden, dim, generator=generator) - 1),
            "transform_0_bias": first * (2 * torch.rand(hidden, generator=generator) - 1),
            "transform_2_weight": scale * second * (2 * torch.rand(whole, hidden, generator=generator) - 1),
            "transform_2_bias": scale * second * (2 * torch.rand(whole, generator=generator) - 1),
        }
    else:
        leaf = {"prompt_embeddings": scale * torch.randn(tokens, whole, generator=generator)}
    weight = prompt_config.table(site.layer)
    return {name: like_weight(tensor, weight, dtype) for name, tensor in leaf.items()}


def encode(leaf: Mapping[str, Tensor]) -> Tensor:
    """The prefix, (tokens, layers * 2 * dim)."""
    if "prompt_embeddings" in leaf:
        return leaf["prompt_embeddings"]
    hidden = F.linear(leaf["embedding"], leaf["transform_0_weight"], leaf["transform_0_bias"]).tanh()
    return F.linear(hidden, leaf["transform_2_weight"], leaf["transform_2_bias"])


def encoded(config: PrefixTuningConfig, leaf: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    """The prefix that the leaf's network makes, and how many tokens it has, if the leaf says so."""
    return {"prompt_embeddings": encode(leaf), **{name: leaf[name] for name in (insert_tokens.LENGTH,) if name in leaf}}


def forward(config: PromptLearningConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """The call with the prefix in its cache."""
    model: Any = site.layer
    prefix = encode(leaf)
    prefix = prefix if prefix.dim() == 3 else prefix.unsqueeze(0)  # (rows or 1, tokens, layers * 2 * dim)
    part = prompt_config.decoder_of(model) if prompt_config.is_encoder_decoder(model) else model
    added = prompt_rows.added(part, prefix.shape[1], {**leaf, "prompt_embeddings": prefix}, in_cache=True)
    pictures = counted.mask_with_pictures(model, call.given)
    if added.own is not None and pictures is not None:
        raise ValueError(
            f"prefixes of unlike length, or none (index -1), for the rows of one batch with {pictures}: the mask that "
            f"{type(model).__name__} makes of its pictures does not know of them. Use ones of one length."
        )
    call = call._replace(prefixes=(*call.prefixes, added))
    if not call.first:
        return call
    prompt_config.refuse_pictures(model, call.given)
    _refuse_token_types(model, call)
    if site.training and any(getattr(one, "gradient_checkpointing", False) for one in site.layer.modules()):
        raise ValueError(
            "prefix tuning and activation checkpointing do not go together: checkpointed layers get no cache, and so "
            "no prefix. Turn it off (gradient_checkpointing_disable), or use prompt tuning."
        )
    tokens = model_call.tokens_of(call)
    if tokens is None:
        raise ValueError(f"the batch has {sorted(call.given)}; expected input_ids or inputs_embeds, for the prefix.")
    past = _past(places.rightmost(prefix, added), config, prompt_config.dtype(model, prefix.dtype))
    cache = _filled(config, past, model, tokens.shape[0], call)
    return _with_positions(call, tokens, model, added).with_cache(cache)


def _refuse_token_types(model: Any, call: Call) -> None:
    """Refuse token types that the model goes by only while its cache is empty: a prefix is in it from the start."""
    if hf.TOKEN_TYPES in call.given and not counted.pictures(call.given) and counted.sees_whole_text(model):
        raise ValueError(
            f"the batch has {hf.TOKEN_TYPES}, by which {type(model).__name__} lets tokens see what comes after them, "
            "but not where a prefix is in its cache and no picture in the call, as in generate(). Leave them out, for "
            "tokens that see what is before them alone, or use prompt tuning."
        )


def _with_positions(call: Call, tokens: Tensor, model: Any, added: Added) -> Call:
    """The call of a decoder with position ids that start at each row's first token.

    A prefix has no position, so how far a token is from it is the token's own: padding must not count. In a row without
    a prefix it counts, as the base has it.
    """
    mask, padding = call.given.get(hf.MASK), prompt_rows.padding_counted(model)
    if call.given.get(hf.POSITIONS) is not None and not (call.guessed and padding is None):
        return call
    if counted.counts_by_mask(model):  # a token that is masked inside a row has no position there
        return call
    if padding is not None:
        return call.having(**{hf.POSITIONS: _after_padding(call, tokens, padding, added)})
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not _counts(model):
        return call
    lead = places.left_padding(mask)
    if added.own is not None and added.start is not None:
        lead = lead * (added.own.view(-1, 1) > 0)
    ids = torch.arange(tokens.shape[1], device=mask.device) - lead
    return call.having(**{hf.POSITIONS: ids.clamp(min=0) + counted.first_position(getattr(model, "config", None))})


def _after_padding(call: Call, tokens: Tensor, padding: int, added: Added) -> Tensor:
    """(rows, length): the positions that RoBERTa and its kin count, which find padding in token ids and leave it out.

    Without the prefix, by which `settled` moves all of them: those of padding are not to be moved.
    """
    ids, mask = call.given.get(hf.IDS), call.given.get(hf.MASK)
    is_text = places.ones(tokens, tokens.shape[1]) if ids is None else (ids != padding).long()
    if ids is None and isinstance(mask, Tensor) and mask.dim() == 2:
        is_text = mask.long()
    moved = added.places if added.own is None else added.own.view(-1, 1)
    return torch.where(is_text == 1, is_text.cumsum(1) + padding, padding - moved)


def _counts(model: Any) -> bool:
    """Whether the model counts positions from 0 in each row: decoders do, encoders may start elsewhere."""
    if prompt_config.is_encoder_decoder(model):
        return False
    is_decoder = prompt_config.writes(model) or hasattr(prompt_config.without_head(model), "rotary_emb")
    return is_decoder and signatures.takes(model.get_submodule(prefix_keys.call_sites(model)[0]), hf.POSITIONS)


def _past(prefix: Tensor, config: PromptLearningConfig, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (rows or 1, heads, tokens, width), laid out as PEFT lays them out.

    With two submodules PEFT writes the prefix twice in a row and gives each layer four of the pieces, of which the
    first two are for its self-attention: so layer i has pair 2i of the doubled row.
    """
    count = config.num_layers or 1
    pieces = prefix.to(dtype).view(*prefix.shape[:2], count, 2, config.num_attention_heads or 1, -1)
    pairs = pieces.permute(2, 3, 0, 4, 1, 5)  # (layers, 2, rows or 1, heads, tokens, width)
    step = config.num_transformer_submodules or 1
    order = [(step * layer) % count for layer in range(count)]
    return [(pairs[number][0], pairs[number][1]) for number in order]


def _filled(
    config: PromptLearningConfig, past: Sequence[tuple[Tensor, Tensor]], model: Any, rows: int, call: Call
) -> Any:
    """The call's own empty cache, or a new one, with the prefix in it for each row."""
    cache: Any = call.cache
    if cache is None or isinstance(cache, (tuple, list)):
        cache = caches.new_cache(model.config)
    caches.make_room(cache, config.num_virtual_tokens or 0, model.config)
    own = caches.self_attention(cache)
    for number, (key, value) in enumerate(past):
        own.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), number)
    return cache


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with the leaf for this model, or `None`.

    Raises:
        ValueError: the model has no place for a prefix, whoever made this one.
    """
    if not torch.compiler.is_compiling():
        prefix_keys.refuse_without_keys(site.layer)
    name = "prompt_embeddings" if "prompt_embeddings" in leaf else "transform_2_weight"
    if name not in leaf:
        return f"has {sorted(leaf)}, expected prompt_embeddings"
    count = prompt_config.size(site.layer, "num_layers")
    heads, dim = (prompt_config.size(site.layer, name) or 1 for name in ("num_attention_heads", "token_dim"))
    heads, width = prefix_keys.key_sizes(prompt_config.text_config(site.layer), heads, dim)
    expected, found = (count or 0) * 2 * heads * width, leaf[name].shape[1 if name == "prompt_embeddings" else 0]
    return None if found == expected else f"has a prefix of width {found}, expected {expected} (layers * 2 * keys)"


def to_file(config: Any, leaf: Leaf) -> Leaf:
    """The prefix itself: all that PEFT's files keep."""
    with torch.no_grad():
        return {"prompt_embeddings": encode(leaf)}


def _trim(config: PrefixTuningConfig, configs: Sequence[PrefixTuningConfig], path: str, leaf: Leaf) -> Leaf:
    return prompt_rows.trim(leaf, config.num_virtual_tokens or 0) if insert_tokens.LENGTH in leaf else leaf


_TRANSFORM = tuple(f"transform_{number}_{kind}" for number in (0, 2) for kind in ("weight", "bias"))
METHOD = Method(
    config=PrefixTuningConfig,
    slots={
        **{name: Slot() for name in ("prompt_embeddings", "embedding", *_TRANSFORM)},
        insert_tokens.LENGTH: Slot(trained=False),
    },
    init=init,
    action=OnCall(forward, check, prompt_rows.disabled, prefix_keys.call_sites, encoded),
    targets=Targets(resolve, prompt_config.sites),
    stacking=prompt_rows.STACKING._replace(trim=_trim),
    files=Files(prompt_config.check_rows, write=to_file),
)
