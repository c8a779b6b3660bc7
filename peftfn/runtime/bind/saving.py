"""What a bound module saves and loads: PEFT's files, what `Trainer` looks for beside them, or merged weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from peftfn.checkpoints import checkpoint, save_merged
from peftfn.core import files
from peftfn.core.adapter import Adapter
from peftfn.models import layers
from peftfn.runtime.bind import binding

_SAFE, _PICKLE = "model.safetensors", "pytorch_model.bin"
"""Where Trainer looks for the weights of a model that is none of peft's classes."""

_NOT_GIVEN: Any = object()
_WITHOUT_EFFECT = frozenset(("max_shard_size", "save_function", "save_original_format"))
_HUB = frozenset(("repo_id", "token", "private", "revision"))
_ONLY_DEFAULT = {"variant": None, "save_peft_format": True, "distributed_checkpoint": False}


def suit(bound: nn.Module) -> None:
    """Give a bound module and those inside it a `save_pretrained` that writes the adapters, and what Trainer needs."""
    for path, module in layers.named_modules(bound):
        if hasattr(type(module), "save_pretrained"):
            save = _save if not path and _is_transformers(module) else functools.partial(_save_part, path=path)
            module.__dict__["save_pretrained"] = functools.partial(save, bound)
    bound.__dict__["load_state_dict"] = functools.partial(_load_state_dict, bound)
    if getattr(bound, "is_quantized", False):
        bound.__dict__["_hf_peft_config_loaded"] = True  # else Trainer says that a quantized model cannot be trained


def _is_transformers(module: nn.Module) -> bool:
    return any(f"{one.__module__}.{one.__name__}" == _PRETRAINED for one in type(module).__mro__)


_PRETRAINED = "transformers.modeling_utils.PreTrainedModel"


