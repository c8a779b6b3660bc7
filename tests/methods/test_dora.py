"""DoRA where peft says nothing, or something else."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from exact import EXACT, off
from torch import nn

import peftfn as pf


def model_and_batch() -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).double(), torch.randn(5, 12).double()


def config(**options: Any) -> pf.LoraConfig:
    return pf.LoraConfig(**{"r": 2, "target_modules": ["0", "2"], "use_dora": True, **options})


def test_dropout_drops_what_the_base_is_given_too_where_the_gain_scales_it() -> None:
    """PEFT: y + (g - 1) ∘ W drop(x) + g ∘ s·B·A drop(x), one mask for both."""
    model, x = model_and_batch()
    model, x = nn.Sequential(model[0]).train(), torch.ones(4000, 12).double()
    adapter = oracle.randomised(pf.init(model, config(target_modules=["0"], lora_dropout=0.25)))
    leaf, weight = adapter.params["0"], model[0].weight
    delta = adapter.buffers["0"]["scaling"] * leaf["lora_B"] @ leaf["lora_A"]
    gain = leaf["lora_magnitude_vector"] / torch.linalg.vector_norm(weight + delta, dim=1)
    kept = [torch.zeros(12, dtype=torch.float64).index_fill(0, torch.tensor([one]), 1 / 0.75) for one in range(12)]
    found = pf.apply(model, adapter, x) - model(x)
    # What is found is linear in the mask: solve for it, and see that it is one of zeros and 4/3.
    columns = torch.stack([(gain - 1) * (weight @ one) + gain * (delta @ one) for one in kept], 1)
    masks = torch.linalg.lstsq(columns, found.T).solution
    assert off(masks.round(), masks) < 1e-8
    assert set(masks.round().flatten().tolist()) == {0.0, 1.0}
    assert abs(float(masks.detach().mean()) - 0.75) < 0.02
    assert torch.equal(pf.apply(model.eval(), adapter, x), pf.apply(model, adapter, x))


def test_two_dora_adapters_are_the_second_one_on_the_first_ones_weights() -> None:
    """peft takes the norm of each alone and the base's result of both, so that their order matters."""
    model, x = model_and_batch()
    one, other = (oracle.randomised(pf.init(model, config(r=r)), seed) for seed, r in ((1, 2), (2, 3)))
    merged = pf.merge(dict(model.named_parameters()), one)
    torch.testing.assert_close(pf.apply(model, (one, other), x), pf.apply(model, other, x, params=merged))
    torch.testing.assert_close(
        torch.func.functional_call(model, pf.merge(merged, other), (x,)), pf.apply(model, (one, other), x)
    )


def test_a_lora_and_a_dora_adapter_are_two_methods() -> None:
    model, _ = model_and_batch()
    plain, dora = pf.init(model, config(use_dora=False)), pf.init(model, config())
    with pytest.raises(ValueError, match=r"\['LoraConfig', 'LoraConfig with use_dora'\]; expected single adapters"):
        pf.stack([plain, dora])
    with pytest.raises(ValueError, match=r"LoraConfig with use_dora has no weighted combination"):
        pf.combine([dora, dora], [0.5, 0.5], method="linear")


def test_the_start_of_the_magnitude_needs_the_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="0: use_dora starts from the norms of the weight"):
        pf.init(model, config(target_modules=["0"]))


def test_a_start_that_is_not_the_identity_has_the_norms_of_the_sum() -> None:
    model, x = model_and_batch()
    adapter = pf.init(model, config(init_lora_weights=False))
    plain = adapter.replace(
        config=config(use_dora=False),
        buffers={path: {"scaling": leaf["scaling"]} for path, leaf in adapter.buffers.items()},
        params={
            path: {name: one for name, one in leaf.items() if name != "lora_magnitude_vector"}
            for path, leaf in adapter.params.items()
        },
    )
    assert off(pf.apply(model, adapter, x), pf.apply(model, plain, x)) < EXACT


def test_experts_are_refused() -> None:
    from cases import Experts

    with pytest.raises(ValueError, match=r"up: LoRA cannot act on a weight that the base reads itself|use_dora"):
        pf.init(nn.Sequential(Experts()), config(target_modules=None, target_parameters=["0.up"]))
