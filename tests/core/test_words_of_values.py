"""What is shown of an adapter, and what is said of another library's config."""

from __future__ import annotations

from typing import Any

import optree
import peft
import pytest
from torch import nn

import peftfn as pf


def test_an_adapter_shows_its_sites_and_shapes_and_no_numbers() -> None:
    model = nn.Sequential(*(nn.Linear(4, 3 if n == 13 else 4) for n in range(14)))
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules="all-linear", exclude_modules=["13"]))
    lines = repr(adapter).splitlines()
    assert lines[0] == "Adapter(LoraConfig, 13 sites)"
    assert lines[1] == "  0: lora_A 2×4, lora_B 4×2"
    assert lines[-1] == "  and 1 more"
    assert len(lines) == 14
    assert "  0: lora_A 3×2×4" in repr(pf.stack([adapter] * 3))
    sizes: Any = optree.tree_map(lambda tensor: tensor.numel(), adapter)
    assert "  0: lora_A 8, lora_B 8" in repr(sizes)
    assert repr(adapter.replace(params=0)) == "Adapter(LoraConfig, params=0)"


def test_a_config_of_peft_is_refused_with_what_makes_one_of_ours() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    theirs: Any = peft.LoraConfig(r=3, target_modules=["0"])
    with pytest.raises(TypeError, match=r"config is peft's LoraConfig; .*PeftConfig\.from_dict\(config\.to_dict\(\)\)"):
        pf.init(model, theirs)
    ours = pf.PeftConfig.from_dict(theirs.to_dict())
    assert pf.init(model, ours).params["0"]["lora_A"].shape == (3, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(TypeError, match=r"lora_alpha=(nan|inf)\): expected float, and finite numbers"):
        pf.LoraConfig(lora_alpha=value)
    with pytest.raises(ValueError, match=r"alpha_pattern=.* expected Mapping.* finite"):
        pf.LoraConfig.from_dict({"peft_type": "LORA", "alpha_pattern": {"0": value}})
