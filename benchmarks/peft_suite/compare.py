"""Whether two tensors, two models or two adapters are the same, and by how much not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import peftfn as pf
from peft_suite.verdicts import WrongError

SHARE = 1e-4
"""peft's tests ask for `rtol=1e-4` of outputs: here of the largest number, against float64."""
FACTOR = 10.0
"""How many times as far from float64 as peft's own float32 a result may be, where that is further."""


def close(what: str, ours: Tensor, truth: Tensor, reference: Tensor | None = None, *, share: float = SHARE) -> None:
    """Raise where `ours` is further from the truth than its dtype, and the reference, explain."""
    if tuple(ours.shape) != tuple(truth.shape):
        raise WrongError(f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    ours, truth = ours.detach().double(), truth.detach().double()
    if not bool(torch.isfinite(truth).all()):
        if not torch.equal(torch.isfinite(ours), torch.isfinite(truth)):
            raise WrongError(f"{what}: not finite elsewhere than the reference")
        return
    if reference is not None and not bool(torch.isfinite(reference).all()):
        return  # the numbers are too large for the dtype
    off = _largest(ours - truth)
    own = 0.0 if reference is None else _largest(reference.detach().double() - truth)
    allowed = max(share * _largest(truth), FACTOR * own, 1e-12)
    if not off <= allowed:
        raise WrongError(f"{what}: off by {off:.2g} of {_largest(truth):.2g}; the reference by {own:.1g}")


def differ(what: str, one: Tensor, other: Tensor) -> None:
    """Raise where they are the same: then a comparison of the two has shown nothing."""
    if torch.equal(one.detach().double(), other.detach().double()):
        raise WrongError(f"{what}: changes nothing")


def same(what: str, ours: Tensor, expected: Tensor) -> None:
    """Raise where they are not the same bits."""
    if tuple(ours.shape) != tuple(expected.shape) or ours.dtype != expected.dtype:
        raise WrongError(f"{what}: {ours.dtype} {tuple(ours.shape)}, expected {expected.dtype} {tuple(expected.shape)}")
    if not torch.equal(ours, expected):
        off = _largest((ours.double() - expected.double()).detach())
        raise WrongError(f"{what}: not the same bits, off by {off:.2g}")


def equal(what: str, ours: object, expected: object) -> None:
    """Raise where two plain values differ."""
    if ours != expected:
        raise WrongError(f"{what}: {_short(ours)}, expected {_short(expected)}")


def adapters(what: str, ours: pf.Adapter, expected: pf.Adapter, reference: pf.Adapter | None = None) -> None:
    """Raise where trained tensors differ by more than rounding."""
    equal(f"{what}, sites", names(ours), names(expected))
    largest = max(_largest(tensor.double()) for _, tensor in items(expected))
    for path, tensor in items(ours):
        truth = expected.params[path[0]][path[1]]
        own = None if reference is None else reference.params[path[0]][path[1]]
        floor = SHARE * largest / max(_largest(truth.double()), 1e-30)
        close(f"{what}, {'.'.join(path)}", tensor, truth, own, share=max(SHARE, min(floor, 1e30)))


def identical(what: str, ours: pf.Adapter, expected: pf.Adapter) -> None:
    """Raise where trained tensors are not the same bits."""
    equal(f"{what}, sites", names(ours), names(expected))
    for path, tensor in items(ours):
        same(f"{what}, {'.'.join(path)}", tensor, expected.params[path[0]][path[1]])


def items(adapter: pf.Adapter) -> list[tuple[tuple[str, str], Tensor]]:
    """Its trained tensors, with site and name."""
    return [((site, name), t.detach()) for site, leaf in adapter.params.items() for name, t in leaf.items()]


def names(adapter: pf.Adapter) -> dict[str, list[str]]:
    """Its sites and the names there."""
    return {site: sorted(leaf) for site, leaf in sorted(adapter.params.items())}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a module holds."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def untouched(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Raise where a module is not what it was, or has been given gradients."""
    now = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    equal("the base's names", sorted(now), sorted(before))
    for name, tensor in before.items():
        same(f"the base's {name}", now[name].detach(), tensor)
        if now[name].grad is not None:
            raise WrongError(f"the base's {name} was given a gradient")


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 160 else text[:157] + "..."
