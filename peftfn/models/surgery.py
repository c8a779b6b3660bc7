"""Changes to private modules: tensors put in place, other forwards; and error messages that torch leaves unclear.

Nothing here knows a method or a format; `peftfn.models.twins` makes the objects, `peftfn.runtime.attach` plans what
goes where.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.models import activation_checkpointing, twins
from peftfn.models.read_weights import AdaptedWeight
from peftfn.weights import codecs

Wrap = Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
"""`(an object with the module's tensors, its forward so far) -> its new forward`."""


class Plan(NamedTuple):
    """The changes to the private modules of a model.

    Attributes:
        forwards: path -> the wrappers that are put around the module's own forward, innermost first.
        tensors: (path, name) -> the tensor that replaces that parameter or buffer.
        computed: (path, name) -> a function that computes that tensor when it is read: the adapted form of a weight
            that the base reads itself.
        reads: (path, name) -> a function that computes what that tensor is where the base reads it past the layer's
            forward. It is put before the module's own tensor, which stays (`peftfn.models.read_weights`).
        attributes: (path, name) -> the new value of that attribute.
    """

    forwards: dict[str, list[Wrap]]
    tensors: dict[tuple[str, str], Tensor]
    computed: dict[tuple[str, str], Callable[[], Tensor]]
    reads: dict[tuple[str, str], Callable[[], Tensor]]
    attributes: dict[tuple[str, str], Any]

    def then(self, path: str, wrap: Wrap) -> None:
        """Add a wrapper around the forward of a module."""
        self.forwards.setdefault(path, []).append(wrap)


def install(
    plan: Plan,
    by_path: Mapping[str, nn.Module],
    hold: Callable[[nn.Module, str, Callable[[], Tensor]], None],
    *,
    apart: bool = False,
) -> None:
    """Carry out a plan on private modules.

    Args:
        plan: the changes.
        by_path: the modules.
        hold: how a computed tensor is put on its module: `(module, name, compute)`.
        apart: whether a forward gets a second object of its module. A module that held a forward that held the module
            would be a cycle, and keep its tensors until the garbage collector runs.
    """
    for (path, name), tensor in plan.tensors.items():
        put(by_path[path], name, tensor)
    for (path, name), compute in plan.computed.items():
        hold(by_path[path], name, compute)
    for (path, name), value in plan.attributes.items():
        by_path[path].__dict__[name] = value
    own = {path for path, _ in plan.reads if codecs.has_own_forward(by_path[path])}
    _put_reads(plan, by_path, own)
    for path, wraps in plan.forwards.items():
        module = by_path[path]
        # A hook may set tensors on the module itself before it runs (weight_norm, prune): then that one has to run.
        layer = second(module) if apart and not module.__dict__["_forward_pre_hooks"] else module
        run = base_forward(layer)
        for wrap in wraps:
            run = wrap(layer, run)
        set_forward(module, run)
    _put_reads(plan, by_path, {path for path, _ in plan.reads} - own)  # what a layer's forward runs has its own tensors


def keep_norms(twin: nn.Module) -> None:
    """Make a table with `max_norm` renormalise what it looks up, not the weight itself, which is the base's."""
    if isinstance(twin, nn.EmbeddingBag):
        twin._parameters["weight"] = cast("Any", twin.weight.detach().clone())
    if not isinstance(twin, nn.Embedding) or twin.max_norm is None:
        return
    set_forward(twin, functools.partial(_lookup, twin))


def _lookup(twin: nn.Embedding, ids: Tensor) -> Tensor:
    weight = codecs.of(twin).read(twin, "weight")
    return nn.functional.embedding(ids, weight, twin.padding_idx, scale_grad_by_freq=twin.scale_grad_by_freq)


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
    if name == "weight":
        codecs.keep(twin.__dict__, codecs.of(twin))
    home: dict[str, Any] = twin._parameters
    home[name] = tensor
    names: list[str] = getattr(twin, "_flat_weights_names", [])
    if name in names:  # nn.LSTM and its kin read their weights from a list of their own
        twin.__dict__["_flat_weights"][names.index(name)] = tensor


def _put_reads(plan: Plan, by_path: Mapping[str, nn.Module], paths: set[str]) -> None:
    for (path, name), compute in plan.reads.items():
        if path in paths:
            put_before(by_path[path], f"{path}.{name}" if path else name, compute)


