"""Multitask prompt tuning: one prompt for several tasks, times a low-rank one of each (https://arxiv.org/abs/2303.02861).

The prompt of task t is P ∘ (u_t v_t): P is shared, and u_t v_t of rank k. Which task a row is of says the call, by
`task_ids`, a number for each row.

An encoder-decoder has two of them by default, as in PEFT when it trains: before the encoder's input, and before the
decoder's. What the decoder makes of its prompt is left out of its output, whose tokens are then those of the labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core import reading
from peftfn.core.adapter import Leaf
from peftfn.core.transforms import is_traced
from peftfn.methods import slots
from peftfn.methods.action import OnCall
from peftfn.methods.method import Method, like_weight
from peftfn.methods.prompt import insert_tokens, model_call, prompt_config, prompt_input, prompt_rows, prompt_tuning
from peftfn.methods.prompt.model_call import Added, Call
from peftfn.methods.prompt.prompt_tuning import PromptTuningConfig
from peftfn.methods.slots import Slot
from peftfn.methods.traits import Files, Targets
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.models.layers import Site

TASKS = "task_ids"
_PROMPT, _COLS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_OF_A_TASK = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK")
_FROM_SOURCE = (*_OF_A_TASK, "ONLY_SOURCE_SHARED")
_STD = 0.02


@dataclasses.dataclass(frozen=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning's config, with PEFT's fields and defaults.

    The prompt of task t is P ∘ (u_t v_t): P, (tokens, dim), is shared by all tasks, u_t is (tokens, k) and v_t (k, dim)
    (Wang et al. 2023, https://arxiv.org/abs/2303.02861). A call says the task of each row by `task_ids`, numbers from
    0; with one task it may leave them out.

    Attributes:
        prompt_tuning_init: as of prompt tuning; or from a multitask adapter that is there already, into one task:
            `"AVERAGE_SOURCE_TASKS"` (means of its u and of its v), `"EXACT_SOURCE_TASK"` (one task's), or
            `"ONLY_SOURCE_SHARED"` (P alone, whatever the number of tasks).
        prompt_tuning_init_state_dict_path: for these three: its file of tensors.
        prompt_tuning_init_task: for `"EXACT_SOURCE_TASK"`: the number of the task there.
        num_ranks: k.
        num_tasks: how many tasks.

    Raises:
        ValueError: a number is not positive, a start from a source lacks its file, or is of one task and `num_tasks` is
            not 1; or as of prompt tuning.

    Example:
        >>> import peftfn as pf
        >>> pf.MultitaskPromptTuningConfig(num_virtual_tokens=8, num_tasks=3, task_type="SEQ_2_SEQ_LM").num_ranks
        1
    """

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    starts: ClassVar[tuple[str, ...]] = (*PromptTuningConfig.starts, *_FROM_SOURCE)

    prompt_tuning_init_state_dict_path: str | None = dataclasses.field(
        default=None, metadata={"help": "The file of a multitask adapter to start from."}
    )
    prompt_tuning_init_task: int | None = dataclasses.field(
        default=0, metadata={"help": "The task there, for EXACT_SOURCE_TASK."}
    )
    num_ranks: int = dataclasses.field(default=1, metadata={"help": "Rank of each task's part."})
    num_tasks: int = dataclasses.field(default=1, metadata={"help": "How many tasks."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_ranks", "num_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}({name}={getattr(self, name)}): expected a positive integer.")
        start = self.prompt_tuning_init
        if start in _FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise ValueError(f"prompt_tuning_init={start!r} needs prompt_tuning_init_state_dict_path; it is None.")
        if start in _OF_A_TASK and self.num_tasks != 1:
            raise ValueError(
                f"prompt_tuning_init={start!r} with num_tasks={self.num_tasks}; expected 1: it starts one new task. "
                "'ONLY_SOURCE_SHARED' starts several."
            )


def init(
    config: MultitaskPromptTuningConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> Leaf:
    """The shared prompt, (tokens, dim), and each task's factors, (tasks, tokens, k) and (tasks, k, dim)."""
    assert config.token_dim is not None, "resolve has filled it in"
    plain = dataclasses.replace(config, prompt_tuning_init="RANDOM")
    is_from_source = config.prompt_tuning_init in _FROM_SOURCE
    leaf = prompt_tuning.init(plain if is_from_source else config, path, site, generator, dtype)
    cols = _STD * torch.randn(config.num_tasks, config.rows, config.num_ranks, generator=generator)
    rows = _STD * torch.randn(config.num_tasks, config.num_ranks, config.token_dim, generator=generator)
    weight = prompt_config.table(site.layer)
    leaf |= {_COLS: like_weight(cols, weight, dtype), _ROWS: like_weight(rows, weight, dtype)}
    return _started(config, leaf) if is_from_source else leaf


def _started(config: MultitaskPromptTuningConfig, leaf: Leaf) -> Leaf:
    """The leaf with what the config takes from a source."""
    path, start = Path(config.prompt_tuning_init_state_dict_path or ""), config.prompt_tuning_init
    if not path.is_file():
        raise ValueError(f"prompt_tuning_init={start!r}: there is no file {str(path)!r}; give an adapter's tensors.")
    cpu = torch.device("cpu")
    is_plain = path.suffix == ".safetensors"
    found = reading.safetensors_of(path, cpu, mmap=False)[0] if is_plain else reading.pickled(path, cpu)
    names = (_PROMPT, _COLS, _ROWS) if start in _OF_A_TASK else (_PROMPT,)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path} has {sorted(found)}, and not {missing[0]}; expected a multitask adapter's tensors.")
    source = {name: found[name] for name in names}
    for name in names[1:]:
        source[name] = _of_task(config, source[name])
    for name, tensor in source.items():
        if tensor.shape != leaf[name].shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(tensor.shape)}, and this config and model need "
                f"{tuple(leaf[name].shape)}: num_virtual_tokens, num_ranks and the model's width have to be the same."
            )
    return {**leaf, **{name: tensor.to(leaf[name]) for name, tensor in source.items()}}


