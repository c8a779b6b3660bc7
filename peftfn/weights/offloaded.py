"""Weights that accelerate keeps elsewhere (in CPU memory, on disk) and brings to a layer when it runs.

accelerate puts them into the layer itself, as parameters of its own making, and takes them out again: a tensor that an
adapter has put there would be overwritten, or lose its gradient. Here they are put into a twin, or into a bound module,
and only where nothing else is.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

_FROM = "_peftfn_weights_from"


def hook_of(module: nn.Module) -> Any:
    """accelerate's hook that brings the module's weights, or `None`."""
    hook = module.__dict__.get("_hf_hook")
    every = [] if hook is None else [hook, *getattr(hook, "hooks", ())]
    return next((one for one in every if getattr(one, "offload", False)), None)


def own(hook: Any) -> Any:
    """A copy of accelerate's hook, which writes to itself in a call; the weights that it keeps are shared."""
    made = copy.copy(hook)
    if hasattr(made, "hooks"):
        made.hooks = tuple(copy.copy(one) for one in made.hooks)
    return made


def bring(module: nn.Module) -> None:
    """Make a twin or a bound module bring its weights as they are needed, where accelerate's hook would."""
    hook, forward = hook_of(module), module.__dict__.get("_old_forward")
    if hook is not None and forward is not None:
        module.__dict__["forward"] = functools.partial(_run, module, hook, forward)
        if hook.place_submodules:
            for path, inner in cast("Any", module.named_modules()):
                inner.__dict__[_FROM] = (hook.weights_map, f"{path}." if path else "")


def value(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer that is elsewhere, or `None` where the module has none of that name there."""
    hook = hook_of(module)
    weights, prefix = module.__dict__.get(_FROM, (None if hook is None else hook.weights_map, ""))
    return None if weights is None else weights.get(f"{prefix}{name}")


def filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, with those on the meta device that the model's hooks have in their place."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            owner, _, last = name.rpartition(".")
            there = _held(model, owner, last)
            found[name] = tensor if there is None else there
    return found


def _held(model: nn.Module, owner: str, name: str) -> Tensor | None:
    """From the hook of the module that owns it, or of one around it that brings the weights of all inside."""
    while True:
        try:
            there = value(model.get_submodule(owner), name)
        except AttributeError:
            return None
        if there is not None or not owner:
            return there
        owner, _, last = owner.rpartition(".")
        name = f"{last}.{name}"


def _run(module: nn.Module, hook: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    utils: Any = importlib.import_module("accelerate.utils")  # it is there, since its hook is
    device, skipped = hook.execution_device, hook.skip_keys
    came_from = utils.find_device([args, kwargs]) if hook.io_same_device else None
    brought = list(_elsewhere(module, hook))
    try:
        for home, name, full, _ in brought:
            home[name] = hook.weights_map[full].to(device)
        args, kwargs = utils.send_to_device(args, device), utils.send_to_device(kwargs, device, skip_keys=skipped)
        output = forward(*args, **kwargs)
    finally:
        for home, name, _, old in brought:
            home[name] = old
    return output if came_from is None else utils.send_to_device(output, came_from, skip_keys=skipped)


def _elsewhere(module: nn.Module, hook: Any) -> Iterator[tuple[dict[str, Any], str, str, Tensor]]:
    """What the hook is to bring: the home, the name there, the hook's name for it, and what stands in its place."""
    inner: list[tuple[str, Any]] = [("", module)]
    for path, one in cast("Any", module.named_modules()) if hook.place_submodules else inner:
        homes: tuple[Any, Any] = (one._parameters, one._buffers)
        for home in homes:
            for name, tensor in home.items():
                full = f"{path}.{name}" if path else name
                if tensor is not None and tensor.is_meta and full in hook.weights_map:
                    yield home, name, full, tensor


def refuse_meta(root: nn.Module) -> None:
    """Refuse private modules that have tensors without numbers, after those that the caller gave."""
    named: dict[str, Tensor] = dict([*root.named_parameters(), *root.named_buffers()])
    left = [name for name, tensor in filled(root, named).items() if tensor.is_meta]
    if left:
        raise ValueError(
            f"the model is on the meta device and params has no value for {len(left)} of its tensors: "
            f"{', '.join(left[:4])}, ...; give every parameter and buffer by name."
        )