def _save(
    bound: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = _NOT_GIVEN,
    *,
    merge: bool = False,
    safe_serialization: bool = True,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write the adapter as PEFT's two files, from which `pf.load` and PEFT load it; several go into a folder each.

    Args:
        bound: the bound module.
        save_directory: the folder.
        is_main_process: whether this process writes.
        state_dict: tensors of the module by full name, where it has only a part of them itself (FSDP). Given by name,
            even as `None`, it says that Trainer asks: then the file is written, too, that Trainer loads again.
        merge: write the model with the adapter merged in instead, as the class itself does, with its options.
        safe_serialization: whether Trainer's file is one of safetensors.
        push_to_hub: whether to upload the adapter after that.
        options: the others of transformers' `save_pretrained`. An adapter is one file, whatever `max_shard_size`.

    Raises:
        TypeError: the module is bound to a stack or to nothing, or an option has no meaning for an adapter.
        FileExistsError: Trainer's file would take the place of a whole model.
    """
    if merge:
        given = {} if state_dict is _NOT_GIVEN else {"state_dict": state_dict}
        given |= {} if safe_serialization else {"safe_serialization": False}
        given |= {"push_to_hub": True} if push_to_hub else {}
        _save_part(bound, save_directory, is_main_process, **given, **options, path="")
        return
    _refuse(options)
    if not is_main_process:
        return
    folder = Path(save_directory)
    # Not state_dict(): bitsandbytes' own writes to a weight that it has packed for its kernel.
    state = binding.lasting(bound) if state_dict is _NOT_GIVEN or state_dict is None else state_dict
    adapters = [_named_base(bound, one) for one in _single(bound, state)]
    if not adapters:
        raise TypeError("save_pretrained of a module bound to no adapter: merge=True writes the model.")
    if len(adapters) > 1 and push_to_hub:
        raise TypeError("push_to_hub of a module bound to several adapters: peftfn.push_to_hub uploads one of them.")
    again = folder / (_SAFE if safe_serialization else _PICKLE)
    if state_dict is not _NOT_GIVEN:
        _refuse_model(bound, again)
    for number, adapter in enumerate(adapters):
        checkpoint.save(adapter, folder / f"adapter_{number}" if len(adapters) > 1 else folder)
    if state_dict is not _NOT_GIVEN:
        _write_for_trainer(bound, state, again)
    if push_to_hub:
        how = {name: options[name] for name in _HUB & options.keys()}
        checkpoint.push_to_hub(adapters[0], how.pop("repo_id", folder.name), **how)


def _refuse(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        known = name in _WITHOUT_EFFECT or name in _HUB
        if not known and (name not in _ONLY_DEFAULT or value != _ONLY_DEFAULT[name]):
            raise TypeError(
                f"save_pretrained of a bound module writes the adapter as PEFT's two files, and {name}={value!r} has "
                "no meaning there; with merge=True it writes the merged model, and takes every option of its class."
            )


def _single(bound: nn.Module, state: Mapping[str, Tensor]) -> tuple[Adapter, ...]:
    adapters = binding.adapters(bound, dict(binding.named(bound)) | dict(state))
    if any(one.members is not None for one in adapters):
        raise TypeError(
            "save_pretrained of a module bound to a stack: it has no one set of weights. Save its adapters one by one: "
            "for adapter in peftfn.unstack(peftfn.unbind(bound)): peftfn.save(adapter, folder)."
        )
    return adapters


def _named_base(bound: Any, adapter: Adapter) -> Adapter:
    """The adapter, which names its base if the module knows where it came from."""
    name = getattr(bound, "name_or_path", None)
    if adapter.config.base_model_name_or_path is not None or not isinstance(name, str) or not name:
        return adapter
    return adapter.replace(config=dataclasses.replace(adapter.config, base_model_name_or_path=name))


# --- for Trainer -----------------------------------------------------------------------------------------------------


def _write_for_trainer(bound: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Write what training goes on from, under the module's own names: the adapters, and statistics that have moved."""
    names = (binding.own_names(bound) | _moved(bound)) & state.keys()  # those that last are in there
    # Copies, because safetensors refuses tensors that share memory (a layer at two paths).
    tensors = {name: state[name].detach().to("cpu", copy=True).contiguous() for name in sorted(names)}
    write: files.Write = functools.partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"})
    files.write_atomic(path, write if path.name == _SAFE else functools.partial(torch.save, tensors))


def _moved(bound: nn.Module) -> set[str]:
    """Names of buffers that are no longer what the base has: a BatchNorm's statistics, after training."""
    own = dict(bound.named_buffers(remove_duplicate=False))
    base = binding.of(bound).buffers
    return {name for name in base.keys() & own.keys() if not _same(own[name], base[name])}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and (other.is_meta or torch.equal(one.to(other.device), other))


def _refuse_model(bound: nn.Module, path: Path) -> None:
    """Refuse to put Trainer's file in the place of one that holds more than such a file does."""
    shared = {name for name, _ in bound.named_parameters(remove_duplicate=False)} - binding.own_names(bound)
    if path.is_file() and not shared.isdisjoint(_keys(path)):
        raise FileExistsError(
            f"{path} holds the weights of a model, and what Trainer goes on from would take its place; choose another "
            "folder (output_dir)."
        )


def _keys(path: Path) -> set[str]:
    if path.name == _PICKLE:
        return set(torch.load(path, map_location="meta", weights_only=True))
    opened: Any = safetensors.safe_open(path, framework="pt")
    with opened:
        return set(opened.keys())


def _load_state_dict(bound: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """`load_state_dict`; not strict, it takes the adapters' tensors alone: the rest is the base's, and stays."""
    result: Any = type(bound).load_state_dict(bound, state_dict, strict=strict, assign=assign)
    if not strict:
        own = binding.own_names(bound)
        result.missing_keys[:] = [name for name in result.missing_keys if name in own]
    return result


# --- merged ----------------------------------------------------------------------------------------------------------


def _save_part(
    bound: Any, save_directory: str | Path, *args: Any, path: str, requantize: bool = False, **options: Any
) -> Any:
    """Write a plain model folder of the part of a bound module at `path`, the adapter merged in, as its class does.

    Args:
        bound: the bound module.
        save_directory: the folder.
        args: more for the class's own `save_pretrained`.
        path: the part.
        requantize: whether packed weights are packed again, all that the adapter touches; else all of them are written
            dense, with the values that they have.
        options: more for the class's own.
    """
    part = bound.get_submodule(path)
    prefix = f"{path}." if path else ""
    # A module may hold only a part of its tensors itself (FSDP); then they are given.
    given: Mapping[str, Tensor] | None = options.pop("state_dict", None)
    state: dict[str, Tensor] = bound.state_dict() if given is None or path else {}
    state.update({prefix + name: tensor for name, tensor in (given or {}).items()})
    known = binding.of(bound)
    tied = [[name for name in names if name.startswith(prefix)] for names in known.tied]
    weights, is_apart = save_merged.merged(bound, state, _single(bound, state), tied, requantize)
    kept = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and name not in known.added
    }
    dense = not requantize and save_merged.is_packed(part)
    return save_merged.stand_in(part, kept, is_apart, dense).save_pretrained(save_directory, *args, **options)
