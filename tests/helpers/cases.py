"""The table that drives the laws: one row per kind of layer (and of base), for each method.

A case is a small base, a config that acts on one kind of layer, and a batch whose axis 0 is the row. A law that has
no meaning for a case is named in `exceptions` with its reason; a new method adds rows.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import quantized
import registry
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

import peftfn as pf


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: the kind of layer.
        build: makes the base; its weights come from the global random state.
        config: what to adapt.
        batch: makes a batch of 4 rows.
        exceptions: law -> why it has no meaning here.
        pack: quantizes the base in place, and returns it.
        rounding: by how much of its largest value the format's own rounding moves an output.
        packs_float64: the packed layers compute in the dtype that they were packed from.
    """

    name: str
    build: Callable[[], nn.Module]
    config: pf.PeftConfig
    batch: Callable[[], Any]
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pack: Callable[[nn.Module], nn.Module] | None = None
    rounding: float = 0.0
    packs_float64: bool = False

    def base(self) -> nn.Module:
        """The base, in evaluation mode, with every parameter requiring grad as `from_pretrained` gives it."""
        torch.manual_seed(1)
        model = self.build().eval()
        return self.pack(model) if self.pack else model

    def exact(self) -> nn.Module:
        """The base in float64; a packed one with the values that it has in float32, where its format has no others."""
        torch.manual_seed(1)
        model = self.build().eval()
        if self.pack:
            model = self.pack(model.double() if self.packs_float64 else model)
        return model.double()


def output(result: Any) -> Tensor:
    """The tensor to compare in what a model returns."""
    if isinstance(result, Tensor):
        return result
    found = getattr(result, "logits", None)
    return result.last_hidden_state if found is None else found


def loss(result: Any) -> Tensor:
    """A scalar of every output, each with its own weight: the sum of squares of a normalized row alone is fixed."""
    found = output(result).double()
    return (found * torch.linspace(0.5, 1.5, found.shape[-1], dtype=found.dtype, device=found.device)).square().mean()


def trained(adapter: pf.Adapter, seed: int = 0, size: float = 0.3) -> pf.Adapter:
    """The adapter with random values everywhere, so that nothing is left at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    return adapter.replace(
        params={
            path: {
                name: t + size * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
                for name, t in leaf.items()
            }
            for path, leaf in adapter.params.items()
        }
    )


def randn(*shape: int) -> Callable[[], Tensor]:
    """Makes normal numbers of a shape."""
    return functools.partial(torch.randn, *shape)


def tokens(length: int = 6, vocabulary: int = 20) -> Callable[[], Tensor]:
    """Makes 4 rows of token ids."""
    return lambda: torch.randint(0, vocabulary, (4, length))


class Experts(nn.Module):
    """Bare 3-D parameters, as a mixture of experts holds them, and a plain tensor beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 8) / 3)  # (experts, out, in)
        self.down = nn.Parameter(torch.randn(3, 6, 10) / 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 8) -> (rows, 6)."""
        hidden = torch.einsum("eoi,ni->neo", self.up, x).relu()
        return torch.einsum("eoi,nei->no", self.down, hidden) * self.scale


class TransposedExperts(nn.Module):
    """Experts stored (experts, in, out), square: shapes alone do not tell."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) -> (rows, 6)."""
        return torch.einsum("eio,ni->no", self.weight, x)


class SelfAttention(nn.Module):
    """torch's attention, which reads its projections itself."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 8) -> (rows, tokens, 5)."""
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Tied(nn.Module):
    """An embedding and a head that share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, 20)."""
        return self.head(self.body(self.emb(ids)).tanh())


class Twice(nn.Module):
    """One module at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 8) -> (rows, 8)."""
        return self.second(self.first(x).tanh())


def mlp(inputs: int = 8, hidden: int = 12, outputs: int = 4) -> nn.Module:
    """Two linear layers with a norm that keeps statistics between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def linears(inputs: int = 8, hidden: int = 8, outputs: int = 5) -> nn.Module:
    """Two linear layers, for inputs of any shape."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def gpt2(layers: int = 2) -> nn.Module:
    """transformers' Conv1D, tied embeddings."""
    quiet = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)  # a purity test compares the random state
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=layers, n_head=2, vocab_size=20, n_positions=16, **quiet))


