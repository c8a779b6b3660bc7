"""The graft: a twin of the base's module objects, made for one call, that holds the adapters' tensors.

The twin of a module is a new object of the same class with a copy of its `__dict__`: it shares every tensor with the
base and no container. So a forward may set attributes, register hooks, move BatchNorm's statistics or raise half-way,
in any thread, and the base does not notice; and the tensors stay in the twin for as long as autograd holds it, so that
a checkpointed block finds them again in the backward pass. Parameters are detached on the way in: a base whose
parameters require grad is still a constant.

Making the twins anew at each call costs about 1.6 µs a module, less than checking that a kept copy still mirrors the
base; and `torch.compile` traces it, so the base's tensors are inputs of the graph and a changed base is seen.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn import codecs

_HOOKS = tuple(
    name
    for name, value in vars(nn.Module()).items()
    if isinstance(value, OrderedDict) and "hooks" in name and "state_dict" not in name
)
_STANDARD = frozenset(vars(nn.Module()))
_SMALL_BUFFER = 65536
_SMALL_CONTAINER = 256

# torch's own layers keep nothing in their `__dict__` but numbers; nothing there can point back into the base.
_PLAIN_HOMES = ("linear", "normalization", "dropout", "sparse", "activation", "conv", "batchnorm", "pooling", "padding")
_PLAIN = frozenset(f"torch.nn.modules.{home}" for home in _PLAIN_HOMES)


class Twins:
    """The twins of one base, by module and by path, and the tensors that were given by name.

    Args:
        model: the base.
        params: parameters and buffers to put in place of the base's, by name. Tied names follow each other, as in
            `torch.func.functional_call`, unless each is given.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor] | None = None) -> None:
        self.by_path: dict[str, nn.Module] = {}
        self.checkpointing = False
        self._twin: dict[int, nn.Module] = {}
        self._tensor: dict[int, Tensor] = {}
        self._given = params or {}
        self._to_rebind: list[nn.Module] = []
        self._meta: list[str] = []
        if params:
            self._tie(model, params)
        self.root = self._make(model, "")
        for twin in self._to_rebind:
            self._rebind(twin)
        if self._meta:
            raise ValueError(
                f"the model is on the meta device and params has no value for {len(self._meta)} of its tensors: "
                f"{', '.join(self._meta[:4])}, ...; give every parameter and buffer by name."
            )

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name, as it is in the twins now."""
        path, _, own = name.rpartition(".")
        twin = self.by_path[path]
        return cast("Tensor", twin._parameters[own] if own in twin._parameters else twin._buffers[own])

    def _tie(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        every = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        lost = [name for name in params if name not in every]
        if lost:
            raise KeyError(
                f"params has {lost[:4]}{'...' if len(lost) > 4 else ''}, which {type(model).__name__} does not have; "
                "expected names as in dict(model.named_parameters()) or model.state_dict()."
            )
        for name, tensor in params.items():
            self._tensor.setdefault(id(every[name]), tensor)

    def _make(self, module: nn.Module, path: str) -> nn.Module:
        known = self._twin.get(id(module))
        if known is not None:
            self.by_path[path] = known
            return known
        twin: nn.Module = object.__new__(type(module))
        own = dict(module.__dict__)
        self._twin[id(module)] = self.by_path[path] = twin
        prefix = f"{path}." if path else ""
        if own["_parameters"]:
            own["_parameters"] = {k: self._parameter(v, prefix + k) for k, v in own["_parameters"].items()}
        else:
            own["_parameters"] = {}
        own["_buffers"] = {k: self._buffer(v, prefix + k, own["training"]) for k, v in own["_buffers"].items()}
        own["_modules"] = {k: v if v is None else self._make(v, prefix + k) for k, v in own["_modules"].items()}
        own["_non_persistent_buffers_set"] = set(own["_non_persistent_buffers_set"])
        for name in _HOOKS:
            own[name] = OrderedDict(own[name]) if own[name] else OrderedDict()
        twin.__dict__.update(own)
        self._after(twin, own)
        return twin

    def _after(self, twin: nn.Module, own: dict[str, Any]) -> None:
        if own.get("gradient_checkpointing") and own["training"]:
            self.checkpointing = True
        if type(twin).__module__ not in _PLAIN or "forward" in own:
            self._to_rebind.append(twin)
        if isinstance(twin, (nn.Embedding, nn.EmbeddingBag)) and twin.max_norm is not None:
            keep_norms(twin)

    def _parameter(self, parameter: Tensor | None, name: str) -> Tensor | None:
        if parameter is None:
            return None
        given = self._given.get(name)
        if given is None:
            given = self._known(parameter)
        if given is None:
            # A packed weight (bitsandbytes' Params4bit) would lose its class when detached; it never requires grad.
            given = self._remember(parameter, parameter.detach() if parameter.requires_grad else parameter)
        if self._given and given.is_meta:
            self._meta.append(name)
        return given

    def _known(self, tensor: Tensor) -> Tensor | None:
        return self._tensor.get(id(tensor)) if self._tensor else None

    def _remember(self, tensor: Tensor, twin: Tensor) -> Tensor:
        # Not while Dynamo traces: it would guard on the tensor's identity, and compile again for every new one.
        if self._given or not torch.compiler.is_compiling():
            self._tensor[id(tensor)] = twin
        return twin

    def _buffer(self, buffer: Tensor | None, name: str, training: bool) -> Tensor | None:
        if buffer is None:
            return None
        known = self._given.get(name)
        if known is None:
            known = self._known(buffer)
        if known is not None:
            return known.clone() if training else known
        if self._given and buffer.is_meta:
            self._meta.append(name)
        # A forward may write to a buffer (BatchNorm's statistics, a counter): it gets its own. A large one is only
        # written in training; in evaluation it is a mask or a table, and copying it at each call would be the cost.
        return self._remember(buffer, buffer.clone() if training or buffer.numel() <= _SMALL_BUFFER else buffer)

    def _rebind(self, twin: nn.Module) -> None:
        """Point a twin's attributes that lead back into the base (bound methods, lists of layers) at the twins."""
        own = twin.__dict__
        for name, value in list(own.items()):
            if name not in _STANDARD:
                changed = self._mapped(value)
                if changed is not value:
                    own[name] = changed
        if torch.compiler.is_compiling():
            # Dynamo follows a method of an object made while it traces only through something that it can guard on.
            for name in _method_names(type(twin)):
                own.setdefault(name, functools.partial(getattr(type(twin), name), twin))

    def _mapped(self, value: Any) -> Any:
        kind: Any = type(value)
        changed = value
        if kind in (str, int, float, bool, type(None)):
            pass
        elif isinstance(value, nn.Module):
            changed = self._twin.get(id(value)) or self._make(value, f"<outside>.{id(value)}")
        elif isinstance(value, Tensor):
            known = self._known(value)
            changed = value if known is None else known
        elif kind is types.MethodType:
            changed = self._mapped_method(value)
        elif kind is functools.partial:
            changed = self._mapped_partial(value)
        elif kind in (list, tuple, dict, set) and len(value) <= _SMALL_CONTAINER:
            changed = self._mapped_container(value)
        return changed

    def _mapped_method(self, value: types.MethodType) -> Any:
        owner = self._mapped(value.__self__)
        if owner is value.__self__:
            return value
        if torch.compiler.is_compiling():
            return functools.partial(value.__func__, owner)
        return types.MethodType(value.__func__, owner)

    def _mapped_partial(self, value: functools.partial[Any]) -> Any:
        arguments = [self._mapped(argument) for argument in value.args]
        keywords = {name: self._mapped(argument) for name, argument in value.keywords.items()}
        made = functools.partial(self._mapped(value.func), *arguments, **keywords)
        made.__dict__.update(value.__dict__)
        return made

    def _mapped_container(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._mapped(item) for key, item in cast("dict[Any, Any]", value).items()}
        if isinstance(value, set):
            return set(cast("set[Any]", value))
        items = [self._mapped(item) for item in value]
        return items if isinstance(value, list) else tuple(items)


