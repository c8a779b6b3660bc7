"""`bind`: a module of the base's class that holds adapters, for code that wants a module; `unbind` takes them out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftfn import attach, graft, layers, stacking
from peftfn.adapter import Adapter, Tree, as_tuple
from peftfn.merge import merge

_KEY = "_peftfn_binding"


class Binding(NamedTuple):
    """What a bound module keeps of its adapters.

    Attributes:
        adapters: as they were given.
        names: for each adapter and site, leaf name -> the attribute's full name in the bound module.
        added: full names of what `bind` put beside the base's own parameters and buffers.
        single: whether one adapter was given, and not a tuple.
    """

    adapters: tuple[Adapter, ...]
    names: tuple[dict[tuple[str, str], str], ...]
    added: frozenset[str]
    single: bool


class Held(Mapping[str, Tensor]):
    """A leaf that is read from its module at each use, so that `to`, an optimizer or DDP may put others there."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self._module = module
        self._names = dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self._module, self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def bind(model: nn.Module, adapter: Adapter | Iterable[Adapter]) -> Any:
    """A module of the same class and with the same paths as the model, that computes what `apply` does.

    For code that wants a module: `generate()`, `Trainer`, `pipeline`, DDP, FSDP. It shares the base's storage, as
    parameters that never require grad, and keeps copies of everything else (buffers, configs, hooks), so that
    `train()`, `eval()`, `to()`, `gradient_checkpointing_enable()` and the like never reach the base.

    The parameters that require grad are exactly the adapter's. They share memory with the adapter's tensors, which an
    optimizer therefore trains in place; `unbind(bound)` is the adapter as the module has it now, also after `to()`.

    `bound.save_pretrained(folder)` writes a plain model with the adapter merged in; `pf.save(pf.unbind(bound),
    folder)` writes the adapter.

    Raises:
        TypeError: the adapter is a stack.
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
    bound = _copy(model)
    by_path = dict(layers.named_modules(bound, remove_duplicate=False))
    found = attach.parts(adapters)
    names = tuple({} for _ in adapters)
    held = {path: _hold(by_path, path, here, adapters, names) for path, here in found.items()}
    _keep_embedding_norms(bound)
    attach.attach(bound, by_path, held, _hold_weight, armed=True)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    added = frozenset(full for one in names for full in one.values()) - own
    bound.__dict__[_KEY] = Binding(adapters, names, added, isinstance(adapter, Adapter))
    _override(bound)
    return bound


def unbind(bound: nn.Module) -> Any:
    """The adapter that a bound module holds now (a tuple, if it was bound with one), sharing its tensors."""
    binding: Binding | None = bound.__dict__.get(_KEY)
    if binding is None:
        raise TypeError(f"unbind was given a {type(bound).__name__} that peftfn.bind did not make.")
    state = dict(bound.named_parameters(remove_duplicate=False)) | dict(bound.named_buffers(remove_duplicate=False))
    return _taken(binding, state)


def _taken(binding: Binding, state: Mapping[str, Tensor]) -> Any:
    made: list[Adapter] = []
    for adapter, names in zip(binding.adapters, binding.names, strict=True):
        trees: list[Tree] = [
            {path: {name: state[names[path, name]].detach() for name in leaf} for path, leaf in tree.items()}
            for tree in (adapter.params, adapter.buffers)
        ]
        made.append(adapter.replace(params=trees[0], buffers=trees[1]))
    return made[0] if binding.single else tuple(made)


def _copy(model: nn.Module, again: bool = False) -> Any:
    """A copy of everything but the parameters' storage."""
    if _KEY in model.__dict__ and not again:
        raise TypeError("bind was given a bound module; bind the base with a tuple of adapters instead.")
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        packed = type(parameter) not in (nn.Parameter, Tensor)  # e.g. Params4bit, which detaching would unpack
        alias = parameter if packed else nn.Parameter(parameter.detach(), requires_grad=False)
        memo[id(parameter)] = alias
    return copy.deepcopy(model, memo)


def _hold(
    by_path: Mapping[str, nn.Module],
    path: str,
    here: list[attach.Part],
    adapters: tuple[Adapter, ...],
    names: tuple[dict[tuple[str, str], str], ...],
) -> list[attach.Part]:
    """Register the tensors of one site on its module, and give parts that read them from there."""
    owner = path if path in by_path else path.rpartition(".")[0]
    module = by_path.get(owner)
    if module is None:
        return here  # attach will say that there is no such site
    made: list[attach.Part] = []
    numbers = [n for n, one in enumerate(adapters) if path in one.params or path in one.buffers]
    for number, part in zip(numbers, here, strict=True):
        short = {name: _attribute(name, path, owner, number, len(adapters)) for name in part.leaf}
        trained = adapters[number].params.get(path, {})
        for name, attribute in short.items():
            _register(module, attribute, part.leaf[name], name in trained)
        replaced = {name: _parameter(t) if name in trained else t for name, t in part.replaced.items()}
        dotted = f"{owner}." if owner else ""
        for name in [*short, *replaced]:
            names[number][path, name] = dotted + short.get(name, name)
        made.append(part._replace(leaf=Held(module, short), replaced=replaced))
    return made


def _attribute(name: str, path: str, owner: str, number: int, count: int) -> str:
    parameter = "" if path == owner else f"{path.rpartition('.')[2]}_"
    return f"{parameter}{name}" + (f"_{number}" if count > 1 else "")


