"""LLaMA-Adapter: each adapted attention also attends to trained prompts, scaled by a gate that starts at zero.

o + o_proj(g · softmax(q·k(P)ᵀ/√d)·v(P)): Zhang et al. 2023, https://arxiv.org/abs/2303.16199, section 3.2. As in PEFT,
GPT-2's is added after the output projection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.core.adapter import Leaf
from peftfn.core.config import PeftConfig
from peftfn.methods.action import OnAttention
from peftfn.methods.method import Method
from peftfn.methods.prompt import insert_tokens
from peftfn.methods.slots import Slot
from peftfn.methods.traits import Stacking, Targets
from peftfn.models import layers, targets
from peftfn.models.layers import Place, Site


@dataclasses.dataclass(frozen=True)
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter's config, with PEFT's fields and defaults.

    Attributes:
        target_modules: the name of the attention modules; `None` takes the model type's.
        adapter_len: how many prompt tokens per layer.
        adapter_layers: how many layers get them, counted from the top.

    Raises:
        ValueError: a number is not positive.

    Example:
        >>> import peftfn as pf
        >>> pf.AdaptionPromptConfig(adapter_len=10, adapter_layers=2, task_type="CAUSAL_LM").adapter_len
        10
    """

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    target_modules: str | None = dataclasses.field(default=None, metadata={"help": "Name of the attention modules."})
    adapter_len: int | None = dataclasses.field(default=None, metadata={"help": "Prompt tokens per layer."})
    adapter_layers: int | None = dataclasses.field(default=None, metadata={"help": "How many layers, from the top."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"AdaptionPromptConfig({name}={value}): expected a positive integer.")


class _Family(NamedTuple):
    """How the attention of one model type is made.

    Attributes:
        name: of the attention modules.
        read: `(attention, prompts, hidden states, arguments) -> (q, k, v)`: queries (rows, heads, length, width), with
            positions if it has them, and keys and values of the prompts (key heads, tokens, width).
        project: `(attention, output) -> output`.
    """

    name: str
    read: Callable[[Any, Tensor, Tensor, Mapping[str, Any]], tuple[Tensor, Tensor, Tensor]]
    project: Callable[[Any, Tensor], Tensor]


def _read_llama(
    attention: Any, prompts: Tensor, hidden: Tensor, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    q = _heads(attention.q_proj(hidden), attention.head_dim)
    cos, sin = (one.unsqueeze(-3) for one in given["position_embeddings"])  # (rows, 1, length, width)
    left, right = q.chunk(2, -1)
    q = q * cos + torch.cat([-right, left], -1) * sin
    k, v = (_heads(project(prompts), attention.head_dim) for project in (attention.k_proj, attention.v_proj))
    return q, k, v


def _read_gpt2(
    attention: Any, prompts: Tensor, hidden: Tensor, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    q = attention.c_attn(hidden).chunk(3, -1)[0]
    _, k, v = attention.c_attn(prompts).chunk(3, -1)
    return _heads(q, attention.head_dim), _heads(k, attention.head_dim), _heads(v, attention.head_dim)


def _heads(x: Tensor, width: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, width).transpose(-3, -2)  # (..., heads, length, width)


def _project_llama(attention: Any, output: Tensor) -> Tensor:
    return attention.o_proj(output)


def _as_it_is(attention: Any, output: Tensor) -> Tensor:
    return output


_LLAMA = _Family("self_attn", _read_llama, _project_llama)
_FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "gpt2": _Family("attn", _read_gpt2, _as_it_is)}


def resolve(model: nn.Module, config: AdaptionPromptConfig) -> AdaptionPromptConfig:
    """The config with the name of the model's attention modules filled in."""
    family = _family(model)
    for name in ("adapter_len", "adapter_layers"):
        if getattr(config, name) is None:
            raise ValueError(f"AdaptionPromptConfig: {name} is None; expected a positive integer.")
    return dataclasses.replace(config, target_modules=config.target_modules or family.name)


def _family(model: nn.Module) -> _Family:
    kind = targets.model_type(model)
    if kind not in _FAMILIES:
        raise ValueError(
            f"{type(model).__name__} is of model type {kind!r}; LLaMA-Adapter knows {', '.join(sorted(_FAMILIES))}."
        )
    return _FAMILIES[kind]


def sites(model: nn.Module, config: AdaptionPromptConfig) -> dict[str, Place]:
    """The topmost attention modules, `adapter_layers` of them."""
    paths = [path for path, _ in layers.named_modules(model) if path.endswith(f".{config.target_modules}")]
    wanted = config.adapter_layers or 0
    if not paths:
        raise ValueError(
            f"target_modules={config.target_modules!r} matched no module of {type(model).__name__}; its attention "
            f"modules are called {_family(model).name!r}."
        )
    if wanted > len(paths):
        raise ValueError(f"adapter_layers={wanted}, and {type(model).__name__} has {len(paths)} such layers.")
    return {path: Place(path, "", layers.ATTENTION) for path in paths[-wanted:]}


def init(
    config: AdaptionPromptConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> Leaf:
    """Normal prompts (1, tokens, hidden) and a gate of zero, in the dtype of the attention's weights.

    Where they are packed, in float32: as PEFT.
    """
    attention: Any = site.layer
    weight: Tensor = next(iter([*attention.parameters(), *attention.buffers()]))  # packed ones may be buffers
    dtype = dtype or (weight.dtype if type(weight) is nn.Parameter and weight.is_floating_point() else torch.float32)
    device = "cpu" if weight.is_meta else weight.device
    prompt = torch.randn(1, config.adapter_len or 0, attention.config.hidden_size, generator=generator)
    return {
        "adaption_prompt": prompt.to(device, dtype),
        "adaption_gate": torch.zeros(1, dtype=dtype, device=device),
    }


def forward(
    config: AdaptionPromptConfig, leaf: Mapping[str, Tensor], site: Site, *args: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """What the attention returns, plus its gated attention to the prompts."""
    attention: Any = site.layer
    output, *rest = site(*args, **kwargs)
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    family = _FAMILIES[attention.config.model_type]
    prompts, gate, own = leaf["adaption_prompt"].squeeze(-3), leaf["adaption_gate"], leaf.get(insert_tokens.LENGTH)
    q, k, v = family.read(attention, prompts, hidden, kwargs)
    groups = q.shape[-3] // k.shape[-3]  # heads that share keys
    k, v = (one.repeat_interleave(groups, -3).to(q.dtype) for one in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(attention.head_dim)  # (rows, heads, length, tokens)
    if own is not None:
        own = own.view(-1, 1, 1, 1)
        is_there = torch.arange(scores.shape[-1], device=own.device) < own
        # The least that float32 has too, in which the softmax is: where all are hidden, -inf would be NaN.
        least = max(torch.finfo(scores.dtype).min, torch.finfo(torch.float32).min)
        scores = scores.masked_fill(~is_there, least)
    shares = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    seen = (gate.view(-1, 1, 1, 1) * shares).to(v.dtype) @ v  # (rows, heads, length, width)
    added = family.project(attention, seen.transpose(-3, -2).flatten(-2))
    if own is not None:
        added = torch.where(own.view(-1, 1, 1) > 0, added, torch.zeros_like(added))
    return ((output + added).to(q.dtype), *rest)


def disabled(leaf: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The leaf of each row, of zeros and with 0 for its number of prompt tokens where `keep` is false."""
    count = torch.tensor(leaf["adaption_prompt"].shape[-2], device=keep.device)
    zeros = {
        name: torch.where(keep.view(-1, *(1,) * (leaf[name].dim() - 1)), leaf[name], 0)
        for name in ("adaption_prompt", "adaption_gate")
    }
    return {**leaf, **zeros, insert_tokens.LENGTH: torch.where(keep, leaf.get(insert_tokens.LENGTH, count), 0)}


def _pad(configs: Sequence[AdaptionPromptConfig], path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves with as many prompt tokens as the longest has; an adapter without this layer has none."""
    model = next(leaf for leaf in leaves if leaf is not None)
    lengths = [0 if leaf is None else leaf["adaption_prompt"].shape[1] for leaf in leaves]
    if len(set(lengths)) == 1:
        return [leaf for leaf in leaves if leaf is not None]
    empty = {
        "adaption_prompt": model["adaption_prompt"][:, :0],
        "adaption_gate": torch.zeros_like(model["adaption_gate"]),
    }
    return [
        {
            "adaption_prompt": F.pad(leaf["adaption_prompt"], (0, 0, 0, max(lengths) - length)),
            "adaption_gate": leaf["adaption_gate"],
            insert_tokens.LENGTH: torch.tensor(length, device=leaf["adaption_gate"].device),
        }
        for leaf, length in zip([leaf or empty for leaf in leaves], lengths, strict=True)
    ]


def _trim(config: AdaptionPromptConfig, configs: Sequence[AdaptionPromptConfig], path: str, leaf: Leaf) -> Leaf:
    """The leaf without the zeros that `_pad` added."""
    own = {name: tensor for name, tensor in leaf.items() if name != insert_tokens.LENGTH}
    return {**own, "adaption_prompt": own["adaption_prompt"][:, : config.adapter_len]}


def check(leaf: Mapping[str, Tensor], site: Site) -> str | None:
    """What is wrong with the leaf for this attention, or `None`."""
    if set(leaf) - {insert_tokens.LENGTH} != {"adaption_prompt", "adaption_gate"}:
        return f"has {sorted(leaf)}, expected adaption_gate and adaption_prompt"
    shape, width = (
        tuple(leaf["adaption_prompt"].shape),
        getattr(getattr(site.layer, "config", None), "hidden_size", None),
    )
    return None if len(shape) == 3 and shape[2] == width else f"has adaption_prompt {shape}, expected (1, n, {width})"


METHOD = Method(
    config=AdaptionPromptConfig,
    slots={"adaption_gate": Slot(), "adaption_prompt": Slot(), insert_tokens.LENGTH: Slot(trained=False)},
    init=init,
    action=OnAttention(forward, check, disabled),
    targets=Targets(resolve, sites),
    stacking=Stacking(pad=_pad, trim=_trim, varies=("target_modules", "adapter_len", "adapter_layers")),
)
