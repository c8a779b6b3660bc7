"""A forward or a hook that reaches the base's modules through any object: it runs the private ones, or is refused."""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfn as pf

Call = Callable[..., Any]
CONFIG = pf.LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
CLOSE = 1e-6  # W x + s B A x beside (W + s B A) x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Timed:
    def __init__(self, forward: Call) -> None:
        self.forward = forward

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


class Slots(Timed):
    __slots__ = ("forward",)

    def __init__(self, forward: Call) -> None:
        self.forward = forward


@dataclasses.dataclass(frozen=True)
class Frozen:
    forward: Call


class Circle:
    def __init__(self, forward: Call) -> None:
        self.held = {"a": [types.SimpleNamespace(forward=forward, me=self)]}

    def __call__(self, *args: Any) -> Any:
        return self.held["a"][0].me.held["a"][0].forward(*args)


def closed(keep: Callable[[Call], Any], get: Callable[[Any], Call]) -> Callable[[Call], Call]:
    """A forward that keeps the old one in an object of its closure."""

    def wrapped(forward: Call) -> Call:
        kept = keep(forward)
        return lambda *args: get(kept)(*args)  # noqa: PLW0108  # a forward around the old one

    return wrapped


def attribute(forward: Call) -> Call:
    def run(*args: Any) -> Any:
        return run.old(*args)  # type: ignore[attr-defined]

    run.old = forward  # type: ignore[attr-defined]
    return run


Named = namedtuple("Named", "forward")
FOLLOWED: dict[str, Callable[[Any], Call]] = {
    "a closure": closed(lambda forward: forward, lambda kept: kept),
    "a default": lambda forward: lambda *args, old=forward: old(*args),
    "an attribute of a function": attribute,
    "a callable object": Timed,
    "one with slots": Slots,
    "objects in a circle": Circle,
    "partials": lambda forward: functools.partial(functools.partial(Timed(forward))),
    "an object": closed(lambda f: types.SimpleNamespace(forward=f), lambda kept: kept.forward),
    "a frozen dataclass": closed(Frozen, lambda kept: kept.forward),
    "a named tuple": closed(Named, lambda kept: kept.forward),
    "an OrderedDict": closed(lambda f: OrderedDict(f=f), lambda kept: kept["f"]),
    "a defaultdict": closed(lambda f: defaultdict(list, f=f), lambda kept: kept["f"]),
    "a mapping proxy": closed(lambda f: types.MappingProxyType({"f": f}), lambda kept: kept["f"]),
    "a deque": closed(lambda f: deque([f]), lambda kept: kept[0]),
    "a frozenset": closed(lambda f: frozenset([f]), lambda kept: next(iter(kept))),
    "a long list": closed(lambda f: [f] * 300, lambda kept: kept[-1]),
    "a weak reference": closed(lambda f: weakref.ref(f.__self__), lambda kept: kept().linear),
    "a weak proxy": closed(lambda f: weakref.proxy(f.__self__), lambda kept: kept.linear),
    "a weak method": closed(weakref.WeakMethod, lambda kept: kept()),
}
KEPT: dict[str, Any] = {}


def in_a_global(forward: Call) -> Call:
    KEPT["forward"] = forward
    return lambda *args: KEPT["forward"](*args)  # noqa: PLW0108  # a forward around the old one


def in_a_class(forward: Call) -> Call:
    class Kept:
        old = staticmethod(forward)

    return lambda *args: Kept.old(*args)  # noqa: PLW0108  # a forward around the old one


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block())


