"""Modules that hold more than a `__dict__` of plain values are copied for a call, and for `bind`, as they are."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf


class Slots(nn.Module):
    """A module with an attribute outside of its `__dict__`."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "scale", 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Any -> the same shape."""
        return x * self.scale  # type: ignore[operator]


class Circle(nn.Module):
    """A module that holds a dict that holds itself, and a list that does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.named: dict[str, Any] = {"layer": layer}
        self.named["all"] = self.named
        self.several: list[Any] = [layer]
        self.several.append(self.several)

    def forward(self, x: Tensor) -> Tensor:
        """Any -> the same shape."""
        assert self.named["all"] is self.named
        assert self.several[1] is self.several
        return self.named["all"]["layer"](x) + self.several[1][0](x)


def test_slots_and_circles_are_copied_and_lead_to_the_adapted_layers() -> None:
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, Slots(), Circle(layer)), torch.randn(2, 4)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    merged = pf.merge(dict(model.named_parameters()), adapter)
    weight, bias = merged["0.weight"], merged["0.bias"]
    expected = 2 * nn.functional.linear(2 * nn.functional.linear(x, weight, bias), weight, bias)
    for found in (pf.apply(model, adapter, x), pf.bind(model, adapter)(x)):
        torch.testing.assert_close(found, expected)


def test_a_lazy_layer_is_one_clear_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy layers are new
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    try:
        pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
    except ValueError as error:
        assert str(error).startswith("1.weight has no shape yet")  # noqa: PT017  # of what the other error is
    else:
        raise AssertionError
