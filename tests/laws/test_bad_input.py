"""Bad input: each kind has its own clear error, and leaves the base and the adapters as they were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import pytest
import torch
from same import adapter_of, bits, flat
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf

LIN0 = ["lin0"]


class World(NamedTuple):
    """A base, adapters for it, models that they are not for, and a batch."""

    model: nn.Module
    adapter: pf.Adapter
    other: pf.Adapter
    headed: pf.Adapter
    stack: pf.Adapter
    stranger: nn.Module
    meta: nn.Module
    x: Tensor


def make_world() -> World:
    model = mlp()
    adapter = adapter_of(model, target_modules=LIN0)
    other = adapter_of(model, r=3, target_modules=LIN0)
    headed = adapter_of(model, target_modules=LIN0, modules_to_save=["lin1"])
    stranger = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    stack = pf.stack([adapter, other])
    return World(model, adapter, other, headed, stack, stranger, mlp().to("meta"), torch.ones(3, 4))


def mlp() -> nn.Module:
    return nn.Sequential(OrderedDict(lin0=nn.Linear(4, 6), act=nn.ReLU(), lin1=nn.Linear(6, 3)))


def config(**options: Any) -> pf.LoraConfig:
    return pf.LoraConfig(**options)


def init(w: World, **options: Any) -> pf.Adapter:
    return pf.init(w.model, config(**options))


def apply(w: World, adapter: Any = None, **options: Any) -> Any:
    """The world's own call, but for what is given."""
    given: dict[str, Any] = {"model": w.model, "batch": w.x, **options}
    return pf.apply(adapter=w.adapter if adapter is None else adapter, **given)


def merge(w: World, adapter: Any) -> Any:
    return pf.merge(w.model.state_dict(), adapter)


def edited(adapter: pf.Adapter, path: str, **tensors: Any) -> pf.Adapter:
    """The adapter with other tensors at a site; `None` takes one away."""
    leaf = {name: t for name, t in (adapter.params.get(path, {}) | tensors).items() if t is not None}
    return adapter.replace(params={**adapter.params, path: leaf})


# What the error says, " ... " where something stands between; and what brings it about.
Table = dict[str, Callable[[World], Any]]

CONFIGS: Table = {
    "TypeError: LoraConfig has no field 'lora_alfa'. Did you mean lora_alpha": lambda w: config(lora_alfa=2),
    "ValueError: LoraConfig(monteclora_config={'num_samples': 4}): ... does not support it yet": lambda w: config(
        monteclora_config={"num_samples": 4}
    ),
    "ValueError: r=0; expected a positive integer": lambda w: config(r=0),
    "ValueError: r=-1; expected a positive integer": lambda w: config(rank_pattern={"lin0": -1}),
    "TypeError: LoraConfig(r='8'): expected int": lambda w: config(r="8"),
    "TypeError: LoraConfig(r=2.5): expected int": lambda w: config(r=2.5),
    "TypeError: LoraConfig(r=True): expected int": lambda w: config(r=True),
    "TypeError: LoraConfig(r=None): expected int": lambda w: config(r=None),
    "TypeError: LoraConfig(lora_alpha='16'): expected float": lambda w: config(lora_alpha="16"),
    "TypeError: LoraConfig(lora_dropout='0.1'): expected float": lambda w: config(lora_dropout="0.1"),
    "TypeError: LoraConfig(use_rslora='yes'): expected bool": lambda w: config(use_rslora="yes"),
    "ValueError: lora_dropout=1.5; expected a probability": lambda w: config(lora_dropout=1.5),
    "ValueError: lora_dropout=-1; expected a probability": lambda w: config(lora_dropout=-1),
    "ValueError: bias='some'; expected 'none', 'all' or 'lora_only'": lambda w: config(bias="some"),
    "ValueError: task_type='SEQ' is unknown; expected one of SEQ_CLS": lambda w: config(task_type="SEQ"),
    "ValueError: init_lora_weights='ones'; expected True": lambda w: config(init_lora_weights="ones"),
    "ValueError: init_lora_weights='pissa' goes with a base": lambda w: config(init_lora_weights="pissa"),
    "TypeError: LoraConfig(modules_to_save='lin1'): expected": lambda w: config(modules_to_save="lin1"),
    "TypeError: LoraConfig(target_parameters='w'): expected": lambda w: config(target_parameters="w"),
    "TypeError: LoraConfig(target_modules=[0]): expected": lambda w: config(target_modules=[0]),
    "TypeError: LoraConfig(rank_pattern={'q': 1.5}): expected": lambda w: config(rank_pattern={"q": 1.5}),
    "ValueError: LoraConfig(target_modules='*.q'): '*.q' is no regex": lambda w: config(target_modules="*.q"),
    "ValueError: LoraConfig(alpha_pattern={'(': 1}): '(' is no regex": lambda w: config(alpha_pattern={"(": 1}),
    "ValueError: layers_pattern='h' needs layers_to_transform": lambda w: config(layers_pattern="h"),
    "ValueError: layers_to_transform cannot be used with target_modules='q', a string": lambda w: config(
        target_modules="q", layers_to_transform=[1]
    ),
}