def llama(hidden: int = 16, intermediate: int = 24, layers: int = 2) -> nn.Module:
    """Grouped-query attention, no biases."""
    sizes = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=20, max_position_embeddings=32))


def bert(hidden: int = 16, intermediate: int = 24, layers: int = 2) -> nn.Module:
    """An encoder with a head."""
    sizes = dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=2)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=20, max_position_embeddings=16))


def t5(model: int = 8, keys: int = 6, hidden: int = 12, layers: int = 2) -> nn.Module:
    """An encoder and a decoder, whose keys together are wider than the model."""
    sizes = dict(d_model=model, d_kv=keys, d_ff=hidden, num_layers=layers, num_heads=2, vocab_size=20)
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


def albert() -> nn.Module:
    """One block that runs twice."""
    sizes = dict(hidden_size=16, embedding_size=8, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return AlbertModel(AlbertConfig(**sizes, vocab_size=20, max_position_embeddings=16))


def lora(*targets: str, **kwargs: Any) -> pf.LoraConfig:
    """A small LoRA config."""
    return pf.LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **kwargs)


def ia3(*targets: str, feedforward: tuple[str, ...] = (), **kwargs: Any) -> pf.IA3Config:
    """An (IA)³ config."""
    return pf.IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward), **kwargs)


def turned_squares() -> nn.Module:
    """Layers whose shape does not say that their weight is stored (in, out)."""
    return nn.Sequential(Conv1D(8, 8), nn.ReLU(), Conv1D(8, 8))


DEFINED = "padding_idx and scale_grad_by_freq say what the gradient is; it is not the slope"
REPLACED = "two adapters that replace the same tensor are refused (test_bad_input.py)"
SMALL = {"r": 4, "lora_alpha": 6}

INPUT = {
    "merge": "it changes what a module is given, not a weight: refused (test_prompts.py)",
    "sum": "the same",
}
PROMPT = {**INPUT, "identity": "tokens before the input change what the model computes from the start"}
STRAIGHT = {
    "slope": "the gradient of a change is that of its projection, as in peft (test_cpt.py)",
    "randomness": "it starts at embeddings and zeros, whatever the generator",
}
CPT = pf.CPTConfig(cpt_token_ids=[3, 7, 5], cpt_tokens_type_mask=[1, 2, 4], task_type="CAUSAL_LM")
CARTRIDGE = pf.CartridgeConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
ADAPTION = pf.AdaptionPromptConfig(adapter_len=3, adapter_layers=1)


def prompt(task: str) -> pf.PromptTuningConfig:
    """Three tokens before the input."""
    return pf.PromptTuningConfig(num_virtual_tokens=3, task_type=task)


def multitask(task: str) -> pf.MultitaskPromptTuningConfig:
    """The same, for three tasks; before an encoder's input alone, so that rows may have none."""
    sizes = dict(num_virtual_tokens=3, num_tasks=3, num_ranks=2, num_transformer_submodules=1)
    return pf.MultitaskPromptTuningConfig(**sizes, task_type=task)


def p_tuning(encoder: str, task: str = "CAUSAL_LM") -> pf.PromptEncoderConfig:
    """The same from a network."""
    sizes = dict(num_virtual_tokens=3, encoder_hidden_size=6)
    return pf.PromptEncoderConfig(**sizes, encoder_reparameterization_type=encoder, task_type=task)


def prefix(task: str, **kwargs: Any) -> pf.PrefixTuningConfig:
    """Three tokens before the input, in each layer."""
    return pf.PrefixTuningConfig(num_virtual_tokens=3, task_type=task, **kwargs)


def texts() -> dict[str, Tensor]:
    """Four rows of tokens, the first two padded on either side."""
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    mask[1, :2] = 0
    return {"input_ids": tokens()(), "attention_mask": mask}


