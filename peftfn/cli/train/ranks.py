"""AdaLoRA in the training loop: its regulariser and its allocation; nothing for other methods."""

from __future__ import annotations

import dataclasses

import torch

import peftfn as pf
from peftfn.cli.errors import UserError
from peftfn.training.adalora import State


def with_steps(config: pf.PeftConfig, total: int) -> pf.PeftConfig:
    """The config of a run of so many steps: AdaLoRA's schedule has to know."""
    if not isinstance(config, pf.AdaLoraConfig):
        return config
    if config.tinit >= total - config.tfinal:
        raise UserError(
            f"--tinit {config.tinit} and --tfinal {config.tfinal} leave none of the run's {total} steps in which ranks "
            "shrink; give smaller ones, or a longer run"
        )
    return dataclasses.replace(config, total_step=total)


def begun(adapter: pf.Adapter) -> State | None:
    """The state of allocation before the first step, or None."""
    return pf.adalora.init_state(adapter) if isinstance(adapter.config, pf.AdaLoraConfig) else None


def pull(adapter: pf.Adapter) -> None:
    """Add the gradient of AdaLoRA's regulariser to the leaves'."""
    if isinstance(adapter.config, pf.AdaLoraConfig):
        pf.adalora.regulariser(adapter).backward()


def allocated(state: State | None, adapter: pf.Adapter, step: int) -> tuple[State | None, pf.Adapter]:
    """State and adapter after the optimizer's step of that number, counted from 1; leaves are changed in place."""
    if state is None:
        return None, adapter
    grads = {path: {name: tensor.grad for name, tensor in leaf.items()} for path, leaf in adapter.params.items()}
    state, made = pf.adalora.allocate(state, adapter, grads, step)
    with torch.no_grad():
        for path, leaf in made.params.items():
            for name, tensor in leaf.items():
                if tensor is not adapter.params[path][name]:
                    adapter.params[path][name].copy_(tensor)
    return state, made.replace(params=adapter.params)
