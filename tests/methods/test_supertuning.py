"""Super-Tuning where the tables of tests say nothing: which numbers, files without them, dropout, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
from exact import EXACT, off
from safetensors.torch import load_file
from torch import nn

import peftfn as pf


def config(**options: Any) -> pf.SupertuningConfig:
    return pf.SupertuningConfig(**{"sparsity": 0.75, "target_modules": ["0"], **options})


def model(inputs: int = 8, outputs: int = 6) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs)).double()


@oracle.by_new_peft
@pytest.mark.parametrize("top", [True, False])
def test_the_largest_or_the_smallest_numbers_are_trained(top: bool) -> None:
    base = model()
    adapter = oracle.randomised(pf.init(base, config(select_top=top)))
    changed = pf.merge(dict(base.named_parameters()), adapter)["0.weight"] != base[0].weight
    sizes = base[0].weight.abs()
    assert int(changed.sum()) == 12
    assert bool(sizes[changed].min() >= sizes[~changed].max() if top else sizes[changed].max() <= sizes[~changed].min())
    with oracle.quiet_peft():
        other = peft.get_peft_model(model(), peft.SupertuningConfig(**vars_of(config(select_top=top))))
    theirs = other.base_model.model[0].supertuning_indices["default"]
    assert torch.equal(adapter.buffers["0"]["supertuning_indices"], theirs)


def vars_of(given: pf.SupertuningConfig) -> dict[str, Any]:
    return {name: getattr(given, name) for name in ("sparsity", "select_top")} | {"target_modules": ["0"]}


@oracle.by_new_peft
def test_a_file_without_places_needs_the_model(tmp_path: Path) -> None:
    base, x = model(), torch.randn(3, 8).double()
    adapter = oracle.randomised(pf.init(base, config(save_precomputed_indices=False)))
    pf.save(adapter, tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.model.0.supertuning_values"]
    with pytest.raises(ValueError, match=r"save_precomputed_indices=False: .* Pass the model: peftfn"):
        pf.load(tmp_path)
    again = pf.load(tmp_path, base)
    assert torch.equal(pf.apply(base, again, x), pf.apply(base, adapter, x))
    theirs = oracle.loaded(base, tmp_path, autocast_adapter_dtype=False)
    assert off(theirs(x), pf.apply(base, adapter, x)) < EXACT


def test_dropout_drops_what_the_lora_is_given_alone() -> None:
    base, x = model().train(), torch.ones(2000, 8).double()
    adapter = oracle.randomised(pf.init(base, config(r=2, lora_dropout=0.25)))
    leaf = adapter.params["0"]
    low_rank = leaf["supertuning_lora_B"] @ leaf["supertuning_lora_A"] * 2
    sparse = pf.merge(dict(base.named_parameters()), adapter)["0.weight"] - base[0].weight - low_rank
    found = pf.apply(base, adapter, x) - base(x) - x @ sparse.T
    kept = torch.linalg.lstsq(leaf["supertuning_lora_B"], found.T).solution
    assert off(leaf["supertuning_lora_B"] @ kept, found.T) < 1e-9
    assert off(found.mean(0), low_rank.sum(1)) < 0.2
    assert off(pf.apply(base.eval(), adapter, x) - base(x), x @ (sparse + low_rank).T) < EXACT


def test_adapters_of_unlike_rank_stack_where_all_have_one() -> None:
    base, x = model(), torch.randn(2, 8).double()
    adapters = [oracle.randomised(pf.init(base, config(r=r)), r) for r in (1, 3)]
    routed = pf.apply(base, pf.stack(adapters), x, index=[1, 0])
    assert off(routed, torch.stack([pf.apply(base, adapters[1 - row], x)[row] for row in (0, 1)])) < EXACT
    with pytest.raises(ValueError, match="the adapters hold different tensors at 0"):
        pf.stack([adapters[0], pf.init(base, config())])


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"sparsity=1.0; expected a share of at least 0 and below 1", {"sparsity": 1.0}),
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"lora_alpha=4 needs r beside it", {"lora_alpha": 4}),
        (r"lora_dropout=1.0; expected a probability", {"lora_dropout": 1.0}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        config(**options)


def test_it_needs_weights_and_something_to_train() -> None:
    with pytest.raises(ValueError, match=r"0: sparsity=0\.99 leaves none of its 48 numbers to train"):
        pf.init(model(), config(sparsity=0.99))
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0: Super-Tuning trains the largest numbers of a weight"):
        pf.init(base, config())
