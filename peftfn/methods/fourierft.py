"""FourierFT: W + s·Re F⁻¹(S), S zero but for n trained coefficients (https://arxiv.org/abs/2405.03003, section 3).

F⁻¹ is the inverse of the discrete Fourier transform of a matrix, as `torch.fft.ifft2`. Which n coefficients are trained
follows from `random_loc_seed` and the weight's shape alone, so layers of one shape have the same places; files hold the
coefficients without them. By default they begin as normal numbers, so a fresh adapter is not the identity unless
`init_weights=True` asks for it, as in PEFT.

PEFT makes ΔW in float32 whatever the dtype; here it is in float64 where the coefficients are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor

from peftfn.methods import builders, coefficients, lora
from peftfn.methods.coefficients import CoefficientsConfig
from peftfn.methods.lora_targets import DENSE_TARGETS
from peftfn.methods.method import Method
from peftfn.methods.traits import Files, Targets, by_type
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class FourierFTConfig(CoefficientsConfig):
    """FourierFT's config, with PEFT's fields and defaults: W + s·Re F⁻¹(S) (https://arxiv.org/abs/2405.03003).

    Attributes:
        n_frequency: n, how many numbers of the spectrum S, (out, in), are trained; at most out·in.
        scaling: s, as it is: nothing divides it. PEFT's default of 150 is for `n_frequency` of about 1,000.
        random_loc_seed: the places of the n numbers follow from it and from the weight's shape; files hold no others.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        bias: which biases to train too: `"none"`, `"all"`, or `"fourier_only"`, those of the adapted layers.
        n_frequency_pattern: other values of `n_frequency`, by module name or regex; the first one that matches counts.
        init_weights: `True` (zeros), or `False` (normal numbers: not the identity, and the default, as in PEFT).

    Raises:
        ValueError: a number of coefficients is no positive integer, or `bias` is unknown.

    Example:
        >>> import peftfn as pf
        >>> config = pf.FourierFTConfig(n_frequency=500, scaling=100.0, target_modules=["query", "value"])
        >>> config.n_frequency, config.random_loc_seed, config.init_weights
        (500, 777, False)
    """

    peft_type: ClassVar[str] = "FOURIERFT"


NAME = "fourierft_spectrum"


def delta(config: FourierFTConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """s·Re F⁻¹(S), (out, in)."""
    spectrum = coefficients.dense(config, leaf[NAME], leaf["scaling"], weight)
    made = cast("Tensor", torch.fft.ifft2(spectrum))  # torch does not say what it returns
    return made.real.to(leaf[NAME].dtype)


METHOD = Method(
    config=FourierFTConfig,
    slots=coefficients.slots(NAME),
    init=coefficients.init(NAME, 1.0),
    constants=coefficients.constants,
    action=builders.additive(delta, kinds=builders.MATRICES),
    targets=Targets(by_type(DENSE_TARGETS), lora.sites),
    stacking=coefficients.STACKING,
    files=Files(coefficients.check_file),
)
