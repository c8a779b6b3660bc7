"""GLoRA where the registry says nothing: every form against peft, layers without a bias, zeros in files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import quantized
import safetensors.torch
import torch
from exact import EXACT, off
from torch import nn
from torch.func import functional_call, vmap

import peftfn as pf

FORMS = [
    ("lora", "lora", "constant"),
    ("vector", "vector", "vector"),
    ("constant", "none", "none"),
    ("none", "lora", "vector"),
    ("none", "none", "constant"),
    ("vector", "none", "constant"),
]


@oracle.by_new_peft
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_every_form_is_pefts(has_bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6, bias=has_bias)).double(), torch.randn(3, 8).double()
    for number, (a_b, c, d_e) in enumerate(
        FORMS if has_bias else [("lora", "lora", "vector"), ("vector", "none", "none")]
    ):
        options: Any = {"config_A_B": a_b, "config_C": c, "config_D_E": d_e}
        config = pf.GloraConfig(r=2, target_modules=["0"], **options)
        fresh = pf.init(model, config, dtype=torch.float64)
        assert torch.equal(pf.apply(model, fresh, x), model(x))
        adapter = oracle.randomised(fresh)
        folder = pf.save(adapter, tmp_path / str(number))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # missing keys are one
            other = oracle.loaded(model, folder, autocast_adapter_dtype=False)
        assert off(pf.apply(model, adapter, x), other(x)) < EXACT
        merged = pf.merge(dict(model.named_parameters()), adapter)
        assert off(functional_call(model, merged, (x,)), other(x)) < EXACT
        other.save_pretrained(tmp_path / "theirs")
        read = pf.load(tmp_path / "theirs", model)
        assert {name: one.tolist() for name, one in read.buffers.get("0", {}).items()} == {
            name: one.tolist() for name, one in adapter.buffers.get("0", {}).items()
        }
        assert off(read.params, adapter.params) == 0.0
        assert (
            safetensors.torch.load_file(folder / "adapter_model.safetensors").keys()
            == safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
        )


def test_numbers_in_the_place_of_zeros_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    pf.save(pf.init(model, pf.GloraConfig(target_modules=["0"], config_A_B="none")), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["base_model.model.0.glora_A.zeros"][2, 3] = 1.0
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"glora_A\.zeros with numbers that are not 0"):
        pf.load(tmp_path)


def test_a_layer_with_nothing_to_train_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    with pytest.raises(ValueError, match="0: nothing is left to train there"):
        pf.init(model, pf.GloraConfig(target_modules=["0"], config_A_B="none"))


def test_an_adapter_for_a_bias_does_not_fit_a_layer_without_one() -> None:
    adapter = pf.init(nn.Sequential(nn.Linear(8, 6)), pf.GloraConfig(r=2, target_modules=["0"]))
    bare = nn.Sequential(nn.Linear(8, 6, bias=False))
    with pytest.raises(ValueError, match=r"glora_C_Xd.*expected glora_A_Xd"):
        pf.apply(bare, adapter, torch.randn(2, 8))


def test_merging_needs_the_bias_that_it_changes() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    adapter = pf.init(model, pf.GloraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="changes the layer's bias too, and it is not among the parameters"):
        pf.merge({"0.weight": model[0].weight}, adapter)


def test_unlike_ranks_stack_and_rows_are_routed() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(3, 8).double()
    made = [oracle.randomised(pf.init(model, pf.GloraConfig(r=r, target_modules=["0"])), r) for r in (2, 4)]
    stacked = pf.stack(made)
    together = vmap(lambda one: pf.apply(model, one, x))(stacked)
    routed = pf.apply(model, stacked, x, index=[1, -1, 0])
    for number, adapter in enumerate(made):
        assert off(together[number], pf.apply(model, adapter, x)) < EXACT
    assert off(routed[0], together[1][0]) < EXACT
    assert torch.equal(routed[1], model(x)[1])


def test_a_packed_weight_is_read_and_a_fresh_adapter_leaves_it() -> None:
    model = quantized.packed(nn.Sequential(nn.Linear(64, 32)), "nf4")
    x = torch.randn(3, 64)
    fresh = pf.init(model, pf.GloraConfig(r=2, target_modules=["0"]))
    assert torch.equal(pf.apply(model, fresh, x), pf.apply(model, (), x))
    adapter = oracle.randomised(fresh)
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    expected = x @ merged["0.weight"].T + merged["0.bias"]
    torch.testing.assert_close(pf.apply(model, adapter, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"config_A_B='all'; expected one of lora, vector, constant, none", {"config_A_B": "all"}),
        (r"config_C='constant'; expected one of lora, vector, none", {"config_C": "constant"}),
        (r"config_D_E='lora'; expected one of vector, constant, none", {"config_D_E": "lora"}),
        (r"bias='lora_only'; expected 'none', 'all' or 'glora_only'", {"bias": "lora_only"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.GloraConfig(**options)
