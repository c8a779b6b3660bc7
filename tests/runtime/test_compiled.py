"""`torch.compile` where it may break a function into several graphs: an older Dynamo does so at `apply`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import lora, mlp, trained
from torch.func import grad

import peftfn as pf


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler's
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_in_several_graphs_it_is_the_same_and_the_base_too(training: bool) -> None:
    model, batch = mlp().double().train(training), torch.randn(4, 8).double()
    adapter = trained(pf.init(model, lora("0")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def step(params: Any, batch: torch.Tensor) -> Any:
        return grad(lambda tree: pf.apply(model, adapter.replace(params=tree), batch).square().mean())(params)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(adapter.params, batch), step(adapter.params, batch))
    torch._dynamo.reset()
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in now.items())
    assert all(tensor.grad is None for tensor in model.parameters())
