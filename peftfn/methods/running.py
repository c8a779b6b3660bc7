"""How a site with a low-rank delta runs.

Linear layers run as the Function of `adapted` where nothing but autograd looks on; under every other transform they are
plain operations (`lowrank`), as other layers always are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor  # torch has no public ones
from torch.autograd import forward_ad

from peftfn import layers
from peftfn.layers import Site
from peftfn.methods import adapted, dropout, lowrank
from peftfn.methods.adapted import Delta

_LINEAR = (layers.LINEAR, layers.TRANSPOSED)


def forward(site: Site, delta: Delta, p: float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """site(x) + s·B·A·drop(x), in the dtype of site(x); p is the probability of dropout in training."""
    affine = site.affine if site.kind in _LINEAR and _is_alone(x, delta) else None
    if affine is None:
        return add(site, delta, p, x, site(x, *args, **kwargs))
    weight, bias = affine
    seen, delta, bits = _drawn(site, delta, p, x)
    if _is_mapped(weight) or _is_mapped(bits):
        return _plain(site, delta, seen, site(x), bits)
    return adapted.linear(x, weight, bias, delta, bits)


def add(site: Site, delta: Delta, p: float, x: Tensor, y: Tensor) -> Tensor:
    """y + s·B·A·drop(x), in the dtype of y."""
    seen, delta, bits = _drawn(site, delta, p, x)
    alone = site.kind in _LINEAR and _is_alone(x, delta) and not _is_mapped(y) and not _is_mapped(bits)
    return adapted.add(x, y, delta, bits) if alone else _plain(site, delta, seen, y, bits)


def _drawn(site: Site, delta: Delta, p: float, x: Tensor) -> tuple[Tensor, Delta, Tensor | None]:
    """x after dropout, or as it is with bits that say what is dropped of it; and the delta that goes with it."""
    if not p or not site.training or not x.is_floating_point():
        return x, delta, None
    if torch.compiler.is_compiling():  # which fuses its own dropout, and keeps what is smallest
        return F.dropout(x.to(delta.a.dtype), p, training=True), delta, None
    tokens = x.numel() // max(x.shape[-1], 1)
    kept = dropout.draw(tokens, x.shape[-1], p, x.device)
    return x, delta._replace(s=delta.s * kept.scale), kept.bits


def _plain(site: Site, delta: Delta, x: Tensor, y: Tensor, bits: Tensor | None) -> Tensor:
    a, b, s = delta
    if x.is_floating_point() and (bits is not None or site.kind not in _LINEAR):
        x = x.to(a.dtype)  # the product of a linear layer takes any dtype (`widening.linear`)
    if bits is not None:
        x = x * dropout.mask(bits, x.numel() // max(x.shape[-1], 1), x.dtype).view(x.shape)
    return lowrank.TABLE[site.kind].add(site, a, b, s, x, y).to(y.dtype)


def _is_alone(x: Tensor, delta: Delta) -> bool:
    """Whether nothing but autograd, with or without torch.func, looks on at (..., in) -> (..., out)."""
    return (
        not torch.compiler.is_compiling()
        and x.dim() > 1
        and delta.a.dim() == 2
        and not torch.is_autocast_enabled(x.device.type)
        and cast("int", forward_ad._current_level) < 0  # noqa: SLF001  # torch has no public question for this
        and not any(map(_is_mapped, (x, *delta)))
    )


def _is_mapped(tensor: Tensor | None) -> bool:
    """Whether `torch.vmap` maps over an axis of it."""
    while tensor is not None and is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor):
            return True
        tensor = get_unwrapped(tensor)
    return False
