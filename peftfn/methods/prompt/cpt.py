"""Context-aware prompt tuning: a prompt of examples that may move a little (https://arxiv.org/abs/2410.17222).

The prompt is the embeddings of tokens, which stay, and a trained change of each, which is projected into a ball around
it. Each token has a type: the examples are numbered, and the types of example n are 4n + 1 to 4n + 4: the template
before its input, the input, the template before its answer, and the answer. Answers of the prompt are labels too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.methods.action import OnCall
from peftfn.methods.method import Method, like_weight
from peftfn.methods.prompt import (
    cpt_labels,
    insert_tokens,
    prompt_config,
    prompt_input,
    prompt_rows,
    prompt_tuning,
)
from peftfn.methods.prompt.model_call import Call
from peftfn.methods.prompt.prompt_config import PromptLearningConfig
from peftfn.methods.slots import Slot
from peftfn.methods.traits import Files, Targets
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Site

_PROMPT, _STAYS, DELTA = "prompt_embeddings", "embedding", "delta_embedding"
_IDS, TYPES, RADIUS = "cpt_token_ids", "cpt_tokens_type_mask", "cpt_radius"
_SMALLEST = 1e-10  # the radius of tokens that stay, as in PEFT


@dataclasses.dataclass(frozen=True)
class CPTConfig(PromptLearningConfig):
    """The config of context-aware prompt tuning, with PEFT's fields and defaults.

    Row i of the prompt is e_i + δ_i·min(1, ε_i / ‖δ_i‖): e_i embeds a token, δ_i is trained (Blau et al. 2024,
    https://arxiv.org/abs/2410.17222). A call may have `input_type_mask`, the types of its own tokens, (rows,
    tokens); by default all are of an answer. Labels count at tokens of an answer alone.

    Attributes:
        cpt_token_ids: the prompt's tokens; `None` is token 0.
        cpt_mask: a number for each; kept for PEFT's files: nothing reads it, there or here.
        cpt_tokens_type_mask: the type of each; `None` is 1. Tokens of an answer (4, 8, ...) and of type 0 stay.
        opt_weighted_loss_type: `"none"`, or `"decay"`: answers count less the further their example is from the end.
        opt_loss_decay_factor: for `"decay"`: by what factor for each example.
        opt_projection_epsilon: ε of an input's tokens, for a width of 2048: it grows with the root of the width.
        opt_projection_format_epsilon: ε of a template's.
        tokenizer_name_or_path: kept for PEFT's files.

    Raises:
        ValueError: the lists are not of one length, or not of `num_virtual_tokens`; a number is negative; or the
            kind of loss or the task is unknown.

    Example:
        >>> import peftfn as pf
        >>> ids, types = [11, 12, 13, 14], [1, 2, 3, 4]
        >>> pf.CPTConfig(cpt_token_ids=ids, cpt_tokens_type_mask=types, task_type="CAUSAL_LM").num_virtual_tokens
        4
    """

    peft_type: ClassVar[str] = "CPT"

    cpt_token_ids: Sequence[int] | None = dataclasses.field(default=None, metadata={"help": "The prompt's tokens."})
    cpt_mask: Sequence[int] | None = dataclasses.field(default=None, metadata={"help": "Kept for PEFT's files."})
    cpt_tokens_type_mask: Sequence[int] | None = dataclasses.field(
        default=None, metadata={"help": "The type of each token of the prompt: 4n + 1 to 4n + 4 for example n."}
    )
    opt_weighted_loss_type: str = dataclasses.field(
        default="none", metadata={"help": "decay: answers far from the end count less."}
    )
    opt_loss_decay_factor: float = dataclasses.field(default=1.0, metadata={"help": "By how much less."})
    opt_projection_epsilon: float = dataclasses.field(
        default=0.1, metadata={"help": "How far embeddings of an input may move, at a width of 2048."}
    )
    opt_projection_format_epsilon: float = dataclasses.field(
        default=0.1, metadata={"help": "How far those of a template may."}
    )
    tokenizer_name_or_path: str | None = dataclasses.field(default=None, metadata={"help": "Kept for PEFT's files."})

    def __post_init__(self) -> None:
        ids = self.cpt_token_ids if self.cpt_token_ids is not None else (0,)
        object.__setattr__(self, _IDS, ids)
        for name in ("cpt_mask", TYPES):
            if getattr(self, name) is None:
                object.__setattr__(self, name, (1,) * len(ids))
        if self.num_virtual_tokens is None:
            object.__setattr__(self, "num_virtual_tokens", len(ids))
        if self.num_transformer_submodules is None:
            object.__setattr__(self, "num_transformer_submodules", 1)
        super().__post_init__()
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ValueError(f"opt_weighted_loss_type={self.opt_weighted_loss_type!r}; expected 'none' or 'decay'.")
        if self.task_type is None:
            object.__setattr__(self, "task_type", "CAUSAL_LM")  # there is no other
        if self.task_type != "CAUSAL_LM":
            raise ValueError(f"CPTConfig with task_type={self.task_type!r}; expected 'CAUSAL_LM'.")
        sizes = {name: len(getattr(self, name)) for name in (_IDS, "cpt_mask", TYPES)}
        if {*sizes.values()} != {self.rows}:
            raise ValueError(f"CPTConfig has {sizes} for {self.rows} virtual tokens; expected as many of each.")
        numbers = (*self.cpt_token_ids, *self.cpt_tokens_type_mask, self.opt_loss_decay_factor)  # pyright: ignore[reportOptionalIterable]  # set above
        if min(*numbers, self.opt_projection_epsilon, self.opt_projection_format_epsilon) < 0:
            raise ValueError("CPTConfig has a negative token, type, factor or epsilon; expected none below 0.")


Config = TypeVar("Config", bound=CPTConfig)


def resolve(model: nn.Module, config: Config) -> Config:
    """The config with the model's sizes.

    Raises:
        ValueError: a prompt has no place in the model's input, or the model is an encoder-decoder.
    """
    _refuse_halves(model)
    return prompt_input.resolve(model, config)


def _refuse_halves(model: nn.Module) -> None:
    if prompt_config.is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, and context-aware prompt tuning is for decoders: the "
            "answers of its prompt are labels. Use prompt tuning."
        )


def init(config: CPTConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None) -> Leaf:
    """The embeddings of the config's tokens, and changes of zero, (tokens, dim)."""
    table = prompt_config.table(site.layer)
    found = prompt_tuning.rows_of(site.layer, torch.tensor(config.cpt_token_ids))
    stays = like_weight(found, table, dtype)
    return {_STAYS: stays, DELTA: torch.zeros_like(stays)}


