"""WaveFT where the tables of tests say nothing: families, odd sizes, proportional numbers, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf
from peftfn.methods import waveft
from peftfn.methods.wavelets import LOW_PASS

waverec2d: Any = None
if not oracle.IS_OLD:
    from peft.tuners.waveft import waverec2d

SIZES = [("db1", 11, 7), ("db2", 8, 5), ("coif2", 7, 12), ("coif4", 6, 6)]


def config(**options: Any) -> pf.WaveFTConfig:
    return pf.WaveFTConfig(**{"n_frequency": 9, "target_modules": ["0"], **options})


def model(inputs: int = 11, outputs: int = 7) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


@pytest.mark.parametrize("family", [one for one in LOW_PASS if one != "coif4"])
def test_a_family_takes_apart_what_it_puts_together(family: str) -> None:
    """Of an orthogonal transform the inverse is the transpose: columns of norm 1, at right angles."""
    size = 2 * len(LOW_PASS[family])  # so that no column is cut off
    alone = [torch.zeros(size, size, dtype=torch.float64) for _ in range(4)]
    for one, place in zip(alone, ((0, 0), (1, 1), (0, size - 1), (size - 1, size - 1)), strict=True):
        one[place] = 1
    columns = torch.stack([waveft.inverse(one, LOW_PASS[family]).flatten() for one in alone])
    assert off(columns @ columns.T, torch.eye(4).double()) < 1e-10, "as far as the tables have digits"


@oracle.by_new_peft
@pytest.mark.parametrize(("family", "inputs", "outputs"), SIZES)
def test_odd_sizes_and_long_filters_are_pefts(family: str, inputs: int, outputs: int, tmp_path: Path) -> None:
    base, x = model(inputs, outputs), torch.randn(3, inputs).double()
    adapter = oracle.randomised(pf.init(base, config(wavelet_family=family, n_frequency=25)))
    theirs = oracle.loaded(base, pf.save(adapter, tmp_path), autocast_adapter_dtype=False)
    assert off(pf.apply(base, adapter, x) - base(x), theirs(x) - base(x)) < EXACT


@oracle.by_new_peft
def test_it_is_one_level_of_the_transform_that_peft_has() -> None:
    quarters = torch.randn(4, 5, 6).double()
    spectrum = torch.cat([torch.cat([*quarters[:2]], 1), torch.cat([*quarters[2:]], 1)])
    expected = waverec2d.waverec2d((quarters[0], tuple(quarters[1:])), "db1")
    assert off(waveft.inverse(spectrum, LOW_PASS["db1"]), expected) < EXACT


@oracle.by_new_peft
def test_proportional_numbers_are_pefts_and_stand_in_the_pattern(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 4), nn.Linear(4, 2)).double()
    options: Any = {"n_frequency": 8, "proportional_parameters": True, "target_modules": ["0", "1", "2"]}
    adapter = pf.init(base, pf.WaveFTConfig(**options))
    with oracle.quiet_peft():
        other = peft.get_peft_model(base, peft.WaveFTConfig(**options))
    counts = {path: leaf["waveft_spectrum"].numel() for path, leaf in adapter.params.items()}
    assert counts == {key.split(".")[2]: one.numel() for key, one in oracle.trained(other).items()}
    assert list(adapter.config.n_frequency_pattern.values()) == list(counts.values())
    assert not adapter.config.proportional_parameters
    other.save_pretrained(tmp_path)
    theirs = pf.load(tmp_path)
    assert {path: leaf["waveft_spectrum"].numel() for path, leaf in theirs.params.items()} == counts
    with pytest.raises(ValueError, match=r"18 coefficients where its config says 8 \(proportional_parameters\)"):
        pf.stack([theirs, theirs])


@pytest.mark.parametrize("family", ["db11", "sym20", "coif5", "haar", "no such"])
def test_families_that_peft_has_no_filters_for_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=rf"wavelet_family='{family}'; expected one of those whose filters PEFT has"):
        config(wavelet_family=family)
    assert config(wavelet_family=family, use_idwt=False).wavelet_family == family


def test_a_random_start_is_as_small_as_pefts() -> None:
    found = pf.init(nn.Sequential(nn.Linear(64, 64)), config(n_frequency=4000, init_weights=False))
    assert abs(float(found.params["0"]["waveft_spectrum"].std()) - 0.01) < 0.001
