"""KaSA's regulariser, which is added to the loss: its factors stay near orthonormal, and d small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftfn.core.adapter import Adapter
from peftfn.methods import kasa
from peftfn.methods.lora_config import LoraConfig


def regulariser(adapter: Adapter) -> Tensor:
    """beta·Σ d² + gamma·(‖BᵀB - I‖ + ‖A·Aᵀ - I‖), summed over the sites (equations 9 to 11 of the paper), 0-d.

    Args:
        adapter: one of `LoraConfig(kasa_config={"beta": ..., "gamma": ...})`.

    Raises:
        TypeError: it is of another method, or a stack.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> config = pf.LoraConfig(r=2, target_modules=["0"], kasa_config={"beta": 0.0, "gamma": 1.0})
        >>> adapter = pf.init(model, config)
        >>> one = torch.eye(4)
        >>> leaf = {**adapter.params["0"], "lora_A": one[:2], "lora_B": one[:, :2]}
        >>> pf.kasa.regulariser(adapter.replace(params={"0": leaf}))
        tensor(0.)
    """
    config = adapter.config
    if not isinstance(config, LoraConfig) or config.kasa_config is None or adapter.members is not None:
        given = "a stack" if adapter.members is not None else f"an adapter of {type(config).__name__}"
        raise TypeError(f"regulariser was given {given}; expected one adapter of LoraConfig(kasa_config=...).")
    leaves = [leaf for leaf in adapter.params.values() if kasa.DIAGONAL in leaf]
    return torch.stack([_of_leaf(config.kasa_config, leaf) for leaf in leaves]).sum()


def _of_leaf(weights: Mapping[str, Any], leaf: Mapping[str, Tensor]) -> Tensor:
    wide = {name: one if one.dtype == torch.float64 else one.float() for name, one in leaf.items()}
    a, b, d = wide["lora_A"], wide["lora_B"], wide[kasa.DIAGONAL]
    eye = torch.eye(d.shape[0], dtype=d.dtype, device=d.device)
    distances = [cast("Tensor", torch.linalg.matrix_norm(one - eye)) for one in (b.mT @ b, a @ a.mT)]
    return weights["beta"] * d.square().sum() + weights["gamma"] * (distances[0] + distances[1])