def _of_task(config: MultitaskPromptTuningConfig, tensor: Tensor) -> Tensor:
    """(1, ...), what one task starts with."""
    if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
        return tensor.mean(0, keepdim=True)
    task = config.prompt_tuning_init_task or 0
    if not 0 <= task < tensor.shape[0]:
        raise ValueError(f"prompt_tuning_init_task={task}, and the source has {tensor.shape[0]} tasks, from 0 on.")
    return tensor[task : task + 1]


def forward(config: MultitaskPromptTuningConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """The call with the prompt of each row's task before its input."""
    is_decoder = call.given.get(hf.ENCODED) is not None
    has_second = is_decoder and config.num_transformer_submodules == 2
    if call.first and (has_second or not is_decoder):  # else it is in the cache, or went into the encoder alone
        leaf = {**leaf, _PROMPT: leaf[_PROMPT] * _of_rows(leaf, _tasks(config, call))}
    after = prompt_tuning.prompted(config, leaf, site, call)
    return _with_second(config, leaf, site, after) if has_second else after


def _with_second(config: MultitaskPromptTuningConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """A decoder's call with the second prompt before its own input, and without it in its output."""
    if insert_tokens.LENGTH in leaf:
        raise ValueError(
            "multitask prompts of unlike length, or none (index -1), for the rows of one batch, and "
            f"{type(site.layer).__name__} has one before its decoder's input, whose rows have to be alike. Apply them "
            "apart, or train with num_transformer_submodules=1: before the encoder's input alone."
        )
    count, decoder = config.num_virtual_tokens or 0, prompt_config.decoder_of(site.layer)
    if call.first:
        caches.make_room(call.cache, count, getattr(site.layer, "config", None))
        call = call._replace(finishes=(*call.finishes, functools.partial(_without_first, count)))
    tokens = leaf[_PROMPT][..., count : 2 * count, :]
    return insert_tokens.with_tokens(call, tokens, Added(count), functools.partial(prompt_input.embed, decoder), None)


def _without_first(count: int, call: Call, output: Any) -> Any:
    """A decoder's output without its first tokens."""
    if isinstance(output, tuple):
        return (output[0][:, count:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, count:]
    return output


def _of_rows(leaf: Mapping[str, Tensor], tasks: Tensor) -> Tensor:
    """(rows, tokens, dim): u v of each row's task; with a leaf for each row, of the row's own."""
    cols, rows = leaf[_COLS], leaf[_ROWS]
    if cols.dim() == 3:
        return cols.index_select(0, tasks) @ rows.index_select(0, tasks)
    at = tasks.view(-1, 1, 1, 1)
    return (cols.take_along_dim(at, 1) @ rows.take_along_dim(at, 1)).squeeze(1)


def _tasks(config: MultitaskPromptTuningConfig, call: Call) -> Tensor:
    """(rows,): the task of each row."""
    tokens, given = model_call.tokens_of(call), call.given.get(TASKS)
    if tokens is None:
        raise ValueError(f"the batch has {sorted(call.given)}; expected input_ids or inputs_embeds, for the prompt.")
    if given is None:
        if config.num_tasks > 1:
            raise ValueError(
                f"the batch has {sorted(call.given)}; expected {TASKS} too, the number of each row's task, below "
                f"{config.num_tasks}."
            )
        return torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
    tasks = torch.as_tensor(given, device=tokens.device)
    if tasks.shape != tokens.shape[:1] or tasks.is_floating_point() or tasks.dtype == torch.bool:
        raise ValueError(
            f"{TASKS} has shape {tuple(tasks.shape)} and dtype {tasks.dtype}; expected a whole number for each of "
            f"{tokens.shape[0]} rows."
        )
    if not is_traced(tasks) and bool(((tasks < 0) | (tasks >= config.num_tasks)).any()):
        raise ValueError(f"{TASKS}={tasks.tolist()}; expected numbers from 0 to {config.num_tasks - 1}.")
    return tasks.long()


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with the leaf for this model, or `None`."""
    wrong = prompt_input.check(leaf, site)
    if wrong is not None or not {_COLS, _ROWS} <= leaf.keys():
        return wrong or f"has {sorted(leaf)}, expected {_PROMPT}, {_COLS} and {_ROWS}"
    (tokens, dim), cols, rows = leaf[_PROMPT].shape, tuple(leaf[_COLS].shape), tuple(leaf[_ROWS].shape)
    if len(cols) == 3 and rows == (cols[0], cols[2], dim) and cols[1] == tokens:
        return None
    return f"has {_COLS} {cols} and {_ROWS} {rows}, expected (tasks, {tokens}, ranks) and (tasks, ranks, {dim})"


def check_file(config: MultitaskPromptTuningConfig, path: str, leaf: Leaf) -> None:
    """Refuse a file that lacks the tasks' factors, or has others than its config says."""
    prompt_config.check_rows(config, path, leaf)
    tasks, ranks = config.num_tasks, config.num_ranks
    for name, sizes in (
        (_COLS, (tasks, leaf[_PROMPT].shape[0], ranks)),
        (_ROWS, (tasks, ranks, leaf[_PROMPT].shape[1])),
    ):
        if name not in leaf:
            raise ValueError(f"{sorted(leaf)} and not {name}")
        if leaf[name].shape != sizes:
            raise ValueError(
                f"{name} of shape {tuple(leaf[name].shape)}, and its config says {tasks} tasks, rank {ranks}"
            )


def _with_rank(leaf: Leaf, rank: int) -> Leaf:
    return {**leaf, _COLS: slots.sized(leaf[_COLS], 2, rank), _ROWS: slots.sized(leaf[_ROWS], 1, rank)}


def pad(configs: Sequence[Any], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves with the most tokens and the highest rank of them."""
    rank = max(config.num_ranks for config in configs)
    return prompt_rows.pad(configs, path, [None if leaf is None else _with_rank(leaf, rank) for leaf in leaves])


def trim(config: Any, configs: Sequence[Any], path: str, leaf: Leaf) -> Leaf:
    """The leaf of one adapter of a stack, with its own tokens and rank."""
    return _with_rank(prompt_rows.trimmed(config, configs, path, leaf), config.num_ranks)


_STACKING = prompt_rows.STACKING
METHOD = Method(
    config=MultitaskPromptTuningConfig,
    slots={**{name: Slot() for name in (_PROMPT, _COLS, _ROWS)}, insert_tokens.LENGTH: Slot(trained=False)},
    init=init,
    action=OnCall(forward, check, prompt_rows.disabled, prompt_input.call_sites, arguments=(TASKS,)),
    targets=Targets(prompt_input.resolve, prompt_config.sites),
    stacking=_STACKING._replace(
        pad=pad,
        trim=trim,
        varies=(*_STACKING.varies, "num_ranks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
    ),
    files=Files(check_file),
)
