"""`bind`: a module of the base's class that holds adapters, for code that wants a module; `unbind` takes them out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftfn import (
    attach,
    checkpoint,
    codecs,
    copies,
    graft,
    guards,
    held,
    layers,
    methods,
    offloaded,
    parts,
    plain,
    recompute,
    rows,
    stacking,
)
from peftfn import transformers_names as hf
from peftfn.adapter import Adapter, Tree, as_tuple, sorted_tree

_KEY = "_peftfn_binding"


class Binding(NamedTuple):
    """What a bound module knows of its adapters.

    Attributes:
        slots: where each adapter is.
        added: full names of what `bind` put beside the base's own parameters and buffers.
        tied: groups of names that share one parameter in the base.
        single: whether one adapter was given, and not a tuple.
    """

    slots: tuple[held.Slots, ...]
    added: frozenset[str]
    tied: tuple[tuple[str, ...], ...]
    single: bool


def bind(model: nn.Module, adapter: Adapter | Iterable[Adapter], *, index: Any = None) -> Any:
    """A module of the same class and with the same paths as the model, that computes what `apply` does.

    For code that wants a module: `generate()`, `Trainer`, `pipeline`, DDP, FSDP. It shares the base's storage, as
    parameters that never require grad, and keeps copies of everything else (buffers, configs, hooks), so that
    `train()`, `to()`, `load_state_dict()`, `gradient_checkpointing_enable()` and the like never reach the base. Only
    code that writes to a frozen parameter of the bound module by name, in place, would write to the base.

    The parameters that require grad are exactly the adapter's. They share memory with the adapter's tensors, which an
    optimizer therefore trains in place; `unbind(bound)` is the adapter as the module has it now, also after `to()`.
    The statistics that a BatchNorm of the base gathers in training stay in the bound module: `eval()` such layers.

    `bound.save_pretrained(folder)` writes a plain model with the adapter merged in, and so do `Trainer`'s
    checkpoints; `pf.save(pf.unbind(bound), folder)` writes the adapter. A prompt or a prefix cannot be merged: there
    `save_pretrained` writes the adapter, too.

    A stack is bound with `index`: row n of every batch uses adapter `index[n]`, -1 the bare base, as in `apply`. Of a
    batch with a multiple of these rows each index has a group of them, one group after the other: so `generate()`
    repeats rows for beams and several returned sequences. Binding is cheap: bind again for other rows.

    Args:
        model: the base.
        adapter: one adapter, or several that are active together.
        index: for a stack, the number of the adapter for each row.

    Raises:
        TypeError: the model is bound already, or index is of the wrong type.
        KeyError, ValueError: it does not fit, as in `apply`.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> bound = pf.bind(model, pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])))
        >>> type(bound) is type(model), [name for name, p in bound.named_parameters() if p.requires_grad]
        (True, ['0.lora_A', '0.lora_B'])
    """
    adapters = as_tuple(adapter)
    which = rows.of_adapters(adapters, index)
    if _KEY in model.__dict__:
        raise TypeError("bind was given a bound module; bind the base with a tuple of adapters instead.")
    bound = copies.shared(model, codecs.shared(model))
    for module in bound.modules():
        offloaded.bring(module)
    graft.run_packed(bound.modules())
    by_path = dict(layers.named_modules(bound, remove_duplicate=False))
    holder = held.Holder(by_path, adapters, tuple(held.Slots(one.config, {}, {}) for one in adapters), {})
    found = {path: held.hold(holder, path, here) for path, here in parts.of(adapters, which).items()}
    for module in bound.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            graft.keep_norms(module)
    attach.attach(
        bound, by_path, found, parts.How(hold=_hold_weight, armed=functools.partial(recompute.wants_grad, bound))
    )
    own = {name for name, _ in _named(model)}
    added = frozenset(name for one in holder.slots for name in _full_names(one)) - own
    bound.__dict__[_KEY] = Binding(holder.slots, added, _tied(model), isinstance(adapter, Adapter))
    guards.protect(bound, {id(parameter) for parameter in holder.made.values()})
    recompute.suit(bound)
    _keep_signature(bound)
    _suit_transformers(bound)
    if any(part.method.kind == layers.MODEL for here in found.values() for part in here):
        bound.__dict__[hf.GENERATION_MASKS] = hf.mask_as_given
    return bound


def unbind(bound: nn.Module) -> Any:
    """The adapter that a bound module holds now (a tuple, if it was bound with one), sharing its tensors."""
    inner: Any = bound
    while _KEY not in inner.__dict__:  # DDP holds it as `module`, torch.compile as `_orig_mod`
        inner = inner._modules.get("module", inner._modules.get("_orig_mod"))
        if inner is None:
            raise TypeError(f"unbind was given a {type(bound).__name__} that peftfn.bind did not make.")
    made = _taken(inner, dict(_named(inner)))
    return made[0] if inner.__dict__[_KEY].single else made


def _taken(bound: nn.Module, state: Mapping[str, Tensor]) -> tuple[Adapter, ...]:
    def tree(names: held.Names) -> Tree:
        return sorted_tree(
            {path: {leaf: state[name].detach() for leaf, name in here.items()} for path, here in names.items()}
        )

    binding: Binding = bound.__dict__[_KEY]
    return tuple(Adapter(tree(one.params), tree(one.buffers), one.config) for one in binding.slots)


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _full_names(slots: held.Slots) -> Iterator[str]:
    for names in (slots.params, slots.buffers):
        for here in names.values():
            yield from here.values()


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _hold_weight(module: nn.Module, name: str, compute: Callable[[], Tensor]) -> None:
    """Make `module.<name>` the adapted weight, computed at each reading from the parameters that are there then."""
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


def _keep_signature(bound: nn.Module) -> None:
    """Let a forward that `bind` set say what the class's own says: generate() and Trainer ask what it takes."""
    forward = bound.__dict__.get("forward")
    if forward is not None:
        own = inspect.signature(type(bound).forward)
        forward.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])


def _suit_transformers(bound: nn.Module) -> None:
    """What a transformers model needs beside: to be saved merged, and to be trained where it is quantized."""
    if hasattr(bound, "save_pretrained"):
        bound.__dict__["save_pretrained"] = functools.partial(_save_pretrained, bound)
    if getattr(bound, "is_quantized", False):
        bound.__dict__["_hf_peft_config_loaded"] = True  # else Trainer says that a quantized model cannot be trained


def _save_pretrained(bound: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Write a plain model folder, the adapter merged in, that `from_pretrained` loads with the same outputs.

    A prompt changes no weight: then the folder is that of the adapter, as `pf.save` writes it.
    """
    binding: Binding = bound.__dict__[_KEY]
    state = kwargs.pop("state_dict", None)  # given where the module itself holds only a part of it (FSDP)
    state = bound.state_dict() if state is None else state
    adapters = _taken(bound, dict(_named(bound)) | dict(state))
    if any(isinstance(one.config, stacking.Stacked) for one in adapters):
        raise TypeError(
            "save_pretrained of a module bound to a stack: it has no one set of weights. Save its adapters one by one: "
            "for adapter in peftfn.unstack(peftfn.unbind(bound)): peftfn.save(adapter, folder)."
        )
    if len(adapters) == 1 and methods.of(adapters[0].config).kind is not None:
        return checkpoint.save(adapters[0], save_directory)  # nothing to merge: the adapter is what there is to save
    weights, is_apart = plain.merged(bound, state, adapters, binding.tied)
    kept = {name: tensor for name, tensor in weights.items() if name not in binding.added}
    return plain.stand_in(bound, kept, is_apart).save_pretrained(save_directory, *args, **kwargs)
