"""AdaLoRA's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from peftfn.core.config import OFF
from peftfn.methods.lora_config import LowRankConfig, check_positive, described


@dataclasses.dataclass(frozen=True)
class AdaLoraConfig(LowRankConfig):
    """AdaLoRA's config, with PEFT's fields and defaults: W + s·P·Λ·Q (https://arxiv.org/abs/2303.10512).

    `r`, `use_rslora` and `alpha_pattern` are PEFT's and change nothing: the rank is `init_r`. Files may have them,
    `peftfn.init` refuses them. How ranks are given up in training: `peftfn.adalora`.

    Attributes:
        target_r: the average rank of a site in the end.
        init_r: the rank at the start.
        tinit: how many steps keep all ranks.
        tfinal: how many steps at the end keep the ranks that are left.
        deltaT: steps from one decision about ranks to the next.
        beta1: the part of a sensitivity's moving average that a step keeps, above 0 and below 1.
        beta2: the same of its uncertainty.
        orth_reg_weight: the factor of `peftfn.adalora.regulariser`.
        total_step: the number of training steps; `None`, as in files of PEFT 0.5.0, serves everything but allocation.
        rank_pattern: from files: which of the `init_r` rows of each site are left.

    Raises:
        ValueError: a field is out of its range, or `tinit` and `tfinal` leave no step between them.

    Example:
        >>> import peftfn as pf
        >>> config = pf.AdaLoraConfig(init_r=12, target_r=4, total_step=1000, tinit=100, tfinal=200, deltaT=10)
        >>> config.init_r, config.r
        (12, 8)
    """

    peft_type: ClassVar[str] = "ADALORA"
    inactive: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("alora_invocation_tokens", "lora_bias", "trainable_token_indices", "use_dora"), OFF
    )

    target_r: int = dataclasses.field(default=8, metadata=described("Average rank in the end."))
    init_r: int = dataclasses.field(default=12, metadata=described("Rank at the start."))
    tinit: int = dataclasses.field(default=0, metadata=described("Steps before ranks shrink."))
    tfinal: int = dataclasses.field(default=0, metadata=described("Steps at the end in which ranks stay."))
    deltaT: int = dataclasses.field(default=1, metadata=described("Steps from one allocation to the next."))  # noqa: N815  # PEFT's
    beta1: float = dataclasses.field(default=0.85, metadata=described("Smoothing of the sensitivity."))
    beta2: float = dataclasses.field(default=0.85, metadata=described("Smoothing of the uncertainty."))
    orth_reg_weight: float = dataclasses.field(default=0.5, metadata=described("Weight of the regulariser."))
    total_step: int | None = dataclasses.field(default=None, metadata=described("Steps of the whole training."))
    rank_pattern: Mapping[str, Sequence[bool]] | None = dataclasses.field(
        default=None, metadata=described("Which of the init_r rows of each site are there; from files.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("init_r", self.init_r)
        check_positive("target_r", self.target_r)
        check_positive("deltaT", self.deltaT)
        for field in ("beta1", "beta2"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)!r}; expected a number above 0 and below 1.")
        for field in ("tinit", "tfinal", "orth_reg_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)!r}; expected 0 or more.")
        if self.total_step is None:
            return
        check_positive("total_step", self.total_step)
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit}, tfinal={self.tfinal} and total_step={self.total_step} leave no step in which "
                "ranks shrink; expected tinit < total_step - tfinal."
            )
