"""LoRA on complex layers: the imaginary part goes through the delta, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import peftfn as pf

CLOSE = 1e-12  # complex128: W x + s B A x beside (W + s B A) x
LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(4, 3, dtype=torch.complex128), torch.randn(5, 4, dtype=torch.complex128)),
    "convolution": (nn.Conv1d(4, 3, 2, dtype=torch.complex128), torch.randn(5, 4, 6, dtype=torch.complex128)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_output_and_gradient_are_those_of_the_merged_layer(kind: str, dtype: torch.dtype) -> None:
    layer, x = LAYERS[kind]
    model = nn.Sequential(layer)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), dtype=dtype)
    base = {name: one.detach() for name, one in model.named_parameters()}

    def ours(params: Any) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), x).abs().square().sum()

    def merged(params: Any) -> Tensor:
        return (
            functional_call(model, pf.merge(base, adapter.replace(params=params), model=model), (x,))
            .abs()
            .square()
            .sum()
        )

    torch.testing.assert_close(ours(adapter.params), merged(adapter.params), atol=0, rtol=CLOSE)
    torch.testing.assert_close(grad(ours)(adapter.params), grad(merged)(adapter.params), atol=0, rtol=1e-9)
