"""LoRA's config, and what AdaLoRA's has in common with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from peftfn.core.config import ANY, OFF, LayeredConfig
from peftfn.methods import alora, lora_variants


def described(text: str) -> dict[str, str]:
    """The metadata of a field that the command line shows with this text."""
    return {"help": text}


@dataclasses.dataclass(frozen=True)
class LowRankConfig(LayeredConfig):
    """The fields that PEFT's configs of LoRA and AdaLoRA share.

    Attributes:
        target_parameters: names of bare parameters to adapt, such as an MoE's experts: (experts, ...) tensors.
        r: the rank of the update.
        lora_alpha: the scaling is lora_alpha / r.
        lora_dropout: the probability in training that a number of A's input is dropped.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        bias: which biases to train too: `"none"`, `"all"`, or `"lora_only"`, those of the adapted layers.
        use_rslora: whether the scaling is lora_alpha / √r instead (https://arxiv.org/abs/2312.03732).
        init_lora_weights: `True` (A as torch's linear layers, B = 0), `"gaussian"` (A normal of deviation 1/r, B = 0),
            `False` (both at random: not the identity). Files may have others that need no changed base.
        alpha_pattern: other alphas, by module name or regex; the first one that matches a path counts.

    Raises:
        TypeError: `target_parameters` is a string.
        ValueError: `r` is no positive integer, `lora_dropout` no probability below 1, `bias` unknown, or
            `init_lora_weights` unknown or one that changes the base too (see `peftfn.pissa` and `peftfn.olora`).

    Example:
        >>> import peftfn as pf
        >>> pf.LoraConfig(r=4, alpha_pattern={"layer.0.query": 16}).bias
        'none'
    """

    inactive: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("megatron_config", "corda_config", "lora_ga_config", "use_qalora"), OFF),
        # How the tensors of a file began, and how their gradients were made; rates that ms-swift's optimizer had.
        **dict.fromkeys(("loftq_config", "eva_config", "velora_config", "lorap_lr_ratio", "lorap_emb_lr"), ANY),
        **dict.fromkeys(("monteclora_config", "layer_replication"), OFF),
        **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying"), OFF),
        **dict.fromkeys(("megatron_core", "qalora_group_size"), ANY),
    }

    target_parameters: Sequence[str] | None = dataclasses.field(
        default=None, metadata=described("Names of bare parameters to adapt, such as MoE experts.")
    )
    r: int = dataclasses.field(default=8, metadata=described("Rank of the update."))
    lora_alpha: float = dataclasses.field(default=8, metadata=described("Scaling is lora_alpha / r."))
    lora_dropout: float = dataclasses.field(default=0.0, metadata=described("Dropout on the input of A in training."))
    fan_in_fan_out: bool = dataclasses.field(
        default=False, metadata=described("Whether weights are stored (in, out); found out by itself.")
    )
    bias: str = dataclasses.field(default="none", metadata=described("Biases to train: none, all or lora_only."))
    use_rslora: bool = dataclasses.field(default=False, metadata=described("Scaling is lora_alpha / sqrt(r)."))
    init_lora_weights: bool | str = dataclasses.field(
        default=True, metadata=described("True (B = 0), gaussian (A normal, B = 0), or False (not the identity).")
    )
    alpha_pattern: Mapping[str, float] | None = dataclasses.field(
        default_factory=dict[str, float], metadata=described("Other alphas, by module name or regex.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("r", self.r)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r}; expected a probability of at least 0 and below 1.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias={self.bias!r}; expected 'none', 'all' or 'lora_only'.")
        _check_init(self.init_lora_weights)


@dataclasses.dataclass(frozen=True)
class LoraConfig(LowRankConfig):
    """LoRA's config, with PEFT's fields and defaults: W + s·B·A with W frozen (https://arxiv.org/abs/2106.09685).

    Attributes:
        rank_pattern: other ranks, by module name or regex; the first one that matches a path counts.
        use_dora: whether a length of each output's weights is learned too (DoRA, https://arxiv.org/abs/2402.09353).
        alora_invocation_tokens: token ids; the update acts from their last occurrence in a row on, and not on what is
            before it (aLoRA, https://arxiv.org/abs/2504.12397). Such an adapter cannot be merged.
        lora_bias: whether a bias c, (out,), is trained with B: W x + b + s·(B·A·x + c).
        trainable_token_indices: ids of tokens whose embeddings are trained too, of the model's own embedding, or
            `{name of an embedding: ids}` (see `peftfn.TrainableTokensConfig`).
        layer_replication: ranges of layers that the base repeats, `[start, end]`; `peftfn.replicate_layers` makes such
            a base, and `peftfn.init` fills this in from it.
        use_qalora: whether A is given the means of groups of inputs (QA-LoRA, https://arxiv.org/abs/2309.14717), on
            layers of GPTQ.
        qalora_group_size: how many inputs a group has.
        use_bdlora: `target_modules_bd_a` and `target_modules_bd_b`, parts of the names of layers whose A, or B, is
            block-diagonal, `nblocks`, and `match_strict`, whether each layer has to be named (BD-LoRA).
        kasa_config: `beta` and `gamma`, the weights of `peftfn.kasa.regulariser`; `{}` has PEFT's (KaSA,
            https://arxiv.org/abs/2412.06071).
        velora_config: `num_groups`, `scale` and `init_type` of what is kept of inputs for the gradient of A; `{}` has
            PEFT's (VeLoRA, https://arxiv.org/abs/2405.17991).

    Raises:
        ValueError: a rank in `rank_pattern` is no positive integer; `alora_invocation_tokens` are no ids, or go with
            another `task_type` than `CAUSAL_LM`; two variants are asked for at once, or one in a way without a sense.

    Example:
        >>> import peftfn as pf
        >>> config = pf.LoraConfig(r=16, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0.1)
        >>> config.r, config.target_modules
        (16, ('query', 'value'))
    """

    peft_type: ClassVar[str] = "LORA"

    rank_pattern: Mapping[str, int] | None = dataclasses.field(
        default_factory=dict[str, int], metadata=described("Other ranks, by module name or regex.")
    )
    use_dora: bool = dataclasses.field(
        default=False, metadata=described("Whether to learn the length of each output's weights too (DoRA).")
    )
    alora_invocation_tokens: Sequence[int] | None = dataclasses.field(
        default=None, metadata=described("Tokens from whose last occurrence on the adapter acts (aLoRA).")
    )
    lora_bias: bool = dataclasses.field(default=False, metadata=described("Whether the second factor has a bias."))
    trainable_token_indices: Mapping[str, Sequence[int]] | Sequence[int] | None = dataclasses.field(
        default=None, metadata=described("Tokens whose embeddings are trained too: ids, or {embedding: ids}.")
    )

    layer_replication: Sequence[Sequence[int]] | None = dataclasses.field(
        default=None, metadata=described("Ranges of layers that the base repeats.")
    )
    use_qalora: bool = dataclasses.field(
        default=False, metadata=described("Whether A is given the means of groups of inputs (GPTQ).")
    )
    qalora_group_size: int = dataclasses.field(default=16, metadata=described("Inputs of a group of QA-LoRA."))
    use_bdlora: Mapping[str, Any] | None = dataclasses.field(
        default=None, metadata=described("Block-diagonal factors: target_modules_bd_a, _bd_b, nblocks, match_strict.")
    )
    kasa_config: Mapping[str, Any] | None = dataclasses.field(
        default=None, metadata=described("KaSA: beta and gamma of its regulariser.")
    )

    velora_config: Mapping[str, Any] | None = dataclasses.field(
        default=None, metadata=described("VeLoRA: num_groups, scale and init_type (batch_average or random).")
    )

    def __post_init__(self) -> None:
        for name in ("use_bdlora", "kasa_config", "velora_config"):
            object.__setattr__(self, name, lora_variants.filled(name, getattr(self, name)))
        super().__post_init__()
        lora_variants.check(self)
        for rank in (self.rank_pattern or {}).values():
            check_positive("r", rank)
        if self.alora_invocation_tokens is not None:
            alora.check(self)
        if self.lora_bias and (self.use_dora or not isinstance(self.init_lora_weights, bool)):
            raise ValueError(
                f"lora_bias=True with use_dora={self.use_dora} and init_lora_weights={self.init_lora_weights!r}; "
                "expected use_dora=False and a start of True or False, as in PEFT."
            )


def check_probability(field: str, value: float) -> None:
    """A `ValueError` unless a config's field is a probability of dropping that leaves something."""
    if not 0 <= value < 1:
        raise ValueError(f"{field}={value!r}; expected a probability of at least 0, below 1.")


def check_bias(value: str, only: str) -> None:
    """A `ValueError` unless `bias` is one of PEFT's three; `only` is the one that names the method."""
    if value not in ("none", "all", only):
        raise ValueError(f"bias={value!r}; expected 'none', 'all' or {only!r}.")


def check_positive(field: str, value: Any) -> None:
    """A `ValueError` if a value is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r}; expected a positive integer.")


def _check_init(init: bool | str) -> None:
    if isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal", "loftq", "mica"):
        return
    if init in ("olora", "corda", "lora_ga") or init.startswith("pissa"):
        here = {"pissa": "peftfn.pissa(model, config)", "olora": "peftfn.olora(model, config)"}.get(init)
        start = f"{here} makes it, with the weights that go with it" if here else "start from True"
        raise ValueError(
            f"init_lora_weights={init!r} goes with a base whose weights it changed, so this adapter alone does not say "
            f"what it computes. To start, {start}; a file of it, convert with peft's "
            "path_initial_model_for_weight_conversion."
        )
    raise ValueError(f"init_lora_weights={init!r}; expected True, False or 'gaussian'.")
