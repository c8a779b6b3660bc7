"""DeLoRA where the registry says nothing: lengths, files, padding, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
from exact import EXACT, off
from torch import nn
from torch.func import grad, vmap

import peftfn as pf


def one_layer(**options: Any) -> tuple[nn.Module, torch.Tensor, pf.Adapter]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5)).double(), torch.randn(3, 8).double()
    adapter = pf.init(model, pf.DeloraConfig(target_modules=["0"], **{"r": 3, **options}), dtype=torch.float64)
    return model, x, oracle.randomised(adapter)


def test_each_part_of_the_update_has_a_length_of_lambda_over_r() -> None:
    model, x, adapter = one_layer(delora_lambda=6)
    leaf, weight = adapter.params["0"], model[0].weight.detach()
    update = torch.zeros_like(weight)
    for number in range(3):
        part = torch.outer(leaf["delora_B"][:, number], leaf["delora_A"][number])
        update += float(leaf["delora_lambda"]) / 3 * part / part.norm()
    expected = x @ (weight + update * weight.norm(dim=0)).T + model[0].bias
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    other = pf.apply(model, adapter, x, params={**dict(model.named_parameters()), "0.weight": 0 * weight})
    assert off(other, x @ (update * weight.norm(dim=0)).T + model[0].bias) < EXACT, "the lengths are kept"


def test_a_file_has_the_lengths_and_one_without_them_is_refused(tmp_path: Path) -> None:
    _, _, adapter = one_layer()
    pf.save(adapter, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    assert off(tensors["base_model.model.0.delora_w_norm"], adapter.buffers["0"]["delora_w_norm"]) == 0.0
    read = pf.load(tmp_path)
    assert off(read.buffers, adapter.buffers) == 0.0
    assert off(read.params, adapter.params) == 0.0
    safetensors.torch.save_file({key: one for key, one in tensors.items() if "w_norm" not in key}, file)
    with pytest.raises(KeyError, match=r"DeLoRA has .*delora_w_norm"):
        pf.load(tmp_path)


def test_unlike_ranks_and_lambdas_stack_and_padding_stays_nothing() -> None:
    model, x, first = one_layer(r=2, delora_lambda=3)
    second = one_layer(r=5, lambda_pattern={"0": 9}, rank_pattern={"0": 4})[2]
    assert abs(float(second.params["0"]["delora_lambda"]) - 9) < 1
    stacked = pf.stack([first, second])
    together = vmap(lambda one: pf.apply(model, one, x))(stacked)
    routed = pf.apply(model, stacked, x, index=[1, -1, 0])
    value = lambda params, one: pf.apply(model, one.replace(params=params), x).square().sum()  # noqa: E731
    gradients = vmap(grad(value))(stacked.params, stacked)["0"]
    for number, adapter in enumerate([first, second]):
        assert off(together[number], pf.apply(model, adapter, x)) < EXACT
        alone = grad(value)(adapter.params, adapter)["0"]
        rank = adapter.params["0"]["delora_A"].shape[0]
        assert off(gradients["delora_A"][number, :rank], alone["delora_A"]) < EXACT
    assert bool((gradients["delora_A"][0, 2:] == 0).all())
    assert bool((gradients["delora_B"][0, :, 2:] == 0).all())
    assert torch.equal(routed[1], model(x)[1])
    assert off(routed[0], together[1][0]) < EXACT
    assert [one.config for one in pf.unstack(stacked)] == [first.config, second.config]


def test_dropout_is_on_what_the_update_is_given() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(1, 1, bias=False)).train(), torch.ones(4000, 1)
    adapter = oracle.randomised(pf.init(model, pf.DeloraConfig(r=1, module_dropout=0.25, target_modules=["0"])))
    whole = pf.apply(model.eval(), adapter, x) - model(x)
    share = (pf.apply(model.train(), adapter, x) - model(x)) / whole
    kept = share > 0.5
    torch.testing.assert_close(share, kept * (4 / 3), rtol=0, atol=1e-3)
    assert 0.7 < float(kept.float().mean()) < 0.8


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"r=0; expected a positive integer", {"r": 0}),
        (r"module_dropout=1.0; expected a probability", {"module_dropout": 1.0}),
        (r"bias='lora_only'; expected 'none', 'all' or 'delora_only'", {"bias": "lora_only"}),
        (r"lambda_pattern=.*is no regex", {"lambda_pattern": {"(": 2.0}}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.DeloraConfig(**options)


def test_the_start_needs_the_weights_and_patterns_need_a_site() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0: DeLoRA starts from the lengths of the weight's columns"):
        pf.init(model, pf.DeloraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="lambda_pattern has '7'"):
        pf.init(nn.Sequential(nn.Linear(4, 4)), pf.DeloraConfig(target_modules=["0"], lambda_pattern={"7": 2}))
