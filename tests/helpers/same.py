"""What tests of files share: small adapters, and what it means that they, or folders, are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import randomised
from torch import Tensor, nn

import peftfn as pf


def flat(adapter: pf.Adapter) -> dict[str, Tensor]:
    trees = {"params": adapter.params, "buffers": adapter.buffers}
    return {f"{kind} {p} {n}": t for kind, tree in trees.items() for p, leaf in tree.items() for n, t in leaf.items()}


def assert_same(one: pf.Adapter, other: pf.Adapter) -> None:
    """Bit for bit, in the same order, config and all."""
    assert one.config == other.config
    assert one.config.to_json() == other.config.to_json()
    assert_same_tensors(flat(one), flat(other))


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert bits(tensor).equal(bits(other[name])), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def adapter_of(model: nn.Module, **options: Any) -> pf.Adapter:
    given: dict[str, Any] = {"r": 2, "target_modules": ["0"], **options}
    return randomised(pf.init(model, pf.LoraConfig(**given)))


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_says(caught: pytest.ExceptionInfo[BaseException], said: str) -> None:
    kind, _, words = said.partition(": ")
    assert type(caught.value).__name__ == kind
    assert words in caught.value.args[0]
