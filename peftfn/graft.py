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
            given = self._tensor.get(id(parameter))
        if given is None:
            # A packed weight (bitsandbytes' Params4bit) would lose its class when detached; it never requires grad.
            given = parameter.detach() if parameter.requires_grad else parameter
            self._tensor[id(parameter)] = given
        if self._given and given.is_meta:
            self._meta.append(name)
        return given

    def _buffer(self, buffer: Tensor | None, name: str, training: bool) -> Tensor | None:
        if buffer is None:
            return None
        known = self._given.get(name)
        if known is None:
            known = self._tensor.get(id(buffer))
        if known is not None:
            return known.clone() if training else known
        if self._given and buffer.is_meta:
            self._meta.append(name)
        # A forward may write to a buffer (BatchNorm's statistics, a counter): it gets its own. A large one is only
        # written in training; in evaluation it is a mask or a table, and copying it at each call would be the cost.
        own = buffer.clone() if training or buffer.numel() <= _SMALL_BUFFER else buffer
        self._tensor[id(buffer)] = own
        return own

    def _rebind(self, twin: nn.Module) -> None:
        """Point a twin's attributes that lead back into the base (bound methods, lists of layers) at the twins."""
        own = twin.__dict__
        for name, value in list(own.items()):
            if name not in _STANDARD:
                changed = self._mapped(value)
                if changed is not value:
                    own[name] = changed
        if torch.compiler.is_compiling() and "forward" not in own:
            # Dynamo reads the forward of an object made while it traces only through a name that it can guard on.
            own["forward"] = functools.partial(type(twin).forward, twin)

    def _mapped(self, value: Any) -> Any:
        if isinstance(value, (str, int, float, bool)) or value is None:
            return value
        if isinstance(value, nn.Module):
            return self._twin.get(id(value)) or self._make(value, f"<outside>.{id(value)}")
        if isinstance(value, Tensor):
            return self._tensor.get(id(value), value)
        if isinstance(value, types.MethodType):
            return self._mapped_method(value)
        if isinstance(value, functools.partial):
            return self._mapped_partial(cast("functools.partial[Any]", value))
        if type(value) in (list, tuple, dict, set) and len(value) <= _SMALL_CONTAINER:
            return self._mapped_container(value)
        return value

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
    norms = torch.linalg.vector_norm(rows, ord=twin.norm_type, dim=-1, keepdim=True)
    # The formula of torch.embedding_renorm_; here it is part of the function, so gradients see it.
    return rows * torch.where(norms > twin.max_norm, twin.max_norm / (norms + 1e-7), torch.ones_like(norms))


def put(twin: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of one of the twin's parameters or buffers, whatever its class (a plain tensor will do)."""
    home: dict[str, Any] = twin._parameters if name in twin._parameters else twin._buffers
    home[name] = tensor
    if isinstance(twin, nn.RNNBase) and name in twin._flat_weights_names:  # the list that its forward reads
        twin._flat_weights[twin._flat_weights_names.index(name)] = tensor


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


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_(True)


def explained(error: RuntimeError) -> RuntimeError:
    """The error, or one that says what to do where torch's own message does not."""
    text = str(error)
    if "saved tensor hooks" in text or ("setup_context" in text and "CheckpointFunction" in text):
        return RuntimeError(
            "torch.func transforms cannot go through activation checkpointing (torch does not support it). Turn it off "
            "for this model (gradient_checkpointing_disable), or train with loss.backward() in place of torch.func.grad."
        )
    return error