def _register(module: nn.Module, name: str, tensor: Tensor, trained: bool) -> None:
    if hasattr(module, name):
        raise ValueError(
            f"{type(module).__name__} already has an attribute {name!r}; bind cannot put the adapter there."
        )
    if trained:
        module.register_parameter(name, _parameter(tensor))
    else:
        module.register_buffer(name, tensor)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=True)


def _keep_embedding_norms(bound: nn.Module) -> None:
    for module in bound.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            graft.keep_norms(module)


def _hold_weight(module: nn.Module, name: str, compute: Callable[[], Tensor]) -> None:
    """Make `module.<name>` the adapted weight, computed at each reading from the parameters that are there then."""
    computes: dict[str, Callable[[], Tensor]] = module.__dict__.setdefault("_peftfn_weights", {})
    computes[name] = compute
    module.__class__ = _reading(type(module), tuple(sorted(computes)))


@functools.cache
def _reading(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    plain = cls.__mro__[1] if "_peftfn_plain" in vars(cls) else cls
    read = {name: property(functools.partial(_read, name)) for name in names}
    return type(plain.__name__, (plain,), {**read, "_peftfn_plain": plain, "__module__": plain.__module__})


def _read(name: str, module: nn.Module) -> Tensor:
    return module.__dict__["_peftfn_weights"][name]()


def _override(bound: nn.Module) -> None:
    own = bound.__dict__
    own["load_state_dict"] = functools.partial(_load_state_dict, bound)
    if hasattr(type(bound), "save_pretrained"):
        own["save_pretrained"] = functools.partial(_save_pretrained, bound)
    if hasattr(type(bound), "gradient_checkpointing_enable"):
        own["gradient_checkpointing_enable"] = functools.partial(_checkpoint, bound)
        if any(getattr(module, "gradient_checkpointing", False) for module in bound.modules()):
            cast("Any", bound).enable_input_require_grads()


def _checkpoint(bound: Any, *args: Any, **kwargs: Any) -> None:
    type(bound).gradient_checkpointing_enable(bound, *args, **kwargs)
    bound.enable_input_require_grads()  # else a reentrant checkpoint of a frozen base gives no gradients


def _leaf_names(bound: nn.Module) -> set[str]:
    binding: Binding = bound.__dict__[_KEY]
    return {full for names in binding.names for full in names.values()}


def _load_state_dict(bound: nn.Module, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
    """Take the adapter's tensors from a state dict; the base's are the base's, and stay."""
    own = _leaf_names(bound)
    given = {name: tensor for name, tensor in state.items() if name in own}
    if not given or (strict and own - given.keys()):
        raise ValueError(
            "load_state_dict on a bound module takes the adapter's tensors, and these were not in what was given "
            f"({sorted(own - given.keys())[:3]}, ...): the base is shared and is never written to. To go on from saved "
            "weights, load the adapter (peftfn.load) or the base, and bind again."
        )
    result = nn.Module.load_state_dict(bound, given, strict=False, assign=assign)
    missing = [name for name in result.missing_keys if name in own]
    return type(result)(missing, [name for name in state if name not in own and name not in bound.state_dict()])


def _save_pretrained(bound: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """Write a plain model folder, the adapter merged in, that `from_pretrained` loads with the same outputs."""
    plain = merged(bound, kwargs.pop("state_dict", None))
    return plain.save_pretrained(save_directory, *args, **kwargs)


def merged(bound: nn.Module, state: Mapping[str, Tensor] | None = None) -> Any:
    """A plain model of the bound module's class, with its adapters merged into new weights.

    Args:
        bound: what `bind` made.
        state: its state dict, where the module itself holds only a part of it (FSDP).

    Raises:
        ValueError: an adapter that has no merged form; the message says why.
    """
    binding: Binding = bound.__dict__[_KEY]
    if state is None:
        state = dict(bound.named_parameters(remove_duplicate=False)) | dict(bound.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        weights = merge(dict(state), _taken(binding, state), model=bound)
    plain = _copy(bound, again=True)
    _strip(plain, binding.added)
    _fill(plain, weights)
    return plain


def _strip(plain: nn.Module, added: frozenset[str]) -> None:
    """Take out what `bind` put in."""
    for path, module in layers.named_modules(plain):
        own = module.__dict__
        for name in ("forward", "load_state_dict", "save_pretrained", "gradient_checkpointing_enable", _KEY):
            own.pop(name, None)
        own.pop("_peftfn_weights", None)
        module.__class__ = vars(type(module)).get("_peftfn_plain", type(module))
        for home in (own["_parameters"], own["_buffers"]):
            for name in [name for name in home if (f"{path}.{name}" if path else name) in added]:
                del home[name]


def _fill(plain: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give each parameter its merged value; names that shared a tensor and no longer do come apart."""
    made: dict[int, nn.Parameter] = {}
    tied: dict[int, set[int]] = {}
    for path, module in layers.named_modules(plain, remove_duplicate=False):
        for name, old in list(module._parameters.items()):
            if old is None:
                continue
            new = weights[f"{path}.{name}" if path else name]
            parameter = made.setdefault(id(new), nn.Parameter(new.detach(), requires_grad=False))
            tied.setdefault(id(old), set()).add(id(parameter))
            module._parameters[name] = parameter
    config: Any = getattr(plain, "config", None)
    if config is not None and any(len(values) > 1 for values in tied.values()):
        config.tie_word_embeddings = False
