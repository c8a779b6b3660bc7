"""WaveFT: W + s·T⁻¹(S), S zero but for n trained coefficients (https://arxiv.org/abs/2505.12532, section 3).

T⁻¹ is one level of the inverse of a wavelet transform of a matrix, of the family `wavelet_family`; with
`use_idwt=False` there is none, and S itself is added. The quarters of S are those of the transform: the upper left one
is smoothed along both axes, the upper right one is detail along the outputs, the lower left one along the inputs. Where
filters are longer than two, S is put in the middle of a larger matrix of zeros, so that what comes out has the size of
W. Which n coefficients are trained follows from `random_loc_seed` and the weight's shape alone; files hold the
coefficients without their places.

`proportional_parameters` gives each layer coefficients by its size: `init` writes their numbers into
`n_frequency_pattern`, where PEFT finds them again without knowing of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfn.methods import builders, coefficients, lora
from peftfn.methods.coefficients import CoefficientsConfig
from peftfn.methods.lora_config import described
from peftfn.methods.lora_targets import DENSE_TARGETS
from peftfn.methods.method import Method
from peftfn.methods.traits import Files, Targets
from peftfn.methods.wavelets import LOW_PASS
from peftfn.models import layers, targets
from peftfn.models.layouts import WeightShape


@dataclasses.dataclass(frozen=True)
class WaveFTConfig(CoefficientsConfig):
    """WaveFT's config, with PEFT's fields and defaults: W + s·T⁻¹(S) (https://arxiv.org/abs/2505.12532).

    Attributes:
        n_frequency: n, how many coefficients of S, (out, in), are trained; at most out·in.
        scaling: s, as it is: nothing divides it.
        random_loc_seed: the places of the n numbers follow from it and from the weight's shape; files hold no others.
        fan_in_fan_out: whether weights are stored (in, out); `peftfn.init` corrects it from the layers that it finds.
        bias: which biases to train too: `"none"`, `"all"`, or `"waveft_only"`, those of the adapted layers.
        n_frequency_pattern: other values of `n_frequency`, by module name or regex; the first one that matches counts.
        init_weights: `True` (zeros), or `False` (normal numbers of deviation 0.01: not the identity).
        wavelet_family: the wavelet of T: `"db1"` (Haar's) to `"db10"`, `"sym2"` to `"sym10"`, `"coif1"` to `"coif4"`.
        use_idwt: whether S are coefficients of the transform; with `False` s·S itself is added to W.
        proportional_parameters: whether `peftfn.init` shares out n times the number of layers by the layers' sizes.

    Raises:
        ValueError: a number of coefficients is no positive integer, `bias` is unknown, or PEFT has no filters, or wrong
            ones, for `wavelet_family`.

    Example:
        >>> import peftfn as pf
        >>> config = pf.WaveFTConfig(n_frequency=500, wavelet_family="sym2", target_modules=["query", "value"])
        >>> config.scaling, config.random_loc_seed, config.init_weights
        (25.0, 777, True)
    """

    peft_type: ClassVar[str] = "WAVEFT"

    n_frequency: int = dataclasses.field(default=2592, metadata=described("Coefficients that are trained in a layer."))
    scaling: float = dataclasses.field(default=25.0, metadata=described("What the update is multiplied with."))
    init_weights: bool = dataclasses.field(default=True, metadata=described("True (zeros), or False (random)."))
    wavelet_family: str = dataclasses.field(
        default="db1", metadata=described("db1 to db10, sym2 to sym10, coif1 to coif4.")
    )
    use_idwt: bool = dataclasses.field(
        default=True, metadata=described("Whether they are coefficients of a wavelet transform, or of the weight.")
    )
    proportional_parameters: bool = dataclasses.field(
        default=False, metadata=described("Whether larger layers get more coefficients.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_idwt and self.wavelet_family not in LOW_PASS:
            raise ValueError(
                f"wavelet_family={self.wavelet_family!r}; expected one of those whose filters PEFT has: "
                f"{', '.join(LOW_PASS)}."
            )


NAME = "waveft_spectrum"


def resolve(model: nn.Module, config: WaveFTConfig) -> WaveFTConfig:
    """The config with PEFT's default targets for the model, its heads, and how many coefficients each layer has."""
    found = targets.resolved(model, config, DENSE_TARGETS)
    if not found.proportional_parameters:
        return found
    places = targets.sites(model, found)
    sizes = {
        path: layers.shape_of(model.get_submodule(place.owner), place.weight).numel() for path, place in places.items()
    }
    total, budget = sum(sizes.values()), found.n_frequency * len(sizes)
    counts = {f"^{re.escape(path)}": max(1, round(size / total * budget)) for path, size in sizes.items()}
    return dataclasses.replace(found, n_frequency_pattern=counts, proportional_parameters=False)


def delta(config: WaveFTConfig, leaf: Mapping[str, Tensor], weight: WeightShape) -> Tensor:
    """s·T⁻¹(S), (out, in)."""
    spectrum = coefficients.dense(config, leaf[NAME], leaf["scaling"], weight)
    made = inverse(spectrum, LOW_PASS[config.wavelet_family]) if config.use_idwt else spectrum
    return made.to(leaf[NAME].dtype)


def inverse(spectrum: Tensor, low_pass: tuple[float, ...]) -> Tensor:
    """The matrix of these coefficients, of the same shape."""
    rows, columns = spectrum.shape
    more = len(low_pass) - 2  # what filters of this length take away
    around = [(extra // 2, extra - extra // 2) for extra in (more + (size + more) % 2 for size in (columns, rows))]
    padded = F.pad(spectrum, (*around[0], *around[1]))
    # (half along the outputs, outputs, half along the inputs, inputs); the first half says how inputs are filtered.
    half = padded.shape[0] // 2
    quarters = padded.reshape(2, half, 2, -1).permute(2, 1, 0, 3)
    wide = _synthesized(quarters.flatten(0, 1), low_pass)  # (2 * outputs, in)
    high = _synthesized(wide.reshape(2, half, -1).permute(2, 0, 1), low_pass)  # (in, out)
    return high.T[:rows, :columns]


def _synthesized(halves: Tensor, low_pass: tuple[float, ...]) -> Tensor:
    """Signals (n, 2k - L + 2) of k smooth and k detail coefficients each, (n, 2, k), by filters of length L."""
    low = torch.tensor(low_pass, dtype=halves.dtype, device=halves.device)
    signs = torch.ones_like(low)
    signs[1::2] = -1
    filters = torch.stack([low, signs * low.flip(0)])[:, None]  # (2, 1, L)
    return F.conv_transpose1d(halves, filters, stride=2, padding=len(low_pass) - 2).squeeze(1)


METHOD = Method(
    config=WaveFTConfig,
    slots=coefficients.slots(NAME),
    init=coefficients.init(NAME, 0.01),
    constants=coefficients.constants,
    action=builders.additive(delta, kinds=builders.MATRICES),
    targets=Targets(resolve, lora.sites),
    stacking=coefficients.STACKING,
    files=Files(coefficients.check_file),
)
