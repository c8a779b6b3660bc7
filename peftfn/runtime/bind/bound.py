"""`bind`: a module of the base's class that holds adapters, for code that wants a module; `unbind` takes them out."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from peftfn.core.adapter import Adapter, as_tuple
from peftfn.models import activation_checkpointing, copies, layers, surgery, write_protection
from peftfn.models import transformers_names as hf
from peftfn.runtime import attach, attach_call, site_adapters
from peftfn.runtime.bind import binding, parameters, saving
from peftfn.runtime.routing import row_index
from peftfn.weights import codecs, offloaded


def bind(model: nn.Module, adapter: Adapter | Iterable[Adapter], *, index: Any = None) -> Any:
    """A module of the same class and with the same paths as the model, that computes what `apply` does.

    For code that wants a module: `generate()`, `Trainer`, `pipeline`, DDP, FSDP. It shares the base's storage, as
    parameters that never require grad, and keeps copies of everything else (buffers, configs, hooks), so that
    `train()`, `to()`, `load_state_dict()`, `gradient_checkpointing_enable()` and the like never reach the base. Only
    code that writes to a frozen parameter of the bound module by name, in place, would write to the base.

    The parameters that require grad are exactly the adapter's; where some of the given tensors require grad, those
    alone: `pf.leaves(new)`, then `pf.bind(model, (fixed, new))` trains a new adapter over a fixed one. They share
    memory with the adapter's tensors, which an optimizer therefore trains in place; `unbind(bound)` is the adapter as
    the module has it now, also after `to()`. The statistics that a BatchNorm of the base gathers in training stay in
    the bound module: `eval()` such layers.

    Of a transformers model, `bound.save_pretrained(folder)` writes the adapter, as `pf.save(pf.unbind(bound), folder)`
    does, and the base's name: PEFT's two files and no `config.json`. So do the checkpoints of an unchanged `Trainer`,
    beside what it goes on from (`resume_from_checkpoint`, `load_best_model_at_end`): the same tensors under the
    module's own names, which `load_state_dict(..., strict=False)` takes without the base's.
    `bound.save_pretrained(folder, merge=True)` writes a plain model with the adapter merged in; of a quantized base a
    dense one, unless `requantize=True` has it quantized again. A module inside the bound one, or one of another library
    (diffusers), writes merged weights by its own `save_pretrained`.

    A stack is bound with `index`: row n of every batch uses adapter `index[n]`, -1 the bare base, as in `apply`. Of a
    batch with a multiple of these rows each index has a group of them, one group after the other: so `generate()`
    repeats rows for beams and several returned sequences. Binding is cheap: bind again for other rows.

    Args:
        model: the base.
        adapter: one adapter, or several that are active together.
        index: for a stack, the number of the adapter for each row.

    Raises:
        TypeError: the model is bound already, or adapter or index is of the wrong type.
        KeyError, ValueError: an adapter does not fit, or a stack has no index, as in `apply`.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> bound = pf.bind(model, pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])))
        >>> type(bound) is type(model), [name for name, p in bound.named_parameters() if p.requires_grad]
        (True, ['0.lora_A', '0.lora_B'])
    """
    adapters = as_tuple(adapter)
    which = row_index.of_adapters(adapters, index)
    if binding.KEY in model.__dict__:
        raise TypeError("bind was given a bound module; bind the base with a tuple of adapters instead.")
    bound = copies.shared(model, codecs.shared(model))
    for module in bound.modules():
        offloaded.bring(module)
    surgery.run_packed(bound.modules())
    by_path = dict(layers.named_modules(bound, remove_duplicate=False))
    slots = tuple(parameters.Slots(one.replace(params={}, buffers={}), {}, {}) for one in adapters)
    given = (tensor for one in adapters for leaf in one.params.values() for tensor in leaf.values())
    holder = parameters.Holder(by_path, adapters, slots, {}, any(tensor.requires_grad for tensor in given))
    found = {path: parameters.hold(holder, path, here) for path, here in site_adapters.of(adapters, which).items()}
    found = site_adapters.with_ties(found, model)
    for module in bound.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            surgery.keep_norms(module)
    wants_grad = functools.partial(activation_checkpointing.wants_grad, bound)
    surgery.install(attach.attach(bound, by_path, found, wants_grad, lasts=True), by_path, _hold_weight)
    own, fixed = dict(binding.named(model)), {id(one) for one in codecs.shared(model)}
    buffers = {name: one for name, one in model.named_buffers(remove_duplicate=False) if id(one) not in fixed}
    added = frozenset(name for one in holder.slots for name in binding.full_names(one)) - own.keys()
    bound.__dict__[binding.KEY] = binding.Binding(
        holder.slots, added, binding.tied(model), isinstance(adapter, Adapter), buffers
    )
    write_protection.protect(bound, {id(parameter) for parameter in holder.made.values()})
    activation_checkpointing.suit(bound)
    more = attach_call.arguments(found.get("", ()))
    _keep_signatures(by_path, dict(layers.named_modules(model, remove_duplicate=False)), more)
    saving.suit(bound)
    bound.__dict__["_replicate_for_data_parallel"] = _refuse_replicas
    if any(part.method.on_call is not None for here in found.values() for part in here):
        bound.__dict__[hf.GENERATION_MASKS] = hf.mask_as_given
    return bound


def unbind(bound: nn.Module) -> Any:
    """The adapter that a bound module holds now (a tuple, if it was bound with one), sharing its tensors.

    Args:
        bound: what `bind` returned; also inside of DDP or `torch.compile`.

    Raises:
        TypeError: `bind` did not make the module.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> bound = pf.bind(model, pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])))
        >>> with torch.no_grad():
        ...     _ = bound[0].lora_B.fill_(1.0)
        >>> pf.unbind(bound).params["0"]["lora_B"][0]
        tensor([1., 1.])
    """
    inner: Any = bound
    while binding.KEY not in inner.__dict__:  # DDP holds it as `module`, torch.compile as `_orig_mod`
        inner = inner._modules.get("module", inner._modules.get("_orig_mod"))
        if inner is None:
            raise TypeError(f"unbind was given a {type(bound).__name__} that peftfn.bind did not make.")
    made = binding.adapters(inner, dict(binding.named(inner)))
    return made[0] if binding.of(inner).single else made


def _refuse_replicas() -> Any:
    """Say that `nn.DataParallel` cannot copy a bound module: its forwards are those of the module's own objects."""
    raise NotImplementedError(
        "nn.DataParallel copies modules object by object, and the copies of a bound module would compute with the "
        "original's tensors. Use one device (CUDA_VISIBLE_DEVICES=0, before Trainer starts), or "
        "DistributedDataParallel: torchrun --nproc-per-node=2 ..."
    )


