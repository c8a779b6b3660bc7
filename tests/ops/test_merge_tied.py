"""Merging into a weight that the model ties: the result computes what `apply` does, or merge refuses it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from bases import BASES
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf
from peftfn import LoraConfig

EXACT = 1e-12  # float64, and the same product either way
IDS = torch.tensor([[3, 5, 7, 9]])
ENDS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "output layer": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max().detach())


def made(end: str) -> tuple[Any, pf.Adapter]:
    torch.manual_seed(0)
    model = BASES["llama tied"].make().double().eval()
    return model, oracle.randomised(pf.init(model, LoraConfig(r=2, **ENDS[end])))


@pytest.mark.parametrize("end", ENDS)
def test_with_the_model_every_set_of_names_gives_what_apply_does(end: str) -> None:
    model, adapter = made(end)
    expected = pf.apply(model, adapter, {"input_ids": IDS}).logits
    assert off(expected, model(IDS).logits) > 1e-3
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    one = dict(model.named_parameters())
    head_alone = {head if name == embedding else name: tensor for name, tensor in one.items()}
    for params in (one, head_alone, dict(model.named_parameters(remove_duplicate=False)), model.state_dict()):
        before = dict(params)
        merged = pf.merge(params, adapter, model=model)
        assert list(params.items()) == list(before.items())
        assert off(pf.apply(model, (), {"input_ids": IDS}, params=merged).logits, expected) < EXACT
        assert off(functional_call(model, merged, (IDS,), tie_weights=False).logits, expected) < EXACT
        if end != "both":  # the untouched end is the same tensor object
            kept = head if "embedding" in end else embedding
            assert any(merged[kept] is params[name] for name in (embedding, head) if name in params)


TOKENS = {"token_indices": [3, 7]}


@pytest.mark.parametrize("order", ["lora, then tokens", "tokens, then lora", "one config"])
def test_trained_tokens_follow_a_tied_weight_that_a_lora_has_parted(order: str) -> None:
    model, lora = made("embedding")
    tokens = oracle.randomised(pf.init(model, pf.TrainableTokensConfig(**TOKENS)))
    both = LoraConfig(r=2, **ENDS["embedding"], trainable_token_indices=TOKENS["token_indices"])
    several: dict[str, Any] = {
        "lora, then tokens": (lora, tokens),
        "tokens, then lora": (tokens, lora),
        "one config": oracle.randomised(pf.init(model, both)),
    }
    expected = pf.apply(model, several[order], {"input_ids": IDS}).logits
    for params in (dict(model.named_parameters()), model.state_dict()):
        merged = pf.merge(params, several[order], model=model)
        assert off(pf.apply(model, (), {"input_ids": IDS}, params=merged).logits, expected) < EXACT
    if order == "lora, then tokens":
        head, table = merged["lm_head.weight"], merged["model.embed_tokens.weight"]
        assert torch.equal(head[[3, 7]], table[[3, 7]])
        assert torch.equal(head[0], model.lm_head.weight[0]) and not torch.equal(head[0], table[0])


def test_a_weight_that_stays_tied_gets_no_name_that_was_not_given() -> None:
    model = BASES["llama tied"].make()
    params = dict(model.named_parameters())
    merged = pf.merge(
        params, oracle.randomised(pf.init(model, LoraConfig(r=2, target_modules=["q_proj"]))), model=model
    )
    assert merged.keys() == params.keys()


@pytest.mark.parametrize("end", ENDS)
def test_without_the_model_a_state_dict_of_tied_weights_is_refused(end: str) -> None:
    model, adapter = made(end)
    for params in (model.state_dict(), dict(model.named_parameters(remove_duplicate=False))):
        with pytest.raises(ValueError, match=r"load_state_dict of the result .* would keep one .* Pass model=model"):
            pf.merge(params, adapter)
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # as of a model that does not tie
    merged = pf.merge(untied, adapter)
    expected = pf.apply(model, adapter, {"input_ids": IDS}).logits
    assert off(functional_call(model, merged, (IDS,), tie_weights=False).logits, expected) < EXACT


def test_what_merge_recommends_for_tied_weights_is_right(tmp_path: Path) -> None:
    model, adapter = made("embedding")
    expected = pf.apply(model, adapter, {"input_ids": IDS}).logits
    pf.bind(model, adapter).save_pretrained(tmp_path / "plain", merge=True)
    again = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float64).eval()
    assert off(again(IDS).logits, expected) < EXACT
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        """Both in turn."""
        return self.second(self.first(x))


def test_one_module_under_two_names_is_merged_under_both_or_refused() -> None:
    model, x = Shared().double(), torch.randn(3, 4).double()
    adapter = oracle.randomised(pf.init(model, LoraConfig(r=2, target_modules=["first"])))
    with pytest.raises(ValueError, match=r"'first\.weight' and 'second\.weight'"):
        pf.merge(model.state_dict(), adapter)
    plain = copy.deepcopy(model)
    plain.load_state_dict(pf.merge(model.state_dict(), adapter, model=model))
    assert off(plain(x), pf.apply(model, adapter, x)) < EXACT