@torch._dynamo.assume_constant_result
def _method_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The methods that a model's own classes define (those with a forward), not what they have from a library's base."""
    classes = [
        one
        for one in cls.__mro__
        if "forward" in vars(one) and not one.__module__.startswith("torch.nn.modules.module")
    ]
    found = {name: value for one in reversed(classes) for name, value in vars(one).items()}
    return tuple(name for name, value in found.items() if isinstance(value, types.FunctionType) and name[:2] != "__")


def keep_norms(twin: nn.Embedding | nn.EmbeddingBag) -> None:
    """Make a table with `max_norm` renormalise what it looks up, not the weight itself, which is the base's."""
    if isinstance(twin, nn.EmbeddingBag):
        twin._parameters["weight"] = cast("Any", twin.weight.detach().clone())
        return
    lookup = functools.partial(_lookup, twin)
    twin.__dict__["forward"] = functools.partial(_renormalised, twin, lookup)


def _lookup(twin: nn.Embedding, ids: Tensor) -> Tensor:
    return nn.functional.embedding(ids, twin.weight, twin.padding_idx, scale_grad_by_freq=twin.scale_grad_by_freq)


def _renormalised(twin: nn.Embedding, lookup: Callable[..., Tensor], ids: Tensor) -> Tensor:
    rows = lookup(ids)  # (..., dim)
    assert twin.max_norm is not None
    norms = cast("Tensor", torch.linalg.vector_norm(rows, ord=twin.norm_type, dim=-1, keepdim=True))
    # The formula of torch.embedding_renorm_, in its precision; here it is part of the function, so gradients see it.
    scale = (twin.max_norm / (norms.double() + 1e-7)).to(rows.dtype)
    return rows * torch.where(norms > twin.max_norm, scale, torch.ones_like(norms))