def put_before(twin: nn.Module, full_name: str, compute: Callable[[], Tensor]) -> None:
    """Put what adapters make of a tensor before the module's own, for whoever reads it past the layer's forward.

    Dynamo has no way with an object that stands for a tensor: there it is the tensor itself, and what nobody reads is
    dropped from the graph.
    """
    name = full_name.rpartition(".")[2]
    if torch.compiler.is_compiling():
        twin.__dict__[name] = _traced(compute)
    else:
        plain = functools.partial(codecs.DENSE.read, twin, name)  # others are not read so
        twin.__dict__[name] = AdaptedWeight(plain, compute, full_name)


def _traced(compute: Callable[[], Tensor]) -> Tensor | str:
    """The adapted tensor; where there is no one value, why: a text that no operation takes, if somebody reads it."""
    try:
        return compute()
    except ValueError as error:
        return str(error)


def second(twin: nn.Module) -> nn.Module:
    """Another object with the twin's tensors and attributes, that does not follow what is set on the twin later."""
    other = object.__new__(type(twin))
    other.__dict__.update(twin.__dict__)
    return other


def base_forward(twin: nn.Module) -> Callable[..., Any]:
    """What the twin runs before any adapter acts on it, with any renormalisation left to `set_forward`."""
    if isinstance(twin, nn.Embedding) and twin.max_norm is not None:
        return functools.partial(_lookup, twin)
    if twins.has_set_forward(twin):
        return twin.__dict__["forward"]
    return functools.partial(codecs.of(twin).run, twin)


def run_packed(modules: Iterable[nn.Module], apart: bool = False) -> None:
    """Make modules with a packed weight run from their codec: their own forward may write to the base's weight.

    With `apart`, on second objects: a module that held a forward that held the module would be a cycle.
    """
    for module, codec in list(codecs.packed_modules(modules)):
        run = functools.partial(codec.run, second(module) if apart else module)
        # accelerate's hooks set a forward of their own, that calls the old one.
        module.__dict__["_old_forward" if "_old_forward" in module.__dict__ else "forward"] = run


def set_forward(twin: nn.Module, forward: Callable[..., Any]) -> None:
    """Make the twin run `forward`; only this object changes, its class and its paths stay."""
    if isinstance(twin, nn.Embedding) and twin.max_norm is not None:
        forward = functools.partial(_renormalised, twin, forward)
    twin.__dict__["forward"] = forward


def let_inputs_require_grad(root: nn.Module) -> None:
    """Make what input embeddings return require grad, so that a reentrant checkpoint runs its block again.

    torch's reentrant checkpointing asks whether an input of the block requires grad; of a frozen base, none does.
    """
    if torch.is_grad_enabled():
        for embedding in activation_checkpointing.input_embeddings(root):
            embedding.register_forward_hook(_require_grad)


def _require_grad(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_(True)


def _of_mapped(text: str) -> str | None:
    """What to do where the model's own code cannot be transformed; `None` where that is not the matter."""
    if "setup_context staticmethod" in text:
        return (
            "the model has a torch.autograd.Function without setup_context (as Bloom's GELU), which no transform of "
            "torch.func can go through. Use loss.backward(), and index= in place of torch.vmap over adapters."
        )
    if transforms.is_mapping() and ("match the broadcast shape" in text or "vmap: inplace" in text):
        return (
            "torch.vmap maps over something that the model adds in place to a tensor that is not mapped, such as its "
            "input. Use index= in place of torch.vmap over adapters, or map the batch too (in_dims). torch says: "
            f"{text}"
        )
    return None


def explained(error: RuntimeError, checkpointing: bool) -> RuntimeError | None:
    """An error that says what to do where torch's own message does not; `None` where that is clear."""
    text, frame = str(error), error.__traceback__
    while frame is not None and not checkpointing:
        checkpointing = frame.tb_frame.f_code.co_filename.endswith("utils/checkpoint.py")
        frame = frame.tb_next
    own = _of_mapped(text)
    if own is not None and not checkpointing:
        return RuntimeError(own)
    refused = ("saved tensor hooks", "setup_context", "requires_grad_()")
    if checkpointing and any(words in text for words in refused):
        return RuntimeError(
            "torch.func transforms cannot go through activation checkpointing (torch does not support it). Turn it "
            "off for this model (gradient_checkpointing_disable), or train with loss.backward() in place of "
            "torch.func.grad."
        )
    return None