def constants(config: CPTConfig, path: str, leaf: Leaf) -> Leaf:
    """The prompt's tokens, their types, and how far each may move, (tokens,)."""
    delta, kinds = leaf[DELTA], [one % 4 for one in config.cpt_tokens_type_mask or ()]
    scale = torch.tensor(delta.shape[-1] / 2048, device=delta.device).sqrt()  # in float32, as PEFT's
    inputs, templates = config.opt_projection_epsilon * scale, config.opt_projection_format_epsilon * scale
    small = torch.full_like(scale, _SMALLEST)
    radii = [inputs if kind == 2 else templates if kind else small for kind in kinds]
    numbers = {name: torch.tensor(getattr(config, name), device=delta.device) for name in (_IDS, TYPES)}
    return {**numbers, RADIUS: torch.stack(radii).to(delta)}


def projected(leaf: Mapping[str, Tensor]) -> Tensor:
    """(..., tokens, dim): each token's change, in its ball."""
    delta, radius = leaf[DELTA], leaf[RADIUS]
    norm = cast("Tensor", torch.linalg.vector_norm(delta, dim=-1))  # torch does not say what it returns
    return delta * torch.where(norm > 0, radius / torch.maximum(norm, radius), 1.0).unsqueeze(-1)


def encode(leaf: Mapping[str, Tensor]) -> Tensor:
    """(..., tokens, dim): the prompt.

    The gradient of a change is that of the row that it makes, as in PEFT, which writes the projected change over the
    trained one in each forward; tokens that stay have none.
    """
    if _PROMPT in leaf:
        return leaf[_PROMPT]
    delta, moves = leaf[DELTA], (leaf[TYPES] % 4 != 0).unsqueeze(-1)
    inside = projected({**leaf, DELTA: delta.detach()})
    return leaf[_STAYS] + inside + torch.where(moves, delta - delta.detach(), 0.0)


