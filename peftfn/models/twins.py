"""Twins: new module objects in the base's shape, made for one call, that share its tensors and none of its containers.

The twin of a module is an object of the same class with a copy of its `__dict__`. So a forward may set attributes,
register hooks, move BatchNorm's statistics or raise half-way, in any thread, and the base does not notice; and what is
put on a twin stays there for as long as autograd holds it, so that a checkpointed block finds it again in the backward
pass. Parameters are detached on the way in: a base whose parameters require grad is still a constant.

Twins are made anew at each call, in a few µs a module. A kept copy would have to be held against the base each time
(tensors, flags, attributes, hooks), which costs as much; and `torch.compile` traces this, so that the base's tensors
are inputs of the graph and a changed base is seen.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.models import copies, references
from peftfn.weights import codecs, offloaded

# What every module has, and the guards of a view (`peftfn.models.write_protection`), which stay the view's: nothing to
# rebind.
_STANDARD = frozenset((*vars(nn.Module()), "_load_from_state_dict", "apply", "requires_grad_", "_hf_hook"))
_ATOMS = frozenset((str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size))
_SMALL_BUFFER = 65536
_LARGE = 256
_CONTAINERS = frozenset((list, tuple, dict, set))

# torch's own layers keep nothing in their `__dict__` but numbers; nothing there can point back into the base.
_PLAIN_HOMES = ("linear", "normalization", "dropout", "sparse", "activation", "conv", "batchnorm", "pooling", "padding")
_PLAIN = frozenset(f"torch.nn.modules.{home}" for home in _PLAIN_HOMES)

_SET = "_peftfn_set_forward"


def has_set_forward(twin: nn.Module) -> bool:
    """Whether somebody has set a forward on the object itself; Dynamo finds the class's own there too."""
    return bool(twin.__dict__.get(_SET)) if torch.compiler.is_compiling() else "forward" in twin.__dict__


