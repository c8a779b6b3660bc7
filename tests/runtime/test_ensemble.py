"""`ensemble`: one by one, and in numbers that are known."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from bases import BASES
from cases import texts
from torch import nn
from torch.func import functional_call

import peftfn as pf

# torch's fused attention has no rule for vmap on the CPU; it runs one by one, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

CONFIGS = {
    "lora": pf.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "with a head": pf.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": pf.IA3Config(),
    "prompt": pf.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


def members(model: nn.Module, config: pf.PeftConfig, count: int = 3) -> list[pf.Adapter]:
    return [oracle.randomised(pf.init(model, config), seed, size=0.3) for seed in range(count)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("few", [True, False], ids=["few tokens", "many tokens"])
def test_members_are_what_each_adapter_predicts(kind: str, few: bool) -> None:
    model = BASES["llama"].make()
    batch: Any = {"input_ids": texts()["input_ids"]} if few else BASES["llama"].inputs() | {"use_cache": False}
    made = members(model, CONFIGS[kind])
    found = pf.ensemble(model, pf.stack(made), batch)
    each = torch.stack([pf.apply(model, one, batch).logits for one in made])
    torch.testing.assert_close(found.logits, each, rtol=1e-5, atol=1e-5)
    chances = each.softmax(-1)
    torch.testing.assert_close(found.mean, chances.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.variance, chances.var(0, correction=0), rtol=1e-4, atol=1e-6)
    whole = torch.distributions.Categorical(probs=found.mean).entropy()
    own = torch.distributions.Categorical(probs=chances).entropy().mean(0)
    torch.testing.assert_close(found.entropy, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mutual_information, whole - own, rtol=1e-3, atol=1e-5)


def test_members_that_agree_share_no_information() -> None:
    model = BASES["llama"].make()
    one = members(model, CONFIGS["lora"])[0]
    found = pf.ensemble(model, pf.stack([one, one]), BASES["llama"].inputs())
    assert float(found.mutual_information.max()) < 1e-5
    assert float(found.variance.max()) < 1e-9


def test_members_that_are_sure_of_unlike_classes_share_all_of_it() -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    params = {"0.weight": torch.zeros(2, 1)}
    config = pf.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    fresh = pf.init(model, config)
    leaves = [{"lora_A": torch.ones(1, 1), "lora_B": torch.tensor([[sign], [-sign]])} for sign in (50.0, -50.0)]
    stacked = pf.stack([fresh.replace(params={"0": leaf}) for leaf in leaves])
    found = pf.ensemble(model, stacked, torch.ones(1, 1), params=params)
    assert functional_call(model, params, torch.ones(1, 1)).abs().max() == 0
    torch.testing.assert_close(found.mean, torch.full((1, 2), 0.5))
    torch.testing.assert_close(found.mutual_information, torch.tensor([2.0]).log())


def test_what_is_no_stack_or_no_classifier_is_one_clear_error() -> None:
    model = BASES["llama"].make()
    one = members(model, CONFIGS["lora"])[0]
    with pytest.raises(TypeError, match=r"no stack of adapters; expected peftfn\.stack"):
        pf.ensemble(model, one, BASES["llama"].inputs())
    inner: Any = model
    stacked = pf.stack([pf.init(inner.model, CONFIGS["lora"])] * 2)
    with pytest.raises(TypeError, match="without logits; expected a classifier's output"):
        pf.ensemble(inner.model, stacked, BASES["llama"].inputs())