def put(twin: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of one of the twin's parameters or buffers, whatever its class (a plain tensor will do)."""
    if name in twin._buffers:
        twin._buffers[name] = tensor.clone()  # a forward may write to a buffer, and this one is the adapter's
        return
    home: dict[str, Any] = twin._parameters
    home[name] = tensor
    names: list[str] = getattr(twin, "_flat_weights_names", [])
    if name in names:  # nn.LSTM and its kin read their weights from a list of their own
        twin.__dict__["_flat_weights"][names.index(name)] = tensor


def base_forward(twin: nn.Module) -> Callable[..., Any]:
    """What the twin runs before any adapter acts on it, with any renormalisation left to `set_forward`."""
    if isinstance(twin, nn.Embedding) and twin.max_norm is not None:
        return twin.__dict__["forward"].args[1]
    own = twin.__dict__.get("forward")
    return own if own is not None else functools.partial(codecs.of(twin).run, twin)


def set_forward(twin: nn.Module, forward: Callable[..., Any]) -> None:
    """Make the twin run `forward`; only this object changes, its class and its paths stay."""
    if isinstance(twin, nn.Embedding) and twin.max_norm is not None:
        forward = functools.partial(_renormalised, twin, forward)
    twin.__dict__["forward"] = forward


def let_inputs_require_grad(root: nn.Module) -> None:
    """Make what the input embedding returns require grad, so that a reentrant checkpoint runs its block again.

    torch's reentrant checkpointing asks whether an input of the block requires grad; of a frozen base, none does.
    """
    find = getattr(root, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if isinstance(embedding, nn.Module) and torch.is_grad_enabled():
        embedding.register_forward_hook(_require_grad)


def _require_grad(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_(True)


def explained(error: RuntimeError) -> RuntimeError:
    """The error, or one that says what to do where torch's own message does not."""
    text = str(error)
    if "saved tensor hooks" in text or ("setup_context" in text and "CheckpointFunction" in text):
        return RuntimeError(
            "torch.func transforms cannot go through activation checkpointing (torch does not support it). Turn it "
            "off for this model (gradient_checkpointing_disable), or train with loss.backward() in place of "
            "torch.func.grad."
        )
    return error