def of_tasks(make: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """The same, each row of a task."""
    return lambda: {**make(), "task_ids": torch.tensor([2, 0, 1, 2])}


def translations() -> dict[str, Tensor]:
    """The same, and what is to be decoded."""
    return {**texts(), "decoder_input_ids": tokens(4)()}


CASES = [
    Case("linear", mlp, lora("0", "3"), randn(4, 8)),
    Case(
        "linear-3d",
        linears,
        lora("0", "2", use_rslora=True),
        randn(4, 3, 8),
    ),
    Case("linear-head", mlp, lora("0", modules_to_save=["3"]), randn(4, 8), {"sum": REPLACED}),
    Case("linear-bias-all", mlp, lora("0", bias="all"), randn(4, 8), {"sum": REPLACED}),
    Case("linear-bias-lora-only", mlp, lora("0", bias="lora_only"), randn(4, 8), {"sum": REPLACED}),
    Case("linear-patterns", mlp, lora("0", "3", rank_pattern={"0": 2}, alpha_pattern={"3": 3}), randn(4, 8)),
    Case(
        "transposed-linear",
        lambda: nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(5, 12)),
        lora("0", "2"),
        randn(4, 3, 8),
    ),
    Case(
        "transposed-square",
        turned_squares,
        lora("0", "2"),
        randn(4, 3, 8),
    ),
    Case("embedding", lambda: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 5)), lora("0"), tokens()),
    Case(
        "embedding-padding",
        lambda: nn.Sequential(nn.Embedding(20, 8, padding_idx=0, scale_grad_by_freq=True)),
        lora("0"),
        tokens(),
        {"slope": DEFINED},
    ),
    Case(
        "embedding-max-norm",
        lambda: nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 5)),
        lora("0"),
        tokens(),
    ),
    Case(
        "conv1d", lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.ReLU()), lora("0"), randn(4, 4, 9)
    ),
    Case(
        "conv2d",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)),
        lora("0", "2"),
        randn(4, 4, 6, 6),
    ),
    Case(
        "conv2d-dilation",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2, padding="same")),
        lora("0"),
        randn(4, 4, 7, 7),
    ),
    Case(
        "conv2d-circular",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
        lora("0"),
        randn(4, 4, 6, 6),
    ),
    Case(
        "conv2d-reflect",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect")),
        lora("0"),
        randn(4, 4, 6, 6),
    ),
    Case("conv2d-groups", lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), lora("0"), randn(4, 4, 6, 6)),
    Case("conv2d-depthwise", lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), lora("0"), randn(4, 4, 6, 6)),
    Case(
        "conv3d", lambda: nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 1, 2))), lora("0"), randn(4, 2, 3, 4, 5)
    ),
    Case("attention", SelfAttention, lora("attention"), randn(4, 5, 8)),
    Case("attention-out-only", SelfAttention, lora("attention.out_proj"), randn(4, 5, 8)),
    Case(
        "experts",
        lambda: nn.Sequential(Experts()),
        pf.LoraConfig(**SMALL, target_parameters=["0.up", "0.down"]),
        randn(4, 8),
    ),
    Case(
        "transposed-experts",
        lambda: nn.Sequential(TransposedExperts()),
        pf.LoraConfig(**SMALL, target_parameters=["0.weight"]),
        randn(4, 6),
    ),
    Case("tied-embedding", Tied, lora("emb"), tokens()),
    Case("tied-head", Tied, lora("head"), tokens()),
    Case("two-paths", Twice, lora("first"), randn(4, 8)),
    Case("fused-parts", gpt2, lora("c_attn.q", "c_attn.v"), lambda: {"input_ids": tokens()()}),
    Case("fused-attention", SelfAttention, lora("attention.q"), randn(4, 5, 8)),
    Case("gpt2", gpt2, lora("c_attn", "c_proj"), lambda: {"input_ids": tokens()()}),
    Case(
        "llama",
        llama,
        pf.LoraConfig(**SMALL, target_modules="all-linear"),
        lambda: {"input_ids": tokens()()},
    ),
    Case("albert", albert, lora("query", "value"), lambda: {"input_ids": tokens()()}),
    Case("prompt-bert", bert, prompt("SEQ_CLS"), texts, PROMPT),
    Case("prompt-llama", llama, prompt("CAUSAL_LM"), texts, PROMPT),
    Case("prompt-t5", t5, prompt("SEQ_2_SEQ_LM"), translations, PROMPT),
    Case("multitask-llama", llama, multitask("CAUSAL_LM"), of_tasks(texts), PROMPT),
    Case("multitask-t5", t5, multitask("SEQ_2_SEQ_LM"), of_tasks(translations), PROMPT),
    Case("cpt-llama", llama, CPT, texts, {**PROMPT, **STRAIGHT}),
    Case("p-tuning-mlp-gpt2", gpt2, p_tuning("MLP"), texts, PROMPT),
    Case("p-tuning-lstm-gpt2", gpt2, p_tuning("LSTM"), texts, PROMPT),
    Case("p-tuning-lstm-t5", t5, p_tuning("LSTM", "SEQ_2_SEQ_LM"), translations, PROMPT),
    Case("p-tuning-mlp-llama", llama, p_tuning("MLP"), texts, PROMPT),
    Case("prefix-llama", llama, prefix("CAUSAL_LM"), texts, PROMPT),
    Case("prefix-gpt2", gpt2, prefix("CAUSAL_LM"), texts, PROMPT),
    Case("prefix-bert", bert, prefix("SEQ_CLS"), texts, PROMPT),
    Case("prefix-t5", t5, prefix("SEQ_2_SEQ_LM"), translations, PROMPT),
    Case(
        "prefix-projected-gpt2",
        gpt2,
        prefix("CAUSAL_LM", prefix_projection=True, encoder_hidden_size=6),
        texts,
        PROMPT,
    ),
    Case("cartridge-llama", llama, CARTRIDGE, texts, PROMPT),
    Case("adaption-llama", llama, ADAPTION, texts, INPUT),
    Case("adaption-gpt2", gpt2, ADAPTION, texts, INPUT),
]

