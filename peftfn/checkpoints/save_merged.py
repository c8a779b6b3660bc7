"""`save_pretrained` of a bound module: a plain model folder with the adapter merged in."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.adapter import Adapter
from peftfn.models import layers, surgery
from peftfn.ops.merge import merge
from peftfn.weights import codecs

_TIE = "tie_word_embeddings"
_QUANTIZED = (
    *("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"),
    *("quantization_config", "_pre_quantization_dtype"),
)
"""Attributes by which a transformers model and its config say that weights are quantized."""


def merged(
    bound: nn.Module,
    state: Mapping[str, Tensor],
    adapters: Sequence[Adapter],
    tied: Sequence[Sequence[str]],
    requantize: bool,
) -> tuple[dict[str, Tensor], bool]:
    """The state dict with the adapters merged in, and whether names that share a parameter have come apart.

    Where they have, every tied name gets a tensor of its own: what a class writes of tied names it decides by memory.
    Packed weights that the adapters change are packed again with `requantize`; without, every packed weight is dense.
    """
    every = {
        **dict(bound.named_parameters(remove_duplicate=False)),
        **dict(bound.named_buffers(remove_duplicate=False)),
    }
    before = {**every, **state}
    with torch.no_grad():
        after = merge(before, adapters, model=bound, requantize=requantize)
        made = after.keys() - before.keys()  # what was packed under other names
        if not requantize:
            made |= _unpack(after, bound)
    for names in _same_slot(bound):
        changed = [name for name in names if name in after and after[name] is not before.get(name)]
        after.update(dict.fromkeys(names, after[changed[0]]) if changed else {})
    is_apart = any(len({_value(name, before, after) for name in names}) > 1 for names in tied)
    if is_apart:
        after.update({name: after[name].clone() for names in tied for name in names})
    return {name: tensor.detach() for name, tensor in after.items() if name in state or name in made}, is_apart


def is_packed(module: nn.Module) -> bool:
    """Whether the module has packed weights anywhere."""
    return any(True for _ in codecs.packed_modules(module.modules()))


def _unpack(state: dict[str, Tensor], bound: nn.Module) -> set[str]:
    """Put a dense tensor in the place of every packed weight; their names."""
    made: set[str] = set()
    for path, module in layers.named_modules(bound, remove_duplicate=False):
        name = f"{path}.weight" if path else "weight"
        entry = codecs.find(state, name, module) if codecs.of(module) is not codecs.DENSE else None
        if entry is not None:
            for companion in entry.companions:
                del state[companion]
            state[name] = entry.dense
            made.add(name)
            if (bias := codecs.bias(module)) is not None:
                made.add(f"{name.removesuffix('weight')}bias")
                state.setdefault(f"{name.removesuffix('weight')}bias", bias)
    return made


def _same_slot(bound: nn.Module) -> list[list[str]]:
    """Names of one parameter of one module that has several paths."""
    slots: dict[tuple[int, str], list[str]] = {}
    for path, module in layers.named_modules(bound, remove_duplicate=False):
        for name in module._parameters:
            slots.setdefault((id(module), name), []).append(f"{path}.{name}" if path else name)
    return [names for names in slots.values() if len(names) > 1]


def _value(name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> int | None:
    return None if after[name] is before[name] else id(after[name])


def stand_in(bound: Any, weights: Mapping[str, Tensor], is_apart: bool, dense: bool) -> Any:
    """A shallow copy of the module, for the class's own `save_pretrained`, that says that it has these weights.

    Args:
        bound: the module.
        weights: a state dict of the plain model.
        is_apart: whether names that the class ties have values of their own there.
        dense: whether to say that the model is not quantized.

    Raises:
        ValueError: tied names have values of their own, and the class cannot load them so.
    """
    plain: Any = surgery.second(bound)  # copy.copy would call __new__, which FSDP has replaced
    own = plain.__dict__
    for name in ("save_pretrained", "_hf_peft_config_loaded", *(_QUANTIZED if dense else ())):
        own.pop(name, None)
    own["state_dict"] = functools.partial(_given, weights)
    if "config" in own:
        own["config"] = copy.deepcopy(bound.config)
        if dense:
            for name in _QUANTIZED:
                vars(plain.config).pop(name, None)
        if is_apart:
            untie(plain)
    return plain


def _given(weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    del args, kwargs
    return dict(weights)


def untie(plain: Any) -> None:
    """Say in the config that the embeddings are not tied, if that is all that saying so does."""
    configs = [plain.config, *(getattr(plain.config, name, None) for name in ("text_config", "decoder"))]
    configs = [config for config in configs if getattr(config, _TIE, False)]
    # The T5 family takes the flag for another one: whether to scale the decoder's output.
    if all(_keeps(config) for config in configs) and _TIE not in inspect.getsource(plain.forward):
        for config in configs:
            setattr(config, _TIE, False)
    elif "missing_keys" not in inspect.signature(plain.tie_weights).parameters:  # transformers 4
        raise ValueError(
            f"the adapter changes one of the weights that {type(plain).__name__} ties, and with this version of "
            "transformers it ties whatever its folder holds. Save with transformers 5, or keep the adapter "
            "(peftfn.save)."
        )


def _keeps(config: Any) -> bool:
    again: Any = config.from_dict({**config.to_dict(), _TIE: False})
    return getattr(again, _TIE, None) is False
