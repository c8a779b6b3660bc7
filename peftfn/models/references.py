"""What the objects of a model lead to: one that leads to a module made anew, to lead to another module in its place.

A forward that somebody has set may reach the model through anything: a closure, an object of any class, a named tuple,
a weak reference. So whatever Python can be asked about is followed, in one walk that visits each object once. What
cannot be asked (a global name, memory of a C library) is left as it is.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.core import transforms

Memo = dict[int, Any]
"""What stands for an object, by the object's id."""
StandIn = Callable[[Any], Any]
"""What stands for a module or a tensor; the object itself where nothing does."""

_MOST = 20_000  # objects: beyond, it is no part of a forward (a data set, a vocabulary)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_CODE = (types.FunctionType, types.MethodType, functools.partial, weakref.ref)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
# Objects of these hold values alone, or belong to a library that has its own ways with a copy.
_CLOSED = (*transforms.TORCHS_OWN, "torch.jit", "torch.distributed", "threading", "logging", "tokenizers")
_VALUES = ("PreTrainedConfig", "PretrainedConfig", "GenerationConfig", "PreTrainedTokenizerBase")


def redirected(value: Any, stand_in: StandIn, memo: Memo) -> Any:
    """The value, leading to what stands for the modules and tensors that it leads to; itself where it leads to none.

    Args:
        value: an object that is no module and no tensor.
        stand_in: what stands for a module or a tensor.
        memo: what was made of the objects so far. It is added to, also objects that stay as they are.
    """
    if id(value) in memo:
        return memo[id(value)]
    found = _Walk(stand_in)
    found.follow(value)
    for one in found.objects.values():
        if id(one) not in found.leading:
            memo.setdefault(id(one), one)
    return _made(value, found, memo)


def functions(value: Any, stand_in: StandIn, memo: Memo) -> Memo:
    """What `redirected` makes of the functions that an object leads to: `copy.deepcopy` copies none."""
    found = _Walk(stand_in)
    found.follow(value)
    leading = [one for one in found.objects.values() if id(one) in found.leading]
    return {id(one): _made(one, found, memo) for one in leading if isinstance(one, types.FunctionType)}


class _Walk:
    """The objects that one leads to, and which of them lead to something that another stands for."""

    def __init__(self, stand_in: StandIn) -> None:
        self.objects: dict[int, Any] = {}
        self.stand_ins: Memo = {}
        self.leading: set[int] = set()
        self._stand_in = stand_in

    def follow(self, value: Any) -> None:
        parents: dict[int, list[int]] = {}
        left, hits = [value], list[int]()
        while left and len(self.objects) < _MOST:
            one = left.pop()
            if id(one) in self.objects:
                continue
            self.objects[id(one)] = one
            for child in _children(one):
                kind = cast("type[object]", type(child))
                if issubclass(kind, (nn.Module, Tensor)):
                    if self._changes(child):
                        hits.append(id(one))
                elif is_followed(kind):
                    parents.setdefault(id(child), []).append(id(one))
                    left.append(child)
        while hits:
            one = hits.pop()
            if one not in self.leading:
                self.leading.add(one)
                hits += parents.get(one, ())

    def is_changed(self, value: Any) -> bool:
        """Whether another object stands for this one, or it leads to one for which another stands."""
        return id(value) in self.leading or self.stand_ins.get(id(value), value) is not value

    def _changes(self, target: Any) -> bool:
        if id(target) not in self.stand_ins:
            self.stand_ins[id(target)] = self._stand_in(target)
        return self.stand_ins[id(target)] is not target


@functools.cache
def is_followed(kind: type[object]) -> bool:
    """Whether the objects of a class may lead to a module."""
    if issubclass(kind, (*_CONTAINERS, *_CODE, types.MappingProxyType, types.SimpleNamespace)) or kind in _PROXIES:
        return not issubclass(kind, torch.Size)
    if issubclass(kind, (type, types.ModuleType, nn.Module, Tensor)) or kind.__module__.startswith(_CLOSED):
        return False
    if any(one.__name__ in _VALUES for one in kind.__mro__):
        return False
    return kind.__flags__ & _HEAP != 0 and (bool(_slots(kind)) or kind.__dictoffset__ != 0)


_HEAP = 1 << 9  # a class that Python code made: what C made cannot be made again attribute by attribute


def slots(kind: type[object]) -> tuple[str, ...]:
    """The attributes of a class's objects that are not in their `__dict__`."""
    return _slots_of(kind) if torch.compiler.is_compiling() else _slots(kind)


@transforms.constant_result
def _slots_of(kind: type[object]) -> tuple[str, ...]:
    own = [vars(one) for one in kind.__mro__ if "__slots__" in vars(one)]
    return tuple(name for held in own for name in held if isinstance(held[name], types.MemberDescriptorType))


_slots = functools.cache(_slots_of)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, (dict, types.MappingProxyType)):
        named = cast("dict[Any, Any]", value)
        found = [*named.keys(), *named.values()]
    elif isinstance(value, _CONTAINERS):
        found = list(cast("Iterable[Any]", value))
    elif isinstance(value, types.FunctionType):
        defaults, keywords = value.__defaults__ or (), (value.__kwdefaults__ or {}).values()
        return [*_contents(value.__closure__ or ()), *defaults, *keywords, *value.__dict__.values()]
    elif isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        partial = cast("functools.partial[Any]", value)
        found = [partial.func, *partial.args, *partial.keywords.values()]
    elif isinstance(value, weakref.WeakMethod):
        method = cast("types.MethodType | None", value())
        return [] if method is None else [method.__self__]
    elif isinstance(value, weakref.ref) or type(value) in _PROXIES:
        return [_referent(value)]
    else:
        found = list[Any]()
    return found + _attributes(value)


