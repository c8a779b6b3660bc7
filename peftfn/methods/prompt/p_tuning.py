"""P-tuning: a prompt that a small network encodes (Liu et al. 2021, https://arxiv.org/abs/2103.10385).

The LSTM is written in plain operations: `torch.nn.LSTM` has no batching rule, so `torch.vmap` could not run it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.methods.action import OnCall
from peftfn.methods.method import Method, like_weight
from peftfn.methods.prompt import insert_tokens, prompt_config, prompt_input, prompt_rows, prompt_tuning
from peftfn.methods.prompt.model_call import Call
from peftfn.methods.prompt.prompt_config import PromptLearningConfig
from peftfn.methods.slots import Slot
from peftfn.methods.traits import Files, Targets
from peftfn.models.layers import Site

_MOST_LAYERS = 16  # of the LSTM: the slots below name the tensors of this many


@dataclasses.dataclass(frozen=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning's config, with PEFT's fields and defaults.

    Attributes:
        encoder_reparameterization_type: `"MLP"` (two hidden layers) or `"LSTM"` (bidirectional, then one hidden layer).
        encoder_hidden_size: `None` takes `token_dim`.
        encoder_num_layers: of the LSTM; the MLP has its own number.
        encoder_dropout: between the LSTM's layers, in training.

    Raises:
        ValueError: the type is unknown, the LSTM has no layer or more than 16, or the dropout is no probability.

    Example:
        >>> import peftfn as pf
        >>> pf.PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=16).encoder_reparameterization_type
        'MLP'
    """

    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: str = dataclasses.field(
        default="MLP", metadata={"help": "What makes the prompt: MLP or LSTM."}
    )
    encoder_hidden_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Width of the network that makes the prompt; the model's by default."}
    )
    encoder_num_layers: int = dataclasses.field(default=2, metadata={"help": "Layers of the LSTM."})
    encoder_dropout: float = dataclasses.field(default=0.0, metadata={"help": "Dropout between them in training."})

    def __post_init__(self) -> None:
        kind = self.encoder_reparameterization_type
        object.__setattr__(self, "encoder_reparameterization_type", str(getattr(kind, "value", kind)))  # PEFT's enum
        super().__post_init__()
        if self.encoder_reparameterization_type not in ("MLP", "LSTM"):
            raise ValueError(f"encoder_reparameterization_type={kind!r}; expected 'MLP' or 'LSTM'.")
        if not 1 <= self.encoder_num_layers <= _MOST_LAYERS or not 0 <= self.encoder_dropout < 1:
            raise ValueError(
                f"encoder_num_layers={self.encoder_num_layers}, encoder_dropout={self.encoder_dropout}; expected 1 to "
                f"{_MOST_LAYERS} layers, and a probability below 1."
            )


def init(
    config: PromptEncoderConfig, path: str, site: Site, generator: torch.Generator, dtype: torch.dtype | None
) -> Leaf:
    """The encoder's input, (tokens, dim), and its weights, drawn as torch's layers draw them."""
    assert config.token_dim is not None, "resolve has filled it in"
    dim, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
    leaf = {"embedding": torch.randn(config.rows, dim, generator=generator)}
    if config.encoder_reparameterization_type == "LSTM":
        leaf |= _lstm(config.encoder_num_layers, dim, hidden, generator)
        leaf |= _linear("mlp_head_0", 2 * hidden, 2 * hidden, generator)
        leaf |= _linear("mlp_head_2", 2 * hidden, dim, generator)
    else:
        leaf |= _linear("mlp_head_0", dim, hidden, generator)
        leaf |= _linear("mlp_head_2", hidden, hidden, generator)
        leaf |= _linear("mlp_head_4", hidden, dim, generator)
    weight = prompt_config.table(site.layer)
    return {name: like_weight(tensor, weight, dtype) for name, tensor in leaf.items()}


def _linear(name: str, inputs: int, outputs: int, generator: torch.Generator) -> Leaf:
    bound = 1 / math.sqrt(inputs)
    return {
        f"{name}_weight": _uniform((outputs, inputs), bound, generator),
        f"{name}_bias": _uniform((outputs,), bound, generator),
    }