def _hold_weight(module: nn.Module, name: str, compute: Callable[[], Tensor]) -> None:
    """Make `module.<name>` a property: the adapted weight, computed from the module's parameters at each reading."""
    computes: dict[str, Callable[[], Tensor]] = module.__dict__.setdefault("_peftfn_weights", {})
    computes[name] = compute
    plain_class = vars(type(module)).get("_peftfn_plain", type(module))
    module.__class__ = _reading(plain_class, tuple(sorted(computes)))


@functools.cache
def _reading(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    own: dict[str, Any] = {name: property(functools.partial(_read, name)) for name in names}
    own |= {"_peftfn_plain": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    own["__reduce__"] = functools.partialmethod(_reduce, cls, names)  # pickle finds a class by its name
    return type(cls.__name__, (cls,), own)


def _reduce(module: nn.Module, cls: type[nn.Module], names: tuple[str, ...]) -> tuple[Any, ...]:
    return _blank, (cls, names), dict(module.__dict__)


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _reading(cls, names)
    return made.__new__(made)


def _read(name: str, module: nn.Module) -> Tensor:
    return module.__dict__["_peftfn_weights"][name]()


def _keep_signatures(by_path: Mapping[str, nn.Module], base: Mapping[str, nn.Module], more: Sequence[str]) -> None:
    """Give the forwards that `bind` set the signature of the base's own, which generate() and Trainer inspect.

    A forward that somebody had set on the base (accelerate, a kernel library) was copied with its signature, or is
    still the base's own object where it refers to nothing in the model. Layers without children are left out: no
    caller inspects them. `more` are arguments for adapters alone, which the base does not know.
    """
    for path, module in by_path.items():
        forward = module.__dict__.get("forward")
        is_ours = isinstance(forward, (functools.partial, types.FunctionType)) and (not path or bool(module._modules))
        if is_ours and forward is not base[path].__dict__.get("forward"):
            cast("Any", forward).__signature__ = _with(_signature(base[path]), more)


def _with(signature: inspect.Signature, names: Sequence[str]) -> inspect.Signature:
    """The signature with more arguments, which have a default."""
    own = list(signature.parameters.values())
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    last = [one for one in own if one.kind is one.VAR_KEYWORD]
    return signature.replace(parameters=[*(one for one in own if one.kind is not one.VAR_KEYWORD), *more, *last])


def _signature(model: nn.Module) -> inspect.Signature:
    """The parameters of the model's forward; where it takes `**kwargs`, those of its class's forward too."""
    said = inspect.signature(model.forward)
    own = list(inspect.signature(type(model).forward).parameters.values())[1:]
    if not any(one.kind is one.VAR_KEYWORD for one in said.parameters.values()):
        return said
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    more = {one.name: one.replace(kind=one.KEYWORD_ONLY) for one in said.parameters.values() if one.kind in named}
    last = [one for one in said.parameters.values() if one.kind is one.VAR_KEYWORD]
    first = [one for one in own if one.kind is not one.VAR_KEYWORD]
    rest = [one for name, one in more.items() if name not in {one.name for one in first}]
    return said.replace(parameters=[*first, *rest, *last])
