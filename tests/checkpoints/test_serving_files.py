"""What a server that reads PEFT's LoRA folders asks of them, held against what we save for a Llama.

The rules are those of vLLM, as its `peft_helper.py` and its loader of LoRA tensors have them: it reads `r`,
`lora_alpha`, `target_modules`, `bias` and `use_rslora`, refuses DoRA, `modules_to_save` and trained biases, and finds a
module by `base_model.model.<path>.lora_A.weight`. vLLM itself needs an accelerator and does not run here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bases import BASES
from oracle import randomised
from safetensors.torch import load_file
from torch import nn

import peftfn as pf

KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
OPTIONS: dict[str, dict[str, Any]] = {
    "default targets": {},
    "all linear layers": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 16},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_saved_lora_keeps_to_what_servers_read(options: dict[str, Any], tmp_path: Path) -> None:
    model: nn.Module = BASES["llama"].make()
    adapter = randomised(pf.init(model, pf.LoraConfig(**options, task_type="CAUSAL_LM")))
    folder = pf.save(adapter, tmp_path)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert type(config["r"]) is int
    assert type(config["lora_alpha"]) in (int, float)
    assert config["bias"] == "none"
    assert isinstance(config["target_modules"], (list, str))
    assert config.get("use_rslora", False) is options.get("use_rslora", False)
    assert not config.get("use_dora")
    assert not config.get("modules_to_save")
    tensors = load_file(folder / "adapter_model.safetensors")
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        assert match, key
        factors.setdefault(match["path"], {})[match["factor"]] = tuple(tensor.shape)
    assert sorted(factors) == sorted(adapter.params)
    for path, shapes in factors.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        assert shapes == {"A": (config["r"], layer.in_features), "B": (layer.out_features, config["r"])}


def test_what_servers_refuse_is_said_in_the_saved_config(tmp_path: Path) -> None:
    model = BASES["llama"].make()
    options: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for name, more in (("bias", {"bias": "lora_only"}), ("modules_to_save", {"modules_to_save": ["norm"]})):
        folder = pf.save(pf.init(model, pf.LoraConfig(**options, **more)), tmp_path / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config[name] not in (None, "none", [])
