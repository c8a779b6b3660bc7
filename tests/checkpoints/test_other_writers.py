"""Configs of other writers: fields that ask for nothing, or that say how the tensors of the file began."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from torch import nn

import peftfn as pf

# Float64 rounding of sums in another order.
EXACT = 1e-12


def written(folder: Path, more: dict[str, Any]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A file of peft's with this in its config beside or in place of what is there, its base, and what peft reads."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(folder)
    path, x = folder / "adapter_config.json", torch.randn(5, 4).double()
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return base, x, theirs.eval()(x)


NOTHING: list[Any] = [None, False, {}, []]
SAME: dict[str, dict[str, Any]] = {
    "alpaca-lora": {"enable_lora": None, "merge_weights": False},
    "ms-swift": {"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-6},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "no targets": {"target_modules": None},
    **{f"a later field, {json.dumps(value)}": {"some_new_option": value} for value in NOTHING},
}


@pytest.mark.parametrize("more", SAME.values(), ids=SAME)
def test_a_file_that_is_lora_is_read_as_lora(more: dict[str, Any], tmp_path: Path) -> None:
    base, x, expected = written(tmp_path, more)
    for adapter in (pf.load(tmp_path), pf.load(tmp_path, base)):
        assert (pf.apply(base, adapter, x) - expected).abs().max() <= EXACT
    assert set(adapter.config.target_modules or ()) == {"0", "2"}


@oracle.by_new_peft
def test_peft_reads_the_same_of_a_file_that_names_an_init(tmp_path: Path) -> None:
    base, x, expected = written(tmp_path, SAME["MiCA"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.PeftModel.from_pretrained(copy.deepcopy(base).float(), str(tmp_path)).eval()(x.float())
    assert (found - expected).abs().max() <= 1e-5  # it starts in float32 alone, whose rounding this is


@pytest.mark.parametrize("value", [3, 0, "x", True, [1]])
def test_a_field_that_is_not_known_and_asks_for_something_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    written(tmp_path, {"some_new_option": value})
    with pytest.raises(ValueError, match="LoraConfig has no field 'some_new_option'"):
        pf.load(tmp_path)