def _attributes(value: Any) -> list[Any]:
    own = getattr(value, "__dict__", None)
    found = list(cast("dict[str, Any]", own).values()) if type(own) is dict else list[Any]()
    return found + [getattr(value, name) for name in _slots(cast("type[object]", type(value))) if hasattr(value, name)]


def _contents(cells: Iterable[types.CellType]) -> list[Any]:
    found: list[Any] = []
    for cell in cells:
        try:
            found.append(cell.cell_contents)
        except ValueError:  # empty: a name that is set later
            continue
    return found


def _referent(value: Any) -> Any:
    if isinstance(value, weakref.ref):
        return cast("weakref.ref[Any]", value)()
    return getattr(value.__repr__, "__self__", None)  # a proxy's: it passes everything else on


def _made(value: Any, found: _Walk, memo: Memo) -> Any:
    """The object in the copy; those in a circle are there before what they hold is."""
    if id(value) in found.stand_ins:
        return found.stand_ins[id(value)]
    if id(value) in memo or id(value) not in found.leading:
        return memo.get(id(value), value)
    made = functools.partial(_made, found=found, memo=memo)
    try:
        if isinstance(value, types.FunctionType):
            new = _function(value, found.is_changed, made, memo)
        else:
            new = (_code if issubclass(cast("type[object]", type(value)), _CODE) else _filled)(value, made, memo)
    except TypeError:  # its class cannot be made so
        new = value
    return memo.setdefault(id(value), new)


def _code(value: Any, made: Callable[[Any], Any], _: Memo) -> Any:
    """Another method, partial function or weak reference, to what stands for what this one leads to."""
    kind = cast("type[Any]", type(value))
    if isinstance(value, types.MethodType):
        return types.MethodType(made(value.__func__), made(value.__self__))
    if isinstance(value, functools.partial):
        partial = cast("functools.partial[Any]", value)
        new = kind(made(partial.func), *map(made, partial.args), **{k: made(v) for k, v in partial.keywords.items()})
        new.__dict__.update({name: made(one) for name, one in value.__dict__.items()})
        return new
    if isinstance(value, weakref.WeakMethod):
        method = cast("types.MethodType", value())
        return kind(types.MethodType(method.__func__, made(method.__self__)))
    return kind(made(value()), *((value.key,) if isinstance(value, weakref.KeyedRef) else ()))


def _function(
    value: types.FunctionType, is_changed: Callable[[Any], bool], made: Callable[[Any], Any], memo: Memo
) -> types.FunctionType:
    """Another function. A variable that leads to no module is the same one: what is written to it (a count) is kept."""
    old = value.__closure__ or ()
    cells = tuple(types.CellType() if any(map(is_changed, _contents([cell]))) else cell for cell in old)
    new = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = new
    for cell, before in zip(cells, old, strict=True):
        if cell is not before:
            cell.cell_contents = made(before.cell_contents)
    new.__defaults__ = None if value.__defaults__ is None else tuple(map(made, value.__defaults__))
    given = value.__kwdefaults__
    new.__kwdefaults__ = None if given is None else {name: made(one) for name, one in given.items()}
    new.__dict__.update({name: made(one) for name, one in value.__dict__.items()})
    new.__qualname__, new.__module__, new.__annotations__ = value.__qualname__, value.__module__, value.__annotations__
    return new


def _filled(value: Any, made: Callable[[Any], Any], memo: Memo) -> Any:
    """Another object of the class, with what stands for what this one holds."""
    kind = cast("type[Any]", type(value))
    if kind in _PROXIES:
        return weakref.proxy(made(_referent(value)))
    if isinstance(value, types.MappingProxyType):
        named = cast("types.MappingProxyType[Any, Any]", value)
        return types.MappingProxyType({key: made(one) for key, one in named.items()})
    if isinstance(value, (tuple, frozenset)):
        home = cast("Any", tuple if isinstance(value, tuple) else frozenset)
        new = home.__new__(kind, [made(one) for one in cast("Iterable[Any]", value)])
    else:
        new = memo[id(value)] = _blank(value, kind)
        _fill(new, value, made)
    _set_attributes(new, value, made)
    return new


def _set_attributes(new: Any, value: Any, made: Callable[[Any], Any]) -> None:
    for name, one in getattr(value, "__dict__", {}).items():
        new.__dict__[name] = made(one)
    for name in _slots(cast("type[object]", type(value))):
        if hasattr(value, name):
            object.__setattr__(new, name, made(getattr(value, name)))


def _blank(value: Any, kind: type[Any]) -> Any:
    if isinstance(value, defaultdict):
        new = cast("Any", defaultdict).__new__(kind)
        new.default_factory = cast("defaultdict[Any, Any]", value).default_factory
        return new
    if isinstance(value, deque):
        return kind(maxlen=cast("deque[Any]", value).maxlen)
    home = next(
        (one for one in (OrderedDict, dict, list, set, types.SimpleNamespace) if isinstance(value, one)), object
    )
    return cast("Any", home).__new__(kind)


def _fill(new: Any, value: Any, made: Callable[[Any], Any]) -> None:
    if isinstance(value, dict):
        put = cast("Any", OrderedDict if isinstance(value, OrderedDict) else dict).__setitem__
        for key, one in cast("dict[Any, Any]", value).items():
            put(new, made(key), made(one))
    elif isinstance(value, set):
        set[Any].update(new, [made(one) for one in cast("set[Any]", value)])
    elif isinstance(value, (list, deque)):
        new.extend([made(one) for one in cast("Iterable[Any]", value)])
