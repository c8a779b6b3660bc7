"""Old names of experts and routers, and "all-linear", mean in `init` what peft makes of them; peft's files are read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from bases import mixtral

import peftfn as pf

pytestmark = [
    oracle.by_new_peft,
    pytest.mark.skipif(oracle.IS_TRANSFORMERS_4, reason="there experts are layers"),
]


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "gate", "w2"), ("q_proj", "w1", "w2", "w3")])
def test_sites_shapes_and_outputs_are_pefts(targets: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = mixtral().eval(), torch.arange(10).view(2, 5)
    names = targets if isinstance(targets, str) else list(targets)
    with oracle.quiet_peft():
        config = peft.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        theirs.save_pretrained(tmp_path)
        expected = theirs(ids).logits
    loaded = pf.load(tmp_path, model)
    fresh = pf.init(model, pf.LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    shapes = [
        {path: {name: one.shape for name, one in leaf.items()} for path, leaf in adapter.params.items()}
        for adapter in (loaded, fresh)
    ]
    assert shapes[0] == shapes[1]
    assert {path: one["scaling"] for path, one in loaded.buffers.items()} == {
        path: one["scaling"] for path, one in fresh.buffers.items()
    }
    torch.testing.assert_close(pf.apply(model, loaded, {"input_ids": ids}).logits, expected, rtol=1e-4, atol=1e-5)


def test_half_of_a_fused_expert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names w1, which is one parameter, gate_up_proj, with w3 in this version"):
        pf.init(mixtral(), pf.LoraConfig(target_modules=["q_proj", "w1"]))