class Twins:
    """The twins of one base, by path, and the tensors that were given by name.

    Args:
        model: the base.
        params: parameters and buffers to put in place of the base's, by name. Tied names follow each other, as in
            `torch.func.functional_call`, unless each is given.

    Attributes:
        root: the twin of the model.
        by_path: every module's twin, under each of its paths.
        checkpointing: whether a module asks for activation checkpointing, as transformers spells it.
        tables: twins of tables with `max_norm`, whose own forward would write to the weight.
        led_by: the objects beside modules, tensors and containers that may lead to the base.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor] | None = None) -> None:
        self.by_path: dict[str, nn.Module] = {}
        self.checkpointing = False
        self.tables: list[nn.Module] = []
        self._twin: dict[int, nn.Module] = {}
        self._tensor: dict[int, Tensor] = {}
        self._given = params or {}
        self._tracing = torch.compiler.is_compiling()
        self.led_by: list[Any] = []
        self._led: references.Memo = {}
        self._led_hooks: references.Memo = {}
        self._to_rebind: list[nn.Module] = []
        if params:
            self._tie(model, params)
        self._hooked: list[nn.Module] = []
        self._packed: set[int] = set()
        self.root = self._make(model, "")
        for twin in self._to_rebind:
            self._rebind(twin)
            if "_hf_hook" in twin.__dict__:
                offloaded.bring(twin)
        for twin in self._hooked:
            self._rebind_hooks(twin)
        if params:
            offloaded.refuse_meta(self.root)

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name, as it is in the twins now."""
        path, _, own = name.rpartition(".")
        twin = self.by_path[path]
        return cast("Tensor", twin._parameters[own] if own in twin._parameters else twin._buffers[own])

    def _tie(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        every = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        lost = [name for name in params if name not in every and not codecs.holds_packed(model, name)]
        if lost:
            raise KeyError(
                f"params has {lost[:4]}{'...' if len(lost) > 4 else ''}, which {type(model).__name__} does not have; "
                "expected names as in dict(model.named_parameters()) or model.state_dict()."
            )
        for name, tensor in params.items():
            if name in every:
                self._tensor.setdefault(id(every[name]), tensor)

    def _make(self, module: nn.Module, path: str) -> nn.Module:
        twin = self._twin.get(id(module))
        if twin is not None:
            self._name(twin, path)
            return twin
        twin = object.__new__(type(module))
        self._twin[id(module)] = self.by_path[path] = twin
        own = dict(module.__dict__)
        prefix = f"{path}." if path else ""
        own["_parameters"] = self._parameters(own["_parameters"], prefix) if own["_parameters"] else {}
        if self._given:
            self._put_dense(module, own, prefix)
        own["_buffers"] = self._buffers(module, prefix) if own["_buffers"] else {}
        own["_non_persistent_buffers_set"] = {*own["_non_persistent_buffers_set"]}
        own["_modules"] = {k: v if v is None else self._make(v, prefix + k) for k, v in own["_modules"].items()}
        hooked = _own_hooks(own)
        own["_compiled_call_impl"] = None  # of `module.compile()`: it runs the base's own object
        if "_hf_hook" in own:
            own["_hf_hook"] = offloaded.own(own["_hf_hook"])
        if self._tracing:
            if "forward" in own:
                own[_SET] = True
            twin.__dict__.update(own)
        else:
            object.__setattr__(twin, "__dict__", own)  # past nn.Module's, and without copying it once more
        if own.get("gradient_checkpointing") and own["training"]:
            self.checkpointing = True
        if own.get("max_norm") is not None:
            self.tables.append(twin)
        if type(module).__module__ not in _PLAIN or "forward" in own:
            self._to_rebind.append(twin)
            copies.give_slots(twin, module)
        if hooked and not self._tracing:
            self._hooked.append(twin)
        return twin

    def _name(self, twin: nn.Module, path: str) -> None:
        """Note a twin, and those inside of it, under one more path."""
        if path not in self.by_path:
            self.by_path[path] = twin
            for name, inner in twin.__dict__.get("_modules", {}).items():
                if inner is not None:
                    self._name(inner, f"{path}.{name}" if path else name)

    def _put_dense(self, module: nn.Module, own: dict[str, Any], prefix: str) -> None:
        """Put what is given for a packed weight or bias, which the module has under other names."""
        for name in ("weight", "bias"):
            if prefix + name in self._given and name not in {*module._parameters, *module._buffers}:
                own["_parameters"][name] = self._given[prefix + name]
                codecs.keep(own, codecs.of(module))

    def _parameters(self, parameters: Mapping[str, Tensor | None], prefix: str) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        for name, parameter in parameters.items():
            twin = self._given.get(prefix + name) if self._given else None
            if twin is None and parameter is not None:
                twin = self._known(parameter)
                if twin is None:
                    # A frozen one too: `.to()` in a forward changes it in its place. A packed one would lose its class.
                    aliased = parameter.requires_grad or (type(parameter) is nn.Parameter and not self._tracing)
                    twin = self._remember(parameter, parameter.detach() if aliased else parameter)
            made[name] = twin
        return made

    def _buffers(self, module: nn.Module, prefix: str) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        fixed = {id(tensor) for tensor in codecs.of(module).shared(module)}  # packed weights: nobody writes to them
        training = module.training
        for name, buffer in module._buffers.items():
            twin = self._given.get(prefix + name) if self._given else None
            if twin is None and buffer is not None:
                twin = self._known(buffer)
            if twin is not None:
                copied = (training or twin.numel() <= _SMALL_BUFFER) and id(buffer) not in fixed
                made[name] = twin.clone() if copied else twin
            elif buffer is not None:
                # A forward may write to a buffer (BatchNorm's statistics, a counter): it gets its own. A large one is
                # only written in training; in evaluation it is a mask or a table, and copying it would be the cost.
                copied = (training or buffer.numel() <= _SMALL_BUFFER) and id(buffer) not in fixed
                made[name] = self._remember(buffer, buffer.clone() if copied else buffer)
            else:
                made[name] = None
        return made

    def _known(self, tensor: Tensor) -> Tensor | None:
        return self._tensor.get(id(tensor)) if self._tensor else None

    def _remember(self, tensor: Tensor, twin: Tensor) -> Tensor:
        # Not while Dynamo traces: it would guard on the tensor's identity, and compile again for every new one.
        if not self._tracing or self._given:
            self._tensor[id(tensor)] = twin
        return twin

    def _rebind(self, twin: nn.Module) -> None:
        """Point a twin's attributes that lead back into the base (bound methods, lists of layers) at the twins."""
        own = twin.__dict__
        for name in own.keys() - _STANDARD:
            value = own[name]
            if type(value) not in _ATOMS:
                own[name] = self._mapped(value)
        if self._tracing:
            # Dynamo follows a method of an object made while it traces only through something that it can guard on.
            for name in _method_names(type(twin)):
                own.setdefault(name, functools.partial(getattr(type(twin), name), twin))

    def _mapped(self, value: Any) -> Any:
        kind = cast("type[object]", type(value))
        if kind in _ATOMS:
            return value
        if issubclass(kind, nn.Module):  # of the type: isinstance asks a config, which takes longer
            return self._stand_in(value)
        if issubclass(kind, Tensor):
            return self._own_tensor(value)
        if kind in _CONTAINERS:
            return self._mapped_container(value)
        if self._tracing:
            return self._traced(value)
        self.led_by.append(value)
        return references.redirected(value, self._stand_in, self._led) if references.is_followed(kind) else value

    def _own_tensor(self, value: Tensor) -> Tensor:
        """A tensor that is neither parameter nor buffer: the twins' own, as a buffer; a view, of what they have."""
        known = self._tensor.get(id(value))
        if known is not None or self._tracing or type(value) not in (Tensor, nn.Parameter):
            return value if known is None else known
        self._packed = self._packed or {id(one) for one in (self, *codecs.shared(self.root))}
        if id(value) in self._packed:
            return value
        copied = self.root.training or value.numel() <= _SMALL_BUFFER
        return self._remember(value, copies.loose(value, {} if self._given else self._tensor, copied=copied))

    def _stand_in(self, value: Any) -> Any:
        known = self._of_base(value)
        return known if known is not value or isinstance(value, Tensor) else self._make(value, f"<outside>.{id(value)}")

    def _rebind_hooks(self, twin: nn.Module) -> None:
        """Point a twin's hooks at the twins. What they have beside the base (a metric, a log) is theirs, and stays."""
        for name in _HOOKS:
            for key, hook in twin.__dict__[name].items():
                if type(hook) not in _ATOMS:
                    self.led_by.append(hook)
                    twin.__dict__[name][key] = references.redirected(hook, self._of_base, self._led_hooks)

    def _of_base(self, value: Any) -> Any:
        return self._tensor.get(id(value), value) if isinstance(value, Tensor) else self._twin.get(id(value), value)

    def _traced(self, value: Any) -> Any:
        """The value while Dynamo traces, which has no way with most objects."""
        if type(value) is types.MethodType:
            owner, function = self._mapped(value.__self__), value.__func__
            return value if owner is value.__self__ else functools.partial(function, owner)
        if type(value) is functools.partial:
            keywords = {name: self._mapped(one) for name, one in value.keywords.items()}
            return functools.partial(self._mapped(value.func), *map(self._mapped, value.args), **keywords)
        return value

    def _mapped_container(self, value: Any) -> Any:
        held: Any = cast("dict[Any, Any]", value).values() if type(value) is dict else value
        if len(held) > _LARGE and _ATOMS.issuperset(map(type, held)):
            return cast("Any", value)
        memo: dict[int, Any] = {} if self._tracing else self._led
        return copies.refilled(value, self._mapped, memo)


def _own_hooks(own: dict[str, Any]) -> bool:
    """Put the module's hooks in dictionaries of the twin's own, for a forward may add some; say whether it has any."""
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    for name in _HOOKS:
        own[name] = OrderedDict(own[name]) if hooked else OrderedDict()
    return bool(hooked)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@transforms.constant_result
def _method_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The methods of a model's own classes (those with a forward), not what they have from a library's base."""
    classes = [
        one
        for one in cls.__mro__
        if "forward" in vars(one) and not one.__module__.startswith("torch.nn.modules.module")
    ]
    found = {name: value for one in reversed(classes) for name, value in vars(one).items()}
    return tuple(name for name, value in found.items() if isinstance(value, types.FunctionType) and name[:2] != "__")