def _lstm(count: int, inputs: int, hidden: int, generator: torch.Generator) -> Leaf:
    bound = 1 / math.sqrt(hidden)
    leaf: Leaf = {}
    for layer, way in _directions(count):
        width = inputs if layer == 0 else 2 * hidden
        shapes = {"weight_ih": (4 * hidden, width), "weight_hh": (4 * hidden, hidden)}
        shapes |= {"bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}
        leaf |= {f"lstm_head_{name}_l{layer}{way}": _uniform(s, bound, generator) for name, s in shapes.items()}
    return leaf


def _directions(count: int) -> Iterator[tuple[int, str]]:
    return ((layer, way) for layer in range(count) for way in ("", "_reverse"))


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def encode(leaf: Mapping[str, Tensor], dropout: float = 0.0) -> Tensor:
    """The prompt, (tokens, dim): what the leaf's network makes of its input, or the prompt of a file as it is."""
    if "prompt_embeddings" in leaf:
        return leaf["prompt_embeddings"]
    x = leaf["embedding"]
    if "lstm_head_weight_ih_l0" in leaf:
        count = sum(name.startswith("lstm_head_weight_ih") for name in leaf) // 2
        for layer in range(count):
            x = torch.cat([_pass(leaf, x, f"l{layer}"), _pass(leaf, x, f"l{layer}_reverse", backward=True)], -1)
            if dropout and layer < count - 1:
                x = F.dropout(x, dropout, training=True)
    heads = sorted(name.removesuffix("_weight") for name in leaf if name.startswith("mlp_head") and "weight" in name)
    for number, head in enumerate(heads):
        x = F.linear(x.relu() if number else x, leaf[f"{head}_weight"], leaf[f"{head}_bias"])
    return x


def _pass(leaf: Mapping[str, Tensor], x: Tensor, way: str, *, backward: bool = False) -> Tensor:
    """(tokens, hidden): one direction of one layer. Gates and letters as in torch.nn.LSTM's documentation."""
    x = x.flip(0) if backward else x
    inputs = F.linear(x, leaf[f"lstm_head_weight_ih_{way}"], leaf[f"lstm_head_bias_ih_{way}"])  # (tokens, 4 hidden)
    weight, bias = leaf[f"lstm_head_weight_hh_{way}"], leaf[f"lstm_head_bias_hh_{way}"]
    own = leaf.get(insert_tokens.LENGTH)
    h = c = torch.zeros_like(inputs[0, : weight.shape[-1]])
    outputs: list[Tensor] = []
    for number, row in enumerate(inputs.unbind(0)):
        i, f, g, o = (row + F.linear(h, weight, bias)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if own is not None:  # backward, the places after the prompt's own tokens come first: they change nothing
            step = inputs.shape[0] - 1 - number if backward else number
            c, h = (torch.where(step < own, state, torch.zeros_like(state)) for state in (c, h))
        outputs.append(h)
    stacked = torch.stack(outputs)
    return stacked.flip(0) if backward else stacked


def encoded(config: PromptEncoderConfig, leaf: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
    """The prompt that the leaf's network makes, and how many tokens it has, if the leaf says so."""
    prompt = encode(leaf, config.encoder_dropout if site.training else 0.0)
    return {"prompt_embeddings": prompt, **{name: leaf[name] for name in (insert_tokens.LENGTH,) if name in leaf}}


def forward(config: PromptEncoderConfig, leaf: Mapping[str, Tensor], site: Site, call: Call) -> Call:
    """The call with the encoded prompt before its input."""
    return prompt_tuning.prompted(config, encoded(config, leaf, site), site, call)


def to_file(config: Any, leaf: Leaf) -> Leaf:
    """The encoded prompt: all that PEFT's files keep."""
    with torch.no_grad():
        return {"prompt_embeddings": encode(leaf)}


def _names() -> list[str]:
    heads = [f"mlp_head_{number}_{kind}" for number in (0, 2, 4) for kind in ("weight", "bias")]
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    lstm = [f"lstm_head_{kind}_l{layer}{way}" for layer, way in _directions(_MOST_LAYERS) for kind in kinds]
    return ["prompt_embeddings", "embedding", *heads, *lstm]


METHOD = Method(
    config=PromptEncoderConfig,
    slots={**{name: Slot() for name in _names()}, insert_tokens.LENGTH: Slot(trained=False)},
    init=init,
    action=OnCall(forward, prompt_input.check, prompt_rows.disabled, prompt_input.call_sites, encoded),
    targets=Targets(prompt_input.resolve, prompt_config.sites),
    stacking=prompt_rows.STACKING,
    files=Files(prompt_config.check_rows, write=to_file),
)