# Kind of layer -> a base, the layers to adapt there, and a batch. Their sizes are multiples of 4.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Callable[[], Tensor]]] = {
    "linear": (mlp, ("0", "3"), randn(4, 8)),
    "linear-even": (functools.partial(linears, 8, 12, 4), ("0", "2"), randn(4, 3, 8)),
    "transposed-square": (turned_squares, ("0", "2"), randn(4, 3, 8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 5)), ("0",), tokens()),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, stride=2), nn.Tanh(), nn.Conv1d(8, 4, 1)),
        ("0", "2"),
        randn(4, 4, 9),
    ),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(8, 4, 1)),
        ("0", "2"),
        randn(4, 4, 6, 6),
    ),
    "conv2d-groups": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular", groups=2), nn.Tanh(), nn.Conv2d(12, 4, 1)
        ),
        ("0", "2"),
        randn(4, 8, 6, 6),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3)), nn.Tanh(), nn.Conv3d(4, 2, 1)),
        ("0", "2"),
        randn(4, 2, 3, 4, 5),
    ),
}
MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def of_method(method: registry.Method) -> list[Case]:
    """The cases that a method's row asks for."""

    def case(what: str, kind: str, options: Mapping[str, Any], exceptions: Mapping[str, str]) -> Case:
        build, targets, batch = KINDS[kind]
        if "bias" in options:
            exceptions = {**exceptions, "sum": REPLACED}
        return Case(f"{method.name}-{what}", build, method.make(targets, **options), batch, exceptions)

    usual = method.exceptions
    found = [case(kind, kind, {}, usual) for kind in method.kinds]
    found += [case(what, kind, options, usual) for what, (kind, options) in method.others.items()]
    found += [
        Case(f"{method.name}-{name}", MODELS[name], method.make(**options), lambda: {"input_ids": tokens()()}, usual)
        for name, options in method.models.items()
    ]
    if "linear" in method.kinds:
        saved = method.make(("0",), modules_to_save=["3"])
        found += [
            Case(f"{method.name}-head", mlp, saved, randn(4, 8), {**usual, "sum": REPLACED}),
            Case(f"{method.name}-two-paths", Twice, method.make(("first",)), randn(4, 8), usual),
        ]
        if method.start is not None:
            field, _, at_random = method.start
            without = {law: why for law, why in usual.items() if law != "randomness"}
            found.append(case("random", "linear", {field: at_random}, {**without, "identity": registry.ASKED}))
    return found


