"""What would compute something else without a word, and says so instead; and what the base keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf


def linear() -> tuple[nn.Module, pf.Adapter]:
    model = nn.Sequential(nn.Linear(4, 4))
    return model, pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))


def times(adapter: pf.Adapter, factor: Tensor) -> pf.Adapter:
    return adapter.replace(
        params={path: {name: t * factor for name, t in leaf.items()} for path, leaf in adapter.params.items()}
    )


def test_bind_refuses_tensors_that_were_computed() -> None:
    model, adapter = linear()
    factor = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"of an adapter that was computed .* Use peftfn\.apply"):
        pf.bind(model, times(adapter, factor))
    with pytest.raises(ValueError, match=r"of an adapter that was computed"):
        torch.func.grad(lambda f: pf.bind(model, times(adapter, f))(torch.ones(2, 4)).sum())(torch.ones(()))
    pf.bind(model, times(adapter, factor.detach()))
    computed = times(adapter, factor)
    with torch.no_grad():  # nobody asks for gradients: to generate with a stack of trained adapters
        pf.bind(model, computed)
    pf.leaves(adapter)
    pf.bind(model, adapter)


def test_replicas_of_a_bound_module_are_refused() -> None:
    model, adapter = linear()
    bound: Any = pf.bind(model, adapter)
    with pytest.raises(NotImplementedError, match=r"^nn\.DataParallel copies modules .* DistributedDataParallel"):
        bound._replicate_for_data_parallel()


def test_a_batchnorm_that_is_trained_along_points_to_bind() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"1: the adapter trains this BatchNorm1d, .* Train through peftfn\.bind"):
        pf.apply(model, adapter, x)
    bound: Any = pf.bind(model, adapter)
    bound(x)
    assert bound[1].running_mean.any()
    model[1].eval()
    pf.apply(model, adapter, x)
    with torch.no_grad():
        pf.apply(model.eval(), adapter, x)


class Widens(nn.Module):
    """A forward that sets the dtype of its layer, as the routers of Switch Transformers and NLLB-MoE do."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> (rows, 4)."""
        self.classifier = self.classifier.to(torch.float32)
        return self.classifier(x.float()).to(x.dtype)


def test_a_forward_that_converts_its_layer_converts_none_of_the_bases() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Widens()).bfloat16().requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    before, kinds = snapshot(model), {name: (p.dtype, id(p)) for name, p in model.named_parameters()}
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
    pf.apply(model, adapter, x)
    assert snapshot(model) == before
    assert {name: (p.dtype, id(p)) for name, p in model.named_parameters()} == kinds


class Averages(nn.Module):
    """A forward that writes to a buffer, in evaluation too."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> (rows, 4)."""
        y = self.lin(x)
        self.mean.lerp_(y.detach().mean(0), 0.1)
        return y - self.mean


def test_buffers_that_are_given_by_name_are_not_written_to() -> None:
    model = Averages().eval()
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["lin"]))
    given = model.state_dict()
    found = pf.apply(model, adapter, torch.ones(2, 4), params=given)
    assert not given["mean"].any()
    assert torch.equal(found, pf.apply(model, adapter, torch.ones(2, 4)))