def encoded(config: CPTConfig, leaf: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    """The prompt, and what goes along with it."""
    kept = {name: leaf[name] for name in (_IDS, TYPES, insert_tokens.LENGTH) if name in leaf}
    return {_PROMPT: encode(leaf), **kept}


def forward(config: CPTConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """The call with the prompt before its input, and labels at answers alone."""
    leaf = encoded(config, leaf, site)
    types = call.given.get(cpt_labels.TYPES)
    call = call.having(**{cpt_labels.TYPES: None})
    if not call.first or call.given.get(hf.LABELS) is None:
        return prompt_tuning.prompted(config, leaf, site, call)
    model, count = site.layer, leaf[_PROMPT].shape[-2]
    added = prompt_rows.added(model, count, leaf, at_end=not prompt_rows.reads_last(model))
    answers = cpt_labels.of(call, types, leaf[_IDS], leaf[TYPES], added)
    after = prompt_tuning.prompted(config, leaf, site, call).having(**{hf.LABELS: answers.labels})
    if config.opt_weighted_loss_type == "none":
        return after
    finish = functools.partial(cpt_labels.weighted, config.opt_loss_decay_factor)
    return after._replace(beside={**after.beside, cpt_labels.TYPES: answers.types}, finishes=(*after.finishes, finish))


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with the leaf for this model, or `None`."""
    _refuse_halves(site.layer)
    if _STAYS not in leaf or DELTA not in leaf:
        return f"has {sorted(leaf)}, expected {DELTA} and {_STAYS}"
    one, other = tuple(leaf[_STAYS].shape), tuple(leaf[DELTA].shape)
    if one != other:
        return f"has {_STAYS} {one} and {DELTA} {other}, expected one shape"
    return prompt_input.check({_STAYS: leaf[_STAYS]}, site)


def from_file(config: CPTConfig, leaf: Leaf) -> Leaf:
    """A file's prompt, from which nothing has moved yet: PEFT's files do not say what its tokens were at first."""
    return {_STAYS: leaf[_PROMPT], DELTA: torch.zeros_like(leaf[_PROMPT])}


def to_file(config: CPTConfig, leaf: Leaf) -> Leaf:
    """The prompt itself: all that PEFT's files keep."""
    with torch.no_grad():
        return {_PROMPT: encode(leaf)}


_STACKING, _RADII = prompt_rows.STACKING, ("opt_projection_epsilon", "opt_projection_format_epsilon")
METHOD = Method(
    config=CPTConfig,
    slots={
        **{name: Slot() for name in (_PROMPT, DELTA)},
        **{name: Slot(trained=False) for name in (_STAYS, _IDS, TYPES, RADIUS, insert_tokens.LENGTH)},
    },
    init=init,
    action=OnCall(
        forward, check, prompt_rows.disabled, prompt_input.call_sites, encoded, arguments=(cpt_labels.TYPES,)
    ),
    constants=constants,
    targets=Targets(resolve, prompt_config.sites),
    stacking=_STACKING._replace(varies=(*_STACKING.varies, _IDS, "cpt_mask", TYPES, *_RADII)),
    files=Files(prompt_config.check_rows, write=to_file, read=from_file),
)