CASES += [case for method in registry.METHODS if method.kinds for case in of_method(method)]

STAIRS = {
    "slope": "the input is rounded to 8 bits, so the function is a staircase; its gradient is straight through",
    "float32": "the same: where the last bit of an input differs, it may be a step",
}
OWN = {"8-bit": STAIRS, "hqq": {"float32": "its float64 is packed anew, and so another weight (test_opaque.py)"}}
DENSE_HEAD = {
    "8-bit": {"identity": "a trained head is dense, and a dense layer does not round its input"},
    "torchao": {"identity": "a trained head is dense, and torchao scales the sums of a product, not its weight"},
}


# What takes `layers`: how many.
DEEP = (gpt2, llama, bert, t5)

# bitsandbytes' own forward, which the laws compare with, is right on every CPU only where a row of the weight is a
# whole number of blocks of 64 (test_quantized.py has the other sizes); GPTQ packs 32 values together, both ways.
WIDE: dict[Callable[..., nn.Module], tuple[tuple[int, ...], Callable[[], Any] | None]] = {
    mlp: ((64, 64, 32), randn(4, 64)),
    linears: ((64, 64, 32), randn(4, 3, 64)),
    llama: ((64, 64), None),
    bert: ((64, 64), None),
    t5: ((64, 64, 64), None),
}


def widened(case: Case) -> Case:
    """The case on a base as wide as the blocks that are packed together."""
    sizes, batch = WIDE[case.build]
    # How a layer is packed shows in one; the plain cases, and LoRA's packed ones, have two.
    layers = {"layers": 1} if case.build in DEEP and case.name != "llama" else {}
    return dataclasses.replace(case, build=functools.partial(case.build, *sizes, **layers), batch=batch or case.batch)


PACKED = ("linear", "llama")


def on_quantized(*names: str, kinds: Sequence[str] = tuple(quantized.KINDS)) -> list[Case]:
    """The cases of those names on these kinds of quantized base, made as wide as its blocks."""
    plain = {case.name: case for case in CASES}
    return [
        dataclasses.replace(
            widened(plain[name]),
            name=f"{name}-{kind}",
            exceptions={
                **plain[name].exceptions,
                **OWN.get(kind, {}),
                **(DENSE_HEAD.get(kind, {}) if name == "linear-head" else {}),
            },
            pack=functools.partial(quantized.packed, kind=kind),
            rounding=quantized.ROUNDING.get(kind, 0.0),
            packs_float64=kind == "hqq",
        )
        for name in names
        for kind in kinds
    ]


# A format is read and run by its codec, whatever the method, and LoRA's cases have every format. Of the other methods
# each one takes its turn with one format a base; `make test-every-base` has all of them.
EVERY_BASE = bool(os.environ.get("PEFTFN_EVERY_BASE"))


def in_turn() -> list[Case]:
    """The packed cases of the registry's methods."""
    kinds = list(quantized.KINDS)
    found: list[Case] = []
    for number, method in enumerate(one for one in registry.METHODS if one.kinds and one.packed):
        for place, what in enumerate(PACKED):
            own = kinds if EVERY_BASE else [kinds[(number + 2 * place) % len(kinds)]]
            found += on_quantized(f"{method.name}-{what}", kinds=own)
    return found


CASES += in_turn()
CASES += on_quantized(
    "linear-3d",
    "linear-head",
    "linear-bias-all",
    "llama",
    "prompt-llama",
    "prompt-t5",
    "p-tuning-mlp-llama",
    "p-tuning-lstm-t5",
    "prefix-llama",
    "prefix-bert",
    "adaption-llama",
)
BY_NAME = {case.name: case for case in CASES}


def having(law: str) -> list[Case]:
    """The cases for which a law has a meaning."""
    return [case for case in CASES if law not in case.exceptions]
