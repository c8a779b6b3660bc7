"""What is done to a bound module never reaches the base: its methods, its copies, DDP, torch.compile."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from bases import BASES, ids
from binding import ATTENTION, LLAMA, ROWS, adapter_for, flat, output, trained_names
from compiled import one_graph
from oracle import called
from snapshot import snapshot
from torch import nn
from torch._C._distributed_c10d import HashStore  # no other process is there to find
from torch.nn.parallel import DistributedDataParallel

import peftfn as pf


def hooked(bound: Any) -> None:
    for module in bound.modules():
        module.register_forward_hook(lambda module, inputs, result: None)
        module.register_full_backward_hook(lambda module, grads, given: None)


def replaced(bound: Any) -> None:
    bound.lm_head = nn.Identity()
    bound.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(16, 16))


def set_config(bound: Any) -> None:
    bound.config.use_cache = False
    bound.model.layers[0].self_attn.config.hidden_size = 1
    bound.generation_config.max_new_tokens = 1


def checkpoint(bound: Any) -> None:
    # transformers 5 has renamed it
    getattr(bound, "activation_checkpointing_enable", bound.gradient_checkpointing_enable)()


def load(bound: Any, **options: Any) -> None:
    given = {name: tensor.clone() + ("lora" in name) for name, tensor in bound.state_dict().items()}
    assert str(bound.load_state_dict(given, **options)) == "<All keys matched successfully>"
    assert torch.equal(bound.model.layers[0].self_attn.q_proj.lora_A, given["model.layers.0.self_attn.q_proj.lora_A"])


def train(bound: Any) -> None:
    bound.train().requires_grad_(True).zero_grad()
    output(bound, LLAMA.inputs()).sum().backward()
    torch.optim.SGD(bound.parameters(), lr=1.0).step()


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "train": lambda bound: bound.train(),
    "to float64": lambda bound: bound.to(torch.float64),
    "half": lambda bound: bound.half(),
    "to meta": lambda bound: bound.to("meta"),
    "to_empty": lambda bound: bound.to_empty(device="cpu"),
    "requires_grad_ and a step": train,
    "requires_grad_ of a child and a step": lambda bound: (bound.model.requires_grad_(True), train(bound)),
    "checkpointing": checkpoint,
    "hooks": hooked,
    "other modules": replaced,
    "configs": set_config,
    "generate": lambda bound: bound.generate(ids(2, 3), max_new_tokens=3, do_sample=False, pad_token_id=0),
    "load_state_dict": load,
    "load_state_dict(assign=True)": functools.partial(load, assign=True),
    "init_weights": lambda bound: bound.init_weights(),
    "tie_weights": lambda bound: bound.tie_weights(),
    "apply that reads": lambda bound: bound.apply(lambda module: [p.sum() for p in module.parameters()]),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=list(ACTIONS))
def test_what_is_done_to_a_bound_model_leaves_the_base_as_it_was(action: Callable[[Any], Any]) -> None:
    model = LLAMA.make()
    bound, other = pf.bind(model, adapter_for(model, ATTENTION)), pf.bind(model, adapter_for(model, ATTENTION, 1))
    expected = output(other, LLAMA.inputs())
    before = snapshot(model)
    with torch.random.fork_rng():
        action(bound)
    assert snapshot(model) == before
    assert torch.equal(output(other, LLAMA.inputs()), expected)  # nor another module bound to the same base


def normal(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def through_data(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.view(-1)[0] = 5


@pytest.mark.parametrize("part", ["", "model"])
@pytest.mark.parametrize("fn", [normal, through_data])
def test_apply_fn_cannot_write_to_the_base(fn: Callable[[nn.Module], None], part: str) -> None:
    model = LLAMA.make()
    bound, before = pf.bind(model, adapter_for(model, ATTENTION)), snapshot(model)
    with pytest.raises(RuntimeError, match=r"fn writes to \w+\.weight, whose memory is the base's"):
        bound.get_submodule(part).apply(fn)
    assert snapshot(model) == before


def test_apply_fn_can_write_to_the_adapter() -> None:
    model = LLAMA.make()
    adapter = adapter_for(model, ATTENTION)
    pf.bind(model, adapter).apply(lambda module: hasattr(module, "lora_B") and nn.init.zeros_(module.lora_B))
    assert all(not leaf["lora_B"].any() and leaf["lora_A"].any() for leaf in adapter.params.values())


@pytest.mark.parametrize("part", ["", "model.norm"])
def test_other_weights_for_the_base_are_refused_by_load_state_dict(part: str) -> None:
    model = LLAMA.make()
    bound, before = pf.bind(model, adapter_for(model, ATTENTION)), snapshot(model)
    inner = bound.get_submodule(part)
    given = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    given["model.norm.weight" if not part else "weight"] += 1
    with pytest.raises(RuntimeError, match=r"weight is not what the base has\. A bound module shares"):
        inner.load_state_dict(given)
    assert snapshot(model) == before


def test_load_state_dict_still_says_what_is_missing_and_what_has_another_size() -> None:
    model = LLAMA.make()
    bound = pf.bind(model, adapter_for(model, ATTENTION))
    given = dict(bound.state_dict())
    del given["model.layers.0.self_attn.q_proj.lora_A"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lora_A"):
        bound.load_state_dict(given)
    given["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.norm\.weight"):
        bound.load_state_dict(given, strict=False)


def test_a_norms_statistics_move_in_the_bound_model_only() -> None:
    model, batch = BASES["convnet"].make().train(), BASES["convnet"].inputs()
    bound, before = pf.bind(model, adapter_for(model, {"target_modules": ["4"]})), snapshot(model)
    called(bound, batch)
    assert snapshot(model) == before
    assert bound[2].num_batches_tracked == 1


# --- copies and wrappers ---------------------------------------------------------------------------------------------


def through_torch_save(bound: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(bound, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda bound: pickle.loads(pickle.dumps(bound)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("name", ["llama", "mixtral", "encoder", "lstm"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_a_copy_of_a_bound_model_is_bound_and_stands_alone(copied: Callable[[Any], Any], name: str) -> None:
    base, options = ROWS[name]
    model, batch = base.make(), base.inputs()
    adapter = adapter_for(model, options)
    bound, before = pf.bind(model, adapter), snapshot(model)
    other = copied(bound)
    with torch.no_grad():
        expected = output(bound, batch)
        assert torch.equal(output(other, batch), expected)
        assert trained_names(other) == trained_names(bound)
        assert all(map(torch.equal, flat(pf.unbind(other)), flat(adapter)))
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(output(bound, batch), expected)
        assert not torch.equal(output(other, batch), expected)  # and its adapter is the one that it runs
    assert snapshot(model) == before


@pytest.fixture
def one_process() -> Iterator[None]:
    store = HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_gives_the_same_gradients_and_does_not_write_to_the_base(one_process: None) -> None:
    model, batch = LLAMA.make(), LLAMA.inputs()
    adapter = adapter_for(model, ATTENTION)
    alone, bound, before = pf.bind(model, adapter), pf.bind(model, adapter), snapshot(model)
    wrapped = DistributedDataParallel(bound)
    for module in (alone, wrapped):
        output(module, batch).square().mean().backward()
    wrapped.load_state_dict(wrapped.state_dict())
    assert snapshot(model) == before
    pairs = list(zip(alone.parameters(), bound.parameters(), strict=True))
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs if p.requires_grad)
    assert all(map(torch.equal, flat(pf.unbind(wrapped)), flat(adapter)))


@one_graph
def test_a_bound_model_compiles_to_one_graph() -> None:
    model, batch = LLAMA.make().double(), {"input_ids": ids(2, 5)}
    bound = pf.bind(model, adapter_for(model, ATTENTION | {"lora_dropout": 0.0}))
    compiled: Any = torch.compile(bound, backend="eager", fullgraph=True)
    for mode in (False, True):
        bound.train(mode)
        # Its norms compute in float32, also in a float64 model.
        torch.testing.assert_close(output(compiled, batch), output(bound, batch), rtol=1e-5, atol=1e-6)
    output(compiled, batch).square().mean().backward()
    assert all(p.grad is not None for p in bound.parameters() if p.requires_grad)
    assert pf.unbind(compiled).config == pf.unbind(bound).config
