"""C3A where the tables of tests say nothing, or peft something else."""

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


def config(**options: Any) -> pf.C3AConfig:
    return pf.C3AConfig(**{"block_size": 3, "target_modules": ["0"], "init_weights": True, **options})


def model(outputs: int = 6, inputs: int = 9) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


def test_each_row_of_a_block_is_the_one_above_it_turned() -> None:
    base, x = model(), torch.randn(2, 5, 9).double()
    adapter = oracle.randomised(pf.init(base, config()))
    kernel = adapter.params["0"]["c3a_kernel"]
    rows = [torch.cat([kernel[m, n].roll(u) for n in range(3)]) for m in range(2) for u in range(3)]
    change = torch.stack(rows) / 9
    assert off(pf.merge(dict(base.named_parameters()), adapter)["0.weight"] - base[0].weight, change) < EXACT
    assert off(pf.apply(base, adapter, x) - base(x), x @ change.T) < EXACT


def test_two_adapters_add_up(tmp_path: Path) -> None:
    """peft gives the second what the first has made; neither their sum nor what it merges."""
    base, x = model(6, 6), torch.randn(4, 6).double()
    one, other = (oracle.randomised(pf.init(base, config()), seed) for seed in (1, 2))
    expected = pf.apply(base, one, x) + pf.apply(base, other, x) - base(x)
    assert off(pf.apply(base, (one, other), x), expected) < EXACT
    for name, adapter in (("one", one), ("other", other)):
        pf.save(adapter, tmp_path / name)
    theirs = oracle.loaded(base, tmp_path / "one", adapter_name="one", autocast_adapter_dtype=False)
    theirs.load_adapter(str(tmp_path / "other"), "other", autocast_adapter_dtype=False)
    theirs.base_model.set_adapter(["one", "other"])
    assert off(theirs(x), expected) > 1e-3


@pytest.mark.parametrize("how", ["xavier_uniform", False, "kaiming_uniform", "gaussian"])
def test_random_starts_are_spread_as_pefts(how: Any) -> None:
    base = nn.Sequential(nn.Linear(256, 128))
    found = pf.init(base, config(block_size=4, init_weights=how)).params["0"]["c3a_kernel"]
    made = peft.get_peft_model(base, peft.C3AConfig(block_size=4, target_modules=["0"], init_weights=how))
    theirs = dict(made.named_parameters())["base_model.model.0.c3a_kernel.default"].detach()
    assert found.shape == theirs.shape
    assert abs(float(found.std() / theirs.std()) - 1) < 0.05
    if how != "gaussian":
        assert abs(float(found.abs().max() / theirs.abs().max()) - 1) < 0.01


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0: block_size=4 does not divide its 9 inputs and 6 outputs; .* of 3\."):
        pf.init(model(), config(block_size=4))
    with pytest.raises(ValueError, match="0: the adapter has c3a_kernel, expected nothing for a linear"):
        pf.apply(model(7), pf.init(model(), config()), torch.zeros(1, 9).double())


def test_halves_run_in_float32() -> None:
    base, x = model(4, 8).bfloat16(), torch.randn(3, 8)
    adapter = oracle.randomised(pf.init(base, config(block_size=4)))
    found = pf.apply(base, adapter, x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert off(found, pf.apply(base.float(), adapter, x.bfloat16().float())) < 2e-2


def test_excluded_modules_are_left_out_of_the_targets_which_peft_reads(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    adapter = pf.init(base, config(block_size=2, target_modules=["0", "2"], exclude_modules=["1.0"]))
    assert list(adapter.params) == ["0", "2"]
    assert adapter.config.exclude_modules is None
    pf.save(adapter, tmp_path)
    theirs = oracle.loaded(base, tmp_path)
    assert sorted(oracle.file_of(theirs)) == [f"base_model.model.{path}.c3a_kernel" for path in ("0", "2")]


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"block_size=0; expected a positive integer", {"block_size": 0}),
        (r"block_size=0; expected a positive integer", {"block_size_pattern": {"0": 0}}),
        (r"bias='lora_only'; expected 'none', 'all' or 'c3a_only'", {"bias": "lora_only"}),
        (r"init_weights='orthogonal'; expected True, 'xavier_uniform'", {"init_weights": "orthogonal"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        config(**options)
