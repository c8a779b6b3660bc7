"""`ensemble`: predictions of K adapters over one base, their mean, and how much they disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn import methods
from peftfn.core.adapter import UNKNOWN, Adapter
from peftfn.core.transforms import is_traced
from peftfn.models import layers
from peftfn.ops import stacking
from peftfn.runtime.apply import apply

_FEW_TOKENS = 32
"""Up to so many, members are folded into rows: benchmarks/many.py, "ensemble of 8" (20 ms folded, 30 mapped)."""


class Ensemble(NamedTuple):
    """Predictions of K members; C classes (of a language model, words), any axes before them.

    Attributes:
        logits: (K, ..., C), each member's.
        mean: (..., C), the mean of their probabilities.
        variance: (..., C), the variance of their probabilities over the members.
        entropy: (...), that of the mean, in nats: the whole uncertainty.
        mutual_information: (...), the entropy of the mean less the mean entropy, in nats: the part of the uncertainty
            that is disagreement (Houlsby et al. 2011, https://arxiv.org/abs/1112.5745, equation 2).

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> found = pf.ensemble(model, pf.stack([adapter] * 3), torch.zeros(1, 4))
        >>> found.logits.shape, found.variance
        (torch.Size([3, 1, 2]), tensor([[0., 0.]]))
    """

    logits: Tensor
    mean: Tensor
    variance: Tensor
    entropy: Tensor
    mutual_information: Tensor


def ensemble(model: nn.Module, stacked: Adapter, batch: Any, *, params: Mapping[str, Tensor] | None = None) -> Ensemble:
    """The predictions of a stack's adapters, their mean and their disagreement, in one pass.

    The members are mapped by `torch.vmap`, so what lies below the first adapted layer is computed once; a batch of few
    tokens is repeated for each member and routed instead, which has fewer kernels.

    Args:
        model: the base: a classifier, or a language model. Its output has `logits`, or is the logits.
        stacked: the members, as `peftfn.stack` makes them.
        batch: as for `apply`.
        params: as for `apply`.

    Raises:
        TypeError: `stacked` is no stack, or the model's output has no logits.
        KeyError, ValueError, NotImplementedError, RuntimeError: as in `apply`.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> config = pf.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> members = [pf.init(model, config, torch.Generator().manual_seed(seed)) for seed in range(5)]
        >>> found = pf.ensemble(model, pf.stack(members), torch.ones(2, 4))
        >>> found.mean.shape, bool((found.mutual_information > 0).all())
        (torch.Size([2, 3]), True)
    """
    if not isinstance(cast("Any", stacked), Adapter) or not stacking.is_whole(stacked):
        raise TypeError(
            f"ensemble was given a {type(stacked).__name__} that is no stack of adapters; expected peftfn.stack([...])."
        )
    run = _folded if _is_small(stacked, batch) else _mapped
    logits = run(model, stacked, batch, params)
    logs = logits.float().log_softmax(-1)
    each = logs.exp()
    mean = each.mean(0)
    entropy = cast("Tensor", -torch.special.xlogy(mean, mean).sum(-1))  # torch does not say what it returns
    own = -(each * logs).sum(-1).mean(0)
    return Ensemble(logits, mean, each.var(0, correction=0), entropy, (entropy - own).clamp(min=0))


def _mapped(model: nn.Module, stacked: Adapter, batch: Any, params: Mapping[str, Tensor] | None) -> Tensor:
    def one(adapter: Adapter) -> Tensor:
        return _logits(apply(model, adapter, batch, params=params))

    return torch.vmap(one, randomness="different")(stacked)


def _folded(model: nn.Module, stacked: Adapter, batch: Any, params: Mapping[str, Tensor] | None) -> Tensor:
    count = stacking.size(stacked)
    first = next(iter(batch.values()))
    index = torch.arange(count, device="cpu").repeat_interleave(first.shape[0])
    repeated = {name: tensor.repeat(count, *(1 for _ in tensor.shape[1:])) for name, tensor in batch.items()}
    logits = _logits(apply(model, stacked, repeated, params=params, index=index))
    return logits.view(count, -1, *logits.shape[1:])


def _is_small(stacked: Adapter, batch: Any) -> bool:
    """Whether the batch is a mapping of few tokens, a row each, and the method takes rows everywhere."""
    if not isinstance(batch, Mapping) or not batch:
        return False
    tensors = list(cast("Mapping[str, Any]", batch).values())
    if not all(isinstance(one, Tensor) and one.dim() > 0 for one in tensors) or is_traced(*tensors):
        return False
    method = methods.of(stacked.config)
    action = method.on_weights
    by_row = action is not None and all(
        action.takes_rows(layers.LINEAR, stacked.sites.get(path, UNKNOWN).rows) and not any(map(method.replaces, leaf))
        for path, leaf in stacked.params.items()
    )
    is_few = max(one.numel() for one in tensors) <= _FEW_TOKENS
    return by_row and is_few and len({one.shape[0] for one in tensors}) == 1


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"the model returns a {type(output).__name__} without logits; expected a classifier's output.")
    return found
