"""GraLoRA where the tables of tests say nothing: its rank, dropout, inputs of any shape, stacks of unlike rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from safetensors.torch import load_file, save_file
from torch import nn

import peftfn as pf


def config(**options: Any) -> pf.GraloraConfig:
    return pf.GraloraConfig(**{"r": 4, "alpha": 6, "target_modules": ["0"], **options})


def model(inputs: int = 16, outputs: int = 20) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


def test_it_has_as_many_times_the_rank_as_there_are_blocks_along_a_side() -> None:
    base = model()
    adapter = oracle.randomised(pf.init(base, config()))
    change = pf.merge(dict(base.named_parameters()), adapter)["0.weight"] - base[0].weight
    assert int(torch.linalg.matrix_rank(change)) == 8
    assert pf.count(adapter).trained == 4 * (16 + 20)


def test_inputs_have_any_number_of_axes() -> None:
    """peft reads (rows, tokens, in) or (rows, in)."""
    base = model()
    adapter = oracle.randomised(pf.init(base, config(hybrid_r=2)))
    x = torch.randn(2, 3, 5, 16).double()
    assert off(pf.apply(base, adapter, x), pf.apply(base, adapter, x.flatten(0, 2)).view(2, 3, 5, 20)) < EXACT
    assert off(pf.apply(base, adapter, x[0, 0, 0]), pf.apply(base, adapter, x)[0, 0, 0]) < EXACT


def test_dropout_in_training_drops_numbers_of_the_input_for_each_product() -> None:
    base, x = nn.Sequential(nn.Linear(16, 20, bias=False)).double().train(), torch.ones(3000, 16).double()
    adapter = oracle.randomised(pf.init(base, config(hybrid_r=2, gralora_dropout=0.25)), size=0.5)
    leaf = adapter.params["0"]
    found = (pf.apply(base, adapter, x) - base(x)).detach()
    # What is found is made by both matrices of masks: it lies in what their columns span, 10 of 20 directions.
    general = 1.0 * leaf["gralora_B_general"] @ leaf["gralora_A_general"]
    blocks = pf.merge({"0.weight": torch.zeros(20, 16).double()}, adapter, model=base)["0.weight"] - general
    left = torch.linalg.svd(torch.cat([blocks, general], 1).detach())[0]
    assert float((found @ left[:, 10:]).abs().max()) < 1e-8
    assert off(found.mean(0), (blocks + general).sum(1)) < 0.2
    assert float(found.std(0).max()) > 0.1
    base.eval()
    assert off(pf.apply(base, adapter, x)[:1] - base(x)[:1], (blocks + general).sum(1)[None]) < EXACT


def test_adapters_of_unlike_rank_stack() -> None:
    base, x = model(), torch.randn(3, 16).double()
    adapters = [oracle.randomised(pf.init(base, config(r=r, alpha=2 * r, hybrid_r=1)), r) for r in (2, 6)]
    stacked = pf.stack(adapters)
    assert stacked.params["0"]["gralora_A"].shape == (2, 2, 8, 6)
    routed = pf.apply(base, stacked, x, index=[1, 0, -1])
    expected = [pf.apply(base, adapters[1], x)[0], pf.apply(base, adapters[0], x)[1], base(x)[2]]
    assert off(routed, torch.stack(expected)) < EXACT
    for one, adapter in zip(pf.unstack(stacked), adapters, strict=True):
        assert off(one.params, adapter.params) == 0.0
    other = oracle.randomised(pf.init(base, config(hybrid_r=2)))
    with pytest.raises(ValueError, match=r"hybrid_r of \['1', '2'\]; expected one value"):
        pf.stack([adapters[0], other])


def test_a_file_that_is_not_its_configs_is_refused(tmp_path: Path) -> None:
    adapter = pf.init(model(), config(hybrid_r=2))
    pf.save(adapter.replace(config=config(r=8, hybrid_r=2)), tmp_path)
    with pytest.raises(ValueError, match="rank 4, and the config says 8 for '0'"):
        pf.load(tmp_path)
    pf.save(adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: one for key, one in load_file(path).items() if "B_general" not in key}, path)
    with pytest.raises(KeyError, match="and with hybrid_r=2 there are"):
        pf.load(tmp_path)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"gralora_k=0; expected a positive integer", {"gralora_k": 0}),
        (r"r=4 is not divisible by gralora_k=3", {"gralora_k": 3}),
        (r"hybrid_r=-1; expected 0 or a positive integer", {"hybrid_r": -1}),
        (r"gralora_dropout=1.0; expected at least 0, below 1", {"gralora_dropout": 1.0}),
        (r"bias='lora_only'; expected 'none', 'all' or 'gralora_only'", {"bias": "lora_only"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        config(**options)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0: gralora_k=2 does not divide its 15 inputs and 20 outputs; .* of 5\."):
        pf.init(model(15), config())
