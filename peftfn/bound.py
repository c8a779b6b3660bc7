"""`bind`: a module of the base's class that holds adapters, for code that wants a module; `unbind` takes them out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftfn import attach, checkpoint, codecs, copies, graft, guards, layers, methods, parts, plain, recompute, stacking
from peftfn.adapter import Adapter, Tree, as_tuple, sorted_tree
from peftfn.config import PeftConfig

_KEY = "_peftfn_binding"

Names = dict[str, dict[str, str]]
"""Full names in the bound module, by site path and leaf name."""


class Slots(NamedTuple):
    """Where a bound module holds one adapter."""

    config: PeftConfig
    params: Names
    buffers: Names


class Binding(NamedTuple):
    """What a bound module knows of its adapters.

    Attributes:
        slots: where each adapter is.
        added: full names of what `bind` put beside the base's own parameters and buffers.
        tied: groups of names that share one parameter in the base.
        single: whether one adapter was given, and not a tuple.
    """

    slots: tuple[Slots, ...]
    added: frozenset[str]
    tied: tuple[tuple[str, ...], ...]
    single: bool


class Held(Mapping[str, Tensor]):
    """A leaf that is read from its module at each use, so that `to`, an optimizer or DDP may put others there."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self._module = module
        self._names = dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self._module, self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def bind(model: nn.Module, adapter: Adapter | Iterable[Adapter]) -> Any:
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

    Raises:
        TypeError: the adapter is a stack, or the model is bound already.
        KeyError, ValueError: it does not fit, as in `apply`.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> bound = pf.bind(model, pf.init(model, pf.LoraConfig(r=2, target_modules=["0"])))
        >>> type(bound) is type(model), [name for name, p in bound.named_parameters() if p.requires_grad]
        (True, ['0.lora_A', '0.lora_B'])
    """
    adapters = as_tuple(adapter)
    if any(isinstance(one.config, stacking.Stacked) for one in adapters):
        raise TypeError("bind was given a stack; bind one of its adapters (peftfn.unstack), or use apply with index=.")
    if _KEY in model.__dict__:
        raise TypeError("bind was given a bound module; bind the base with a tuple of adapters instead.")
    bound = copies.shared(model, codecs.shared(model))
    graft.run_packed(bound.modules())
    by_path = dict(layers.named_modules(bound, remove_duplicate=False))
    holder = _Holder(by_path, adapters, tuple(Slots(one.config, {}, {}) for one in adapters), {})
    held = {path: _hold(holder, path, here) for path, here in parts.of(adapters).items()}
    for module in bound.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            graft.keep_norms(module)
    attach.attach(
        bound, by_path, held, parts.How(hold=_hold_weight, armed=functools.partial(recompute.wants_grad, bound))
    )
    own = {name for name, _ in _named(model)}
    added = frozenset(name for one in holder.slots for name in _full_names(one)) - own
    bound.__dict__[_KEY] = Binding(holder.slots, added, _tied(model), isinstance(adapter, Adapter))
    guards.protect(bound, {id(parameter) for parameter in holder.made.values()})
    recompute.suit(bound)
    _keep_signature(bound)
    _suit_transformers(bound)
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
    def tree(names: Names) -> Tree:
        return sorted_tree(
            {path: {leaf: state[name].detach() for leaf, name in here.items()} for path, here in names.items()}
        )

    binding: Binding = bound.__dict__[_KEY]
    return tuple(Adapter(tree(one.params), tree(one.buffers), one.config) for one in binding.slots)


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _full_names(slots: Slots) -> Iterator[str]:
    for names in (slots.params, slots.buffers):
        for here in names.values():
            yield from here.values()


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


class _Holder(NamedTuple):
    """What `_hold` reads and fills; `made` has the trained parameters, by the id of the adapter's tensor."""

    by_path: Mapping[str, nn.Module]
    adapters: tuple[Adapter, ...]
    slots: tuple[Slots, ...]
    made: dict[int, nn.Parameter]


def _hold(holder: _Holder, path: str, here: list[parts.Part]) -> list[parts.Part]:
    """Register the tensors of one site on its module, and give parts that read them from there."""
    owner = path if path in holder.by_path else path.rpartition(".")[0]
    module = holder.by_path.get(owner)
    if module is None:
        return here  # attach will say that there is no such site
    if any(getattr(hook, "offload", False) for hook in copies.hooks(module)):
        raise ValueError(
            f"accelerate offloads {owner}: it puts its own tensors into the layer at each call, so bind cannot hold an "
            "adapter there. Load the model without offloading, or use apply."
        )
    made: list[parts.Part] = []
    numbers = [n for n, one in enumerate(holder.adapters) if path in one.params or path in one.buffers]
    for number, part in zip(numbers, here, strict=True):
        trained = holder.adapters[number].params.get(path, {})
        short = {name: _attribute(name, path, owner, number, len(holder.adapters)) for name in part.leaf}
        for name, attribute in short.items():
            _register(holder, module, attribute, part.leaf[name], name in trained)
        replaced = {
            name: _parameter(holder, tensor, name in trained) if name in module._parameters else tensor
            for name, tensor in part.replaced.items()
        }
        for name in (*short, *replaced):
            names = holder.slots[number].params if name in trained else holder.slots[number].buffers
            names.setdefault(path, {})[name] = (f"{owner}." if owner else "") + short.get(name, name)
        made.append(part._replace(leaf=Held(module, short), replaced=replaced))
    return made


def _attribute(name: str, path: str, owner: str, number: int, count: int) -> str:
    parameter = "" if path == owner else f"{path.rpartition('.')[2]}_"
    return f"{parameter}{name}" + (f"_{number}" if count > 1 else "")


def _register(holder: _Holder, module: nn.Module, name: str, tensor: Tensor, trained: bool) -> None:
    if hasattr(module, name):
        raise ValueError(
            f"{type(module).__name__} already has an attribute {name!r}; bind cannot put the adapter there."
        )
    if trained:
        module.register_parameter(name, _parameter(holder, tensor, trained))
    else:
        module.register_buffer(name, tensor)


def _parameter(holder: _Holder, tensor: Tensor, trained: bool) -> nn.Parameter:
    if not trained:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    made = holder.made.get(id(tensor))
    if made is None:
        made = holder.made[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=True)
    return made


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
    if len(adapters) == 1 and methods.of(adapters[0].config).kind is not None:
        return checkpoint.save(adapters[0], save_directory)  # nothing to merge: the adapter is what there is to save
    weights, is_apart = plain.merged(bound, state, adapters, binding.tied)
    kept = {name: tensor for name, tensor in weights.items() if name not in binding.added}
    return plain.stand_in(bound, kept, is_apart).save_pretrained(save_directory, *args, **kwargs)