INITS: Table = {
    "ValueError: ['lin_0'] matched no module ... 'lin0' (1)": lambda w: init(w, target_modules=["lin_0"]),
    "ValueError: ['lni1'] matched no module ... 'lin1' (1)": lambda w: init(w, target_modules=["lin0", "lni1"]),
    "ValueError: target_modules='lin' matched no module": lambda w: init(w, target_modules="lin"),
    "ValueError: target_modules=[] matched no module": lambda w: init(w, target_modules=[]),
    "ValueError: target_modules is not given and there is no default for a Sequential; pass": init,
    "ValueError: names 'act', a ReLU; expected a linear": lambda w: init(w, target_modules=["act"]),
    "ValueError: modules_to_save names ['head'], which match no module": lambda w: init(
        w, target_modules=LIN0, modules_to_save=["head"]
    ),
    "ValueError: matched only modules that exclude_modules or modules_to_save takes away": lambda w: init(
        w, target_modules=LIN0, exclude_modules=LIN0
    ),
    "ValueError: rank_pattern has 'lin1', which matches none of the 1 sites": lambda w: init(
        w, target_modules=LIN0, rank_pattern={"lin1": 3}
    ),
    "ValueError: target_parameters names 'lin0.wieght', which matches no parameter": lambda w: init(
        w, target_parameters=["lin0.wieght"]
    ),
    "ValueError: init_lora_weights='orthogonal' is read from files only": lambda w: init(
        w, target_modules=LIN0, init_lora_weights="orthogonal"
    ),
    "TypeError: config is a dict; expected one of: LoraConfig": lambda w: pf.init(w.model, anything({"r": 8})),
    "TypeError: config is peft's LoraConfig; expected one of peftfn's": lambda w: pf.init(
        w.model, anything(peft.LoraConfig())
    ),
}

