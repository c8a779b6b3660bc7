"""`torch.compile(fullgraph=True)`: how many graphs, and that a compiled call sees the base as it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import registry
import torch
import torch.utils._pytree as torch_pytree
from cases import CASES, DEEP, EVERY_BASE, Case, gpt2, llama, lora, loss, mlp, output, tokens, trained
from compiled import one_graph
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap
from transformers import BertConfig, BertModel

import peftfn as pf

pytestmark = one_graph


def bert() -> nn.Module:
    """A base whose forward asks for the signature of one of its methods."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, vocab_size=20, max_position_embeddings=16))


# Dynamo traces each layer anew, and that is what the time goes into: two of them where the test is about one graph.
shallow_llama = functools.partial(llama, layers=1)
shallow_gpt2 = functools.partial(gpt2, layers=1)


class Graphs:
    """A backend that counts what Dynamo hands it, and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def batch_for(model: nn.Module) -> Any:
    if isinstance(model, nn.Sequential):
        return torch.randn(4, 8, dtype=next(model.parameters()).dtype)
    return {"input_ids": tokens()()}


def value(model: nn.Module, adapter: pf.Adapter, batch: Any) -> Tensor:
    return output(pf.apply(model, adapter, batch)).square().mean()


@pytest.mark.parametrize("build", [mlp, shallow_llama, shallow_gpt2, bert], ids=["mlp", "llama", "gpt2", "bert"])
def test_a_training_step_is_one_graph_for_any_values_and_alpha_and_one_more_for_any_rank(
    build: Any, graphs: Graphs
) -> None:
    model = build().eval().double()
    batch = batch_for(model)

    def step(adapter: pf.Adapter, batch: Any) -> Any:
        return grad_and_value(lambda params: value(model, adapter.replace(params=params), batch))(adapter.params)

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    counts = []
    for seed, (rank, alpha) in enumerate([(4, 8), (4, 8), (4, 1), (4, 33), (8, 8), (6, 8), (16, 3), (5, 5)]):
        adapter = trained(pf.init(model, pf.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")), seed)
        close(compiled(adapter, batch), step(adapter, batch))
        counts.append(graphs.count)
    assert counts[:4] == [1, 1, 1, 1]
    assert counts[-1] <= 2


def test_a_backward_step_is_one_graph(graphs: Graphs) -> None:
    model = llama().eval()
    batch = batch_for(model)
    compiled = torch.compile(lambda adapter, batch: value(model, adapter, batch), fullgraph=True, backend=graphs)
    for seed in range(3):
        adapter = trained(pf.init(model, lora("q_proj", "v_proj")), seed)
        leaves = pf.leaves(adapter)
        compiled(adapter, batch).backward()
        found = [tensor.grad for tensor in leaves]
        for tensor in leaves:
            tensor.grad = None
        value(model, adapter, batch).backward()
        close(found, [tensor.grad for tensor in leaves])
    assert graphs.count == 1


def test_a_changed_base_is_seen_without_a_new_graph(graphs: Graphs) -> None:
    model = llama().eval()
    batch = batch_for(model)
    adapter = trained(pf.init(model, lora("q_proj", "down_proj")))
    compiled = torch.compile(lambda adapter, batch: value(model, adapter, batch), fullgraph=True, backend=graphs)
    first = compiled(adapter, batch)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    second = compiled(adapter, batch)
    close(second, value(model, adapter, batch))
    model.load_state_dict({name: torch.randn_like(t) * 0.1 for name, t in model.state_dict().items()}, assign=True)
    third = compiled(adapter, batch)
    close(third, value(model, adapter, batch))
    assert len({float(one) for one in (first, second, third)}) == 3
    assert graphs.count == 1


def test_a_base_whose_parameters_want_no_gradient_is_one_graph(graphs: Graphs) -> None:
    model = shallow_llama().eval().requires_grad_(False)
    batch, adapter = batch_for(model), trained(pf.init(model, lora("q_proj", "down_proj")))
    compiled = torch.compile(functools.partial(value, model), fullgraph=True, backend=graphs)
    close(compiled(adapter, batch), value(model, adapter, batch))
    assert graphs.count == 1


def test_any_assignment_of_rows_is_one_graph(graphs: Graphs) -> None:
    model, x = mlp().eval(), torch.randn(4, 8)
    stacked = pf.stack([trained(pf.init(model, lora("0", "3")), seed) for seed in range(5)])
    compiled = torch.compile(lambda a, x, i: pf.apply(model, a, x, index=i), fullgraph=True, backend=graphs)
    for seed in range(16):
        index = torch.randint(-1, 5, (4,), generator=torch.Generator().manual_seed(seed))
        close(compiled(stacked, x, index), pf.apply(model, stacked, x, index=index))
    assert graphs.count == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 itself
@pytest.mark.parametrize("lengths", [(3, 3), (3, 2)], ids=["of one length", "of unlike length"])
def test_any_assignment_of_prompts_is_one_graph(lengths: tuple[int, int], graphs: Graphs) -> None:
    model, batch = shallow_llama().eval(), {"input_ids": tokens()()}
    configs = [pf.PromptTuningConfig(num_virtual_tokens=count, task_type="CAUSAL_LM") for count in lengths]
    stacked = pf.stack([trained(pf.init(model, config), seed) for seed, config in enumerate(configs)])
    run = lambda adapter, batch, index: output(pf.apply(model, adapter, batch, index=index))  # noqa: E731  # one expression
    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    for index in ([0, 1, -1, 1], [1, 0, 0, -1], [-1, -1, 1, 1], [0, 0, 0, 0]):
        close(compiled(stacked, batch, torch.tensor(index))[:, -5:], run(stacked, batch, index)[:, -5:])
    assert graphs.count == 1


def test_transforms_compile_whole(graphs: Graphs) -> None:
    model, x = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Identity(), nn.Linear(12, 5)), torch.randn(4, 8)
    stacked = pf.stack([trained(pf.init(model, lora("0", "3")), seed) for seed in range(3)])

    def ensemble(stacked: pf.Adapter, x: Tensor) -> Tensor:
        return vmap(lambda adapter: pf.apply(model, adapter, x))(stacked)

    def per_sample(adapter: pf.Adapter, x: Tensor) -> Any:
        one = grad(lambda params, row: pf.apply(model, adapter.replace(params=params), row[None]).sum())
        return vmap(one, in_dims=(None, 0))(adapter.params, x)

    close(torch.compile(ensemble, fullgraph=True, backend=graphs)(stacked, x), ensemble(stacked, x))
    adapter = trained(pf.init(model, lora("0", "3")))
    close(torch.compile(per_sample, fullgraph=True, backend=graphs)(adapter, x), per_sample(adapter, x))
    assert graphs.count == 2


# Their encoders and their models compile in other cases.
BOTH_KNOWN = ("p-tuning-lstm-t5", "p-tuning-mlp-llama")
# What a layer or a model asks of Dynamo is the same whatever the method, and LoRA and LoHa have every kind of them. Of
# the other methods each compiles on its first kind and with each of its options; `make test-every-base` has all kinds.
OTHERS = [method for method in registry.METHODS if method.kinds and method.name != "loha"]
FIRST = {f"{method.name}-{what}" for method in OTHERS for what in (method.kinds[0], *method.others)}
REST = {case.name for case in CASES if case.name.startswith(tuple(f"{method.name}-" for method in OTHERS))} - FIRST
# A head, or one layer at two paths, is the same whatever the method: LoRA has both.
OF_LORA = {f"{method.name}-{what}" for method in registry.METHODS for what in ("head", "two-paths")}
LEFT_OUT = {*BOTH_KNOWN, *OF_LORA, *(() if EVERY_BASE else REST)}
KNOWN = [case for case in CASES if not case.pack and case.name not in LEFT_OUT]


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.name)
def test_every_kind_of_layer_compiles_whole(case: Case, graphs: Graphs) -> None:
    if case.build in DEEP:
        case = dataclasses.replace(case, build=functools.partial(case.build, layers=1))
    model, batch = case.base(), case.batch()
    adapter = trained(pf.init(model, case.config))
    compiled = torch.compile(
        lambda adapter, batch: output(pf.apply(model, adapter, batch)), fullgraph=True, backend=graphs
    )
    close(compiled(adapter, batch), output(pf.apply(model, adapter, batch)))
    assert graphs.count == 1


def test_inductor_gives_the_same_numbers(graphs: Graphs) -> None:
    """The real compiler, on the smallest base."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8)
    adapter = trained(pf.init(model, lora("0")))
    step = lambda params, x: grad(lambda p: loss(pf.apply(model, adapter.replace(params=p), x)))(params)  # noqa: E731  # one expression
    close(torch.compile(step, fullgraph=True)(adapter.params, x), step(adapter.params, x))
    assert torch_pytree.tree_leaves(adapter.params)[0].grad is None
