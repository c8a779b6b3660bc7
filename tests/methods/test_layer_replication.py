"""Layers repeated, as a view: what peft computes of it, and a merge that is right, which peft's is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from bases import BASES, ids
from exact import EXACT, off
from oracle import quiet_peft
from snapshot import snapshot
from torch import nn
from torch.func import functional_call, grad

import peftfn as pf

RANGES = [[0, 2], [0, 1], [1, 2]]  # layers 0, 1, 0, 1
OPTIONS: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def base() -> nn.Module:
    return BASES["llama"].make().double().eval()


def theirs(model: nn.Module, folder: Path) -> Any:
    with quiet_peft():
        return peft.PeftModel.from_pretrained(
            copy.deepcopy(model), str(folder), is_trainable=True, autocast_adapter_dtype=False
        ).eval()


def test_outputs_gradients_and_files_are_pefts_and_the_base_stays(tmp_path: Path) -> None:
    model, batch = base(), {"input_ids": ids(3, 7)}
    before = snapshot(model)
    view = pf.replicate_layers(model, RANGES)
    adapter = oracle.randomised(pf.init(view, pf.LoraConfig(**OPTIONS)))
    pf.apply(view, adapter, batch)
    assert snapshot(model) == before
    assert len(adapter.params) == 8
    other = theirs(model, pf.save(adapter, tmp_path / "ours"))
    expected = other(**batch).logits
    assert off(pf.apply(view, adapter, batch).logits, expected) < EXACT
    expected.square().mean().backward()
    ours = grad(lambda p: pf.apply(view, adapter.replace(params=p), batch).logits.square().mean())(adapter.params)
    for path, leaf in ours.items():
        layer = other.base_model.model.get_submodule(path)
        assert off(leaf["lora_A"], layer.lora_A["default"].weight.grad) < EXACT
    with quiet_peft():
        other.save_pretrained(tmp_path / "theirs")
    again = pf.load(tmp_path / "theirs", view)
    assert off(again.params, adapter.params) == 0.0


def test_each_place_is_merged_by_itself(tmp_path: Path) -> None:
    model, batch = base(), {"input_ids": ids(3, 7)}
    view = pf.replicate_layers(model, RANGES)
    adapter = oracle.randomised(pf.init(view, pf.LoraConfig(**OPTIONS)))
    expected = pf.apply(view, adapter, batch).logits
    merged = pf.merge(dict(view.named_parameters()), adapter, model=view)
    assert off(functional_call(view, merged, (), batch).logits, expected) < EXACT
    with quiet_peft():
        theirs_merged = theirs(model, pf.save(adapter, tmp_path)).merge_and_unload()
        assert off(theirs_merged(**batch).logits, expected) > 1e-3  # every place's change is in the one shared weight


def test_the_view_runs_the_layers_in_order_and_shares_their_memory() -> None:
    model, x = base(), torch.randn(2, 5, 16, dtype=torch.float64)
    view = pf.replicate_layers(model, RANGES)
    place = torch.arange(5)[None]
    rotary = model.model.rotary_emb(x, place)
    expected = x
    for number in (0, 1, 0, 1):
        expected = model.model.layers[number](expected, position_embeddings=rotary)
    expected = model.lm_head(model.model.norm(expected))
    assert off(view(inputs_embeds=x).logits, expected) < EXACT
    for place, number in enumerate((0, 1, 0, 1)):
        own, shared = (one.model.layers[at].mlp.up_proj.weight for one, at in ((view, place), (model, number)))
        assert own.data_ptr() == shared.data_ptr()
        assert not own.requires_grad


def test_a_bound_view_generates_with_its_cache() -> None:
    view = pf.replicate_layers(base(), RANGES)
    bound = pf.bind(view, oracle.randomised(pf.init(view, pf.LoraConfig(**OPTIONS)))).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 40}
    text = ids(2, 5)
    given = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    assert bound.generate(**given, **options).equal(bound.generate(**given, use_cache=False, **options))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_layers_are_found_where_peft_finds_them(name: str) -> None:
    model = BASES[name].make()
    if name == "gpt2":
        with pytest.raises(ValueError, match="none can be repeated"):
            pf.replicate_layers(model, RANGES)
        return
    view = pf.replicate_layers(model, RANGES)
    assert len(view.bert.encoder.layer) == 4
    assert view(ids(2, 5))[0].shape == model(ids(2, 5))[0].shape


def test_a_base_that_repeats_other_layers_is_refused(tmp_path: Path) -> None:
    model = base()
    view = pf.replicate_layers(model, RANGES)
    adapter = pf.init(view, pf.LoraConfig(**OPTIONS))
    folder = pf.save(adapter, tmp_path)
    for other in (model, pf.replicate_layers(model, [[0, 2], [0, 2], [0, 1]])):
        with pytest.raises(ValueError, match=r"peftfn\.replicate_layers\(model, \[\[0, 2\], \[0, 1\], \[1, 2\]\]\)"):
            pf.load(folder, other)
    with pytest.raises(ValueError, match="as its base"):
        pf.init(model, pf.LoraConfig(**OPTIONS, layer_replication=RANGES))
    with pytest.raises(ValueError, match="that it made"):
        pf.replicate_layers(view, RANGES)
    for wrong in ([[0, 3]], [], [[1, 1]], [[-1, 1]]):
        with pytest.raises(ValueError, match="expected ranges"):
            pf.replicate_layers(model, wrong)