APPLIES: Table = {
    "TypeError: batch is a mapping with keys [0] of type int; expected": lambda w: apply(w, batch={0: w.x}),
    "ValueError: batch is an empty dict; expected the model's inputs": lambda w: apply(w, batch={}),
    "ValueError: batch is an empty tuple; expected the model's inputs": lambda w: apply(w, batch=()),
    "TypeError: batch is a NoneType; expected a mapping": lambda w: apply(w, batch=None),
    "TypeError: batch is a str; expected a mapping": lambda w: apply(w, batch="text"),
    "TypeError: batch is a ndarray; expected a mapping": lambda w: apply(w, batch=w.x.numpy()),
    "TypeError: adapter is a dict; expected a peftfn.Adapter": lambda w: apply(w, w.adapter.params),
    "TypeError: adapter is a LoraConfig; expected a peftfn.Adapter": lambda w: apply(w, w.adapter.config),
    "TypeError: adapter is a list of str; expected a peftfn.Adapter": lambda w: apply(w, ["lora"]),
    "TypeError: adapter is a Sequential; expected a peftfn.Adapter": lambda w: apply(w, w.model, model=w.adapter),
    "KeyError: has a site 'lin0', which Sequential does not have ... another architecture": lambda w: apply(
        w, model=w.stranger
    ),
    "ValueError: the adapter acts on 'act', which is a ReLU here": lambda w: apply(
        w, edited(w.adapter, "act", **w.adapter.params["lin0"])
    ),
    "ValueError: lin0: the adapter has lora_A (2, 5) and lora_B (6, 2), expected lora_A (2, 4) ... (6, 2)": lambda w: (
        apply(w, edited(w.adapter, "lin0", lora_A=torch.ones(2, 5)))
    ),
    "ValueError: lin1.weight: the adapter has shape (2, 6), the model (3, 6)": lambda w: apply(
        w, edited(w.headed, "lin1", weight=torch.ones(2, 6))
    ),
    "ValueError: lin0: the adapter has lora_A, expected lora_A and lora_B for a linear": lambda w: apply(
        w, edited(w.adapter, "lin0", lora_B=None)
    ),
    "KeyError: replaces lin0.lora_C, which this Linear does not have": lambda w: apply(
        w, edited(w.adapter, "lin0", lora_C=torch.ones(1))
    ),
    "ValueError: two of the active adapters replace lin1": lambda w: apply(w, (w.headed, w.headed)),
    "KeyError: params has ['lin9.weight'], which Sequential does not have": lambda w: apply(
        w, params={"lin9.weight": w.x}
    ),
    "ValueError: on the meta device and params has no value for 3 of its tensors: lin0.bias": lambda w: apply(
        w, model=w.meta, params={"lin0.weight": torch.ones(6, 4)}
    ),
}

STACKS: Table = {
    "ValueError: is a stack of 2; pass index= ... torch.vmap": lambda w: apply(w, w.stack),
    "ValueError: 0 of the adapters are stacks; expected exactly one": lambda w: apply(w, index=[0, 0, 0]),
    "ValueError: 2 of the adapters are stacks; expected exactly one": lambda w: apply(w, (w.stack, w.stack), index=[0]),
    "ValueError: from 0 to 2; this stack has adapters 0 to 1": lambda w: apply(w, w.stack, index=[0, 1, 2]),
    "ValueError: from -2 to 1; this stack has adapters 0 to 1": lambda w: apply(w, w.stack, index=[0, 1, -2]),
    "TypeError: index ... dtype torch.float32; expected one integer": lambda w: apply(w, w.stack, index=[0.0, 1, 1]),
    "TypeError: index ... dtype torch.bool; expected one integer": lambda w: apply(w, w.stack, index=[True] * 3),
    "TypeError: index has shape () and dtype torch.int64; expected": lambda w: apply(w, w.stack, index=1),
    "ValueError: index has shape (2,) and the batch has tensors of": lambda w: apply(w, w.stack, index=[0, 1]),
    "ValueError: stack was given no adapter": lambda w: pf.stack([]),
    "ValueError: stack was given a stack; expected single adapters": lambda w: pf.stack([w.stack, w.stack]),
    "ValueError: only some of the adapters replace lin1": lambda w: pf.stack([w.adapter, w.headed]),
    "ValueError: lora_dropout of ['0.0', '0.1']; expected one value": lambda w: pf.stack(
        [w.adapter, init(w, target_modules=LIN0, lora_dropout=0.1)]
    ),
    "ValueError: lin0.lora_A has shapes [(2, 4), (2, 5)]; expected adapters of one base": lambda w: pf.stack(
        [w.adapter, edited(w.adapter, "lin0", lora_A=torch.ones(2, 5))]
    ),
    "TypeError: unstack was given a single adapter": lambda w: pf.unstack(w.adapter),
}