@pytest.mark.parametrize("way", FOLLOWED)
def test_a_forward_in_an_object_runs_the_adapted_layer(way: str) -> None:
    base = model()
    adapter = pf.init(base, CONFIG)
    want = pf.apply(base, adapter, X)
    params = pf.merge(dict(base.named_parameters()), adapter)
    base[0].forward = FOLLOWED[way](base[0].forward)  # what was found of the forward before counts no longer
    for got in (pf.apply(base, adapter, X), pf.bind(base, adapter)(X), pf.apply(base, (), X, params=params)):
        torch.testing.assert_close(got, want, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("way", [in_a_global, in_a_class])
def test_what_cannot_be_followed_is_an_error_that_names_the_tensor(way: Callable[[Call], Call]) -> None:
    base = model()
    adapter = pf.init(base, CONFIG)
    pf.apply(base, adapter, X)
    params = pf.merge(dict(base.named_parameters()), adapter)
    base[0].forward = way(base[0].forward)
    for _ in range(2):  # a call that fails is not remembered
        with pytest.raises(ValueError, match=r"0\.linear\.weight: the model's forward runs `linear`"):
            pf.apply(base, adapter, X)
        with pytest.raises(ValueError, match=r"0\.linear\.weight: the model's forward runs `linear`"):
            pf.apply(base, (), X, params=params)


def test_a_hook_that_runs_another_layer_runs_the_adapted_one() -> None:
    base = nn.Sequential(nn.Linear(4, 4), Block())
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return base[1](output)

    adapter = pf.init(base, CONFIG)
    plain = base[0](X)
    merged = torch.func.functional_call(base, pf.merge(dict(base.named_parameters()), adapter), (X,))
    base[0].register_forward_hook(hook)
    weight = pf.merge(dict(base.named_parameters()), adapter)["1.linear.weight"]
    want = nn.functional.linear(merged, weight, base[1].linear.bias)
    torch.testing.assert_close(pf.apply(base, adapter, X), want, atol=CLOSE, rtol=0)
    torch.testing.assert_close(seen[-1], plain, atol=CLOSE, rtol=0)  # what it gathers is the caller's own


def test_a_call_in_which_no_site_runs_is_an_error() -> None:
    class Unread(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    base = Unread()
    adapter = pf.init(base, CONFIG)
    with pytest.raises(ValueError, match="no site of the adapter ran or was read in this call: linear"):
        pf.apply(base, adapter, X)


def test_a_call_that_skips_the_part_where_the_sites_are_is_right() -> None:
    class TwoParts(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.text, self.images = nn.Linear(4, 4), nn.ModuleList(Block() for _ in range(blocks))

        def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
            """(rows, 4), maybe with images -> (rows, 4)."""
            x = self.text(x)
            if image is not None:
                for block in self.images:
                    x = x + block(image)
            return x

    base = TwoParts(2)
    adapter = pf.init(base, CONFIG)
    torch.testing.assert_close(pf.apply(base, adapter, {"x": X}), base(X), atol=CLOSE, rtol=0)
    merged = torch.func.functional_call(base, pf.merge(dict(base.named_parameters()), adapter), (X, X))
    torch.testing.assert_close(pf.apply(base, adapter, {"x": X, "image": X}), merged, atol=CLOSE, rtol=0)

    listed = TwoParts(0)
    listed.images.append(nn.ModuleDict({"linear": nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match="no site of the adapter ran"):
        pf.apply(listed, pf.init(listed, CONFIG), X)


def test_what_a_hook_writes_to_a_variable_of_its_own_is_kept() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
    calls, sizes = 0, []

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        sizes.append(len(list(model.parameters())))  # so that it leads to the base

    model[0].register_forward_pre_hook(count)
    for _ in range(3):
        pf.apply(model, adapter, x)
    assert calls == 3
    assert sizes == [2, 2, 2]


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "mul_": lambda scale: scale.data.mul_(2),
    "*=": lambda scale: scale.data.__imul__(2),
    "a view": lambda scale: scale.detach()[:2].zero_(),
    "a slice": lambda scale: scale.data.__setitem__(0, 5.0),
    "out=": lambda scale: torch.add(scale.data, 1, out=scale.data),
    "nn.init": nn.init.zeros_,
    "several": lambda scale: torch._foreach_add_([scale.data], 1.0),
    "inplace=": lambda scale: nn.functional.elu(scale.data, inplace=True),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_forward_that_writes_to_a_parameter_is_an_error_that_names_it(write: str) -> None:
    class Writing(Block):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(-torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            WRITES[write](self.scale)
            return super().forward(x) * self.scale

    base = Writing()
    with pytest.raises(ValueError, match=r"^scale: the model's forward writes to it"):
        pf.apply(base, pf.init(base, CONFIG), X)
    assert torch.equal(base.scale, -torch.ones(4))
