"""A copy of a model's module objects that shares the storage of its parameters, and nothing else."""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.models import references

Memo = dict[int, Any]
"""What stands in the copy for an object of the model, by the object's id; as in `copy.deepcopy`."""

_LED = -1  # no object's id: where the memo has what `references` made


def shared(model: nn.Module, same: Iterable[Any] = ()) -> Any:
    """The copy: a module of the same class and paths whose parameters alias the model's, and never require grad.

    Buffers, configs, hooks and other attributes are copied, and what leads back into the model (bound methods,
    closures, lists of layers) leads into the copy. An attribute that cannot be copied (a lock, a stream) is shared,
    and so are the objects of `same`.
    """
    memo: Memo = {id(parameter): _alias(parameter) for parameter in model.parameters()}
    memo.update({id(one): one for one in same})
    # Classes that define __deepcopy__ (TorchScript, torch.fx, parametrized layers) are copied by it.
    modules = [module for module in model.modules() if not hasattr(type(module), "__deepcopy__")]
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
        for hook in hooks(module):  # accelerate keeps offloaded weights there: the same ones
            kept: dict[str, Any] = hook.__dict__
            memo.update({id(kept[name]): kept[name] for name in kept if isinstance(kept[name], Mapping)})
    for values in (module.__dict__ for module in modules):
        for name in [name for name in values if type(values[name]) is OrderedDict]:
            _copied(values[name], memo)  # hooks, before the handles that refer to them
    for module in modules:
        memo[id(module)].__dict__.update({name: _copied(value, memo) for name, value in module.__dict__.items()})
        memo[id(module)].__dict__["_compiled_call_impl"] = None  # of `module.compile()`: it runs the model's own object
    for module in modules:
        give_slots(memo[id(module)], module, functools.partial(_copied, memo=memo))
    return copy.deepcopy(model, memo)


def give_slots(other: nn.Module, module: nn.Module, led: Callable[[Any], Any] | None = None) -> None:
    """Give another object of a module's class what the module holds outside of its `__dict__`."""
    for name in references.slots(type(module)):
        if hasattr(module, name):
            value = getattr(module, name)
            object.__setattr__(other, name, value if led is None else led(value))


def loose(tensor: Tensor, known: Mapping[int, Tensor], *, copied: bool) -> Tensor:
    """What stands for a tensor that is neither parameter nor buffer, and never requires grad.

    Args:
        tensor: the model's.
        known: what stands for the model's tensors, by id: a view of one of them becomes a view of that.
        copied: whether it has memory of its own elsewhere.
    """
    base = transforms.viewed(tensor)
    of = None if base is None else known.get(id(base))
    if of is not None and base is not None and of.stride() == base.stride():
        offset = tensor.storage_offset() - base.storage_offset() + of.storage_offset()
        return of.as_strided(tensor.size(), tensor.stride(), offset)
    return tensor.detach().clone() if copied else tensor.detach()


def hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module (device placement, offloading)."""
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    if type(parameter) is not nn.Parameter and not (parameter.requires_grad and parameter.is_floating_point()):
        return parameter  # a packed one (bitsandbytes' Params4bit) loses its class when detached
    alias = nn.Parameter(parameter.detach(), requires_grad=False)
    cast("Any", alias).__dict__.update(
        parameter.__dict__
    )  # transformers keeps a mark there that it has been initialised
    return alias


def _copied(value: Any, memo: Memo) -> Any:
    """The value in the copy."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in (list, dict, OrderedDict) and _holds_itself(value, frozenset()):
        return copy.deepcopy(value, memo)
    parts = _parts(value)
    if parts is not None:
        old, rebuild = parts
        new = [_copied(one, memo) for one in old]
        same = all(one is other for one, other in zip(old, new, strict=True))
        made = value if same and type(value) not in (list, dict, OrderedDict) else rebuild(new)
    elif isinstance(value, types.FunctionType):
        made = _led(value, memo)
    else:
        made = _led(value, memo) if callable(value) else value
        made = _deep_copied(value, memo) if made is value else made
    memo[id(value)] = made
    return made


def _led(value: Any, memo: Memo) -> Any:
    """The value; or, where it leads to the model, one that leads to the copy, and shares the rest."""
    if not references.is_followed(cast("type[object]", type(value))):
        return value
    return references.redirected(value, functools.partial(_stand_in, memo), memo.setdefault(_LED, {}))


def _stand_in(memo: Memo, value: Any) -> Any:
    return memo.get(id(value), value)


def _deep_copied(value: Any, memo: Memo) -> Any:
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach().clone()  # e.g. the weight that torch.nn.utils.weight_norm keeps
    if references.is_followed(cast("type[object]", type(value))):
        memo.update(references.functions(value, functools.partial(_stand_in, memo), memo.setdefault(_LED, {})))
    try:
        return copy.deepcopy(value, memo)
    except (TypeError, RuntimeError, NotImplementedError):
        return value


def refilled(value: Any, led: Callable[[Any], Any], memo: Memo) -> Any:
    """A list, dict or tuple with `led(one)` for each of its values, or the same set; a list or dict may hold itself."""
    key = id(value)
    if isinstance(value, set):
        return set(cast("set[Any]", value))
    if isinstance(value, tuple):
        return tuple([led(one) for one in cast("tuple[Any, ...]", value)])
    if key in memo:
        return memo[key]
    made: Any = {} if isinstance(value, dict) else []
    memo[key] = made
    if isinstance(value, dict):
        made.update({key: led(one) for key, one in cast("dict[Any, Any]", value).items()})
    else:
        made.extend([led(one) for one in value])
    return made


def _holds_itself(value: Any, around: frozenset[int]) -> bool:
    """Whether a container leads to itself by containers."""
    if type(value) not in (list, tuple, dict, OrderedDict):
        return False
    key = id(value)
    inside = list(cast("dict[Any, Any]", value).values()) if isinstance(value, dict) else list(value)
    return key in around or any(_holds_itself(one, around | {key}) for one in inside)


def _parts(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """What a container or a callable holds, and how to make one that holds something else; `None` for the rest."""
    if type(value) in (list, tuple):
        items = cast("Sequence[Any]", value)
        return list(items), cast("Any", type(items))
    if type(value) in (dict, OrderedDict):
        named = cast("dict[Any, Any]", value)
        return list(named.values()), lambda new: type(named)(zip(named, new, strict=True))
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__], lambda new: types.MethodType(*new)
    if isinstance(value, functools.partial):
        partial = cast("functools.partial[Any]", value)
        return [partial.func, partial.args, partial.keywords, partial.__dict__], _rebuilt_partial
    return None


def _rebuilt_partial(parts: list[Any]) -> functools.partial[Any]:
    made = functools.partial(parts[0], *parts[1], **parts[2])
    made.__dict__.update(parts[3])
    return made
