"""What `init` refuses in the words of what is wrong, and the rows that it takes along."""

from __future__ import annotations

from pathlib import Path

import oracle
import peft
import pytest
import torch
import transformers
from cases import llama
from torch import Tensor, nn

import peftfn as pf


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[31\] are not there; .* are in the layers 0 to \d"):
        pf.init(llama(), pf.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 31]))
    with pytest.raises(ValueError, match=r"modules of these names are there, .* say layers_pattern=\['layers'\]"):
        pf.init(llama().model, pf.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    found = pf.init(
        llama().model, pf.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["layers"])
    )
    assert list(found.params) == ["layers.0.self_attn.q_proj"]


def test_a_base_with_an_adapter_of_pefts_in_it_is_said() -> None:
    model = llama()
    with oracle.quiet_peft():
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj' is a layer of peft's, .* peft_model\.unload\(\)"):
        pf.init(model, pf.LoraConfig(target_modules=["q_proj"]))


def test_one_weight_named_twice_is_refused_before_it_is_trained() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is named twice, as '0' and as '0\.weight'"):
        pf.init(nn.Sequential(nn.Linear(4, 4)), pf.LoraConfig(target_modules=["0"], target_parameters=["0.weight"]))


def test_unlike_dropout_in_a_stack_says_how_to_serve() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    several = [pf.init(model, pf.LoraConfig(target_modules=["0"], lora_dropout=p)) for p in (0.0, 0.1)]
    with pytest.raises(ValueError, match=r"To serve them: .*lora_dropout=0"):
        pf.stack(several)


class InPlace(nn.Module):
    """It adds to its input, which nobody maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> the same."""
        x = x + 0
        x += self.layer(x)
        return x


def test_what_a_model_adds_in_place_under_vmap_is_said() -> None:
    model = InPlace()
    stacked = pf.stack([pf.init(model, pf.LoraConfig(r=2, target_modules=["layer"]))] * 2)
    with pytest.raises(RuntimeError, match=r"adds in place to a tensor that is not mapped.* Use index="):
        torch.vmap(lambda a: pf.apply(model, a, torch.ones(2, 4)))(stacked)


def test_embeddings_that_were_resized_are_saved_along(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 6, mean_resizing=False)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.tensor([[3, 5, rows + 1, rows + 5]])
    pf.save(adapter, tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    again.resize_token_embeddings(rows + 6, mean_resizing=False)
    loaded = pf.load(tmp_path / "adapter", again)
    assert torch.equal(
        pf.apply(again, loaded, {"input_ids": ids}).logits, pf.apply(model, adapter, {"input_ids": ids}).logits
    )