OTHERS: Table = {
    "ValueError: lin0.lora_A has 8 of 8 values that are NaN or infinite": lambda w: merge(
        w, edited(w.adapter, "lin0", lora_A=torch.full((2, 4), torch.nan))
    ),
    "ValueError: lin1.bias has 1 of 3 values that are NaN or infinite": lambda w: merge(
        w, edited(w.headed, "lin1", bias=torch.tensor([1, torch.inf, 2]))
    ),
    "KeyError: params has no 'lin0.weight', which the adapter changes": lambda w: pf.merge({"x": w.x}, w.adapter),
    "ValueError: lin0: ... fits no layer with a weight of shape (9, 9)": lambda w: pf.merge(
        {"lin0.weight": torch.ones(9, 9)}, w.adapter
    ),
    "TypeError: merge was given a stack": lambda w: merge(w, w.stack),
    "TypeError: adapter is a str; expected a peftfn.Adapter": lambda w: merge(w, "lora"),
    "ValueError: the adapter is a stack of 2; pass index=": lambda w: pf.bind(w.model, w.stack),
    "TypeError: bind was given a bound module": lambda w: pf.bind(pf.bind(w.model, w.adapter), w.other),
    "KeyError: has a site 'lin0', which Sequential does not have": lambda w: pf.bind(w.stranger, w.adapter),
    "ValueError: two of the active adapters replace": lambda w: pf.bind(w.model, (w.headed, w.headed)),
    "TypeError: unbind was given a Sequential that peftfn.bind did not make": lambda w: pf.unbind(w.model),
    "TypeError: adapter is a list of dict; expected": lambda w: pf.leaves(anything([w.adapter.params])),
    "TypeError: adapter is a Sequential; expected": lambda w: pf.count(anything(w.model)),
}


def anything(value: Any) -> Any:
    """The value, as a type checker lets it through."""
    return value


def everything(w: World) -> list[Any]:
    """The base with all that belongs to it, and the adapters' tensors: objects, bits and flags."""
    tensors = [t for adapter in (w.adapter, w.other, w.headed, w.stack) for t in flat(adapter).values()]
    return [snapshot(w.model), [(id(t), t._version, t.requires_grad, bits(t).tolist()) for t in tensors]]


ROWS = [(said, run) for table in (CONFIGS, INITS, APPLIES, STACKS, OTHERS) for said, run in table.items()]


@pytest.mark.parametrize(("said", "run"), ROWS, ids=[said for said, _ in ROWS])
def test_bad_input_is_one_clear_error_and_changes_nothing(said: str, run: Callable[[World], Any]) -> None:
    world = make_world()
    before = everything(world)
    with pytest.raises((TypeError, ValueError, KeyError)) as caught:
        run(world)
    kind, _, words = said.partition(": ")
    assert type(caught.value).__name__ == kind
    found = [caught.value.args[0].find(part) for part in words.split(" ... ")]
    assert -1 not in found, caught.value
    assert found == sorted(found), caught.value
    assert everything(world) == before
    assert torch.isfinite(apply(world)).all()  # and all of it still works


def test_a_stack_of_which_only_the_params_are_mapped_is_one_clear_error() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    stacked = pf.stack([pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))] * 2)
    x = torch.randn(2, 5, 4)

    def value(params: Any, x: torch.Tensor) -> torch.Tensor:
        return pf.apply(model, stacked.replace(params=params), x).sum()

    with pytest.raises(ValueError, match=r"params are mapped by torch\.vmap and its buffers are not"):
        torch.vmap(torch.func.grad(value))(stacked.params, x)


def test_merging_into_a_module_says_what_to_give() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    adapter = pf.init(model, pf.LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(TypeError, match=r"given a Sequential .* peftfn\.merge\(dict\(model\.named_parameters\(\)\)"):
        pf.merge(model, adapter)  # type: ignore[arg-type]
