"""Routing beyond the law of rows: sorted rows, an index for each token, many rows of few adapters."""

from __future__ import annotations

import copy
import functools
from typing import Any

import oracle
import pytest
import registry
import torch
from cases import BY_NAME, ia3, llama, lora, tokens, trained
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import grad, jvp

import peftfn as pf
from peftfn.core import stack_slices
from peftfn.runtime.routing import row_index, segments

# The same sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

close = functools.partial(torch.testing.assert_close, **CLOSE)


def linears(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, 5))


def adapters_of(model: nn.Module, config: Any, count: int) -> list[pf.Adapter]:
    return [trained(pf.init(model, config), seed) for seed in range(count)]


@pytest.mark.parametrize("index", [[3, 0, 3, 3, -1, 3, 2, 3], [1, 0, 3, 2, 0, 1, 2, 3], [-1, 2, 2, 2, 2, 2, 2, 2]])
def test_sorting_puts_each_row_with_its_adapter_and_back(index: list[int]) -> None:
    given = torch.tensor(index)
    x = torch.randn(8, 3)
    for way in segments.plans(index, 4):
        owners = torch.arange(4) if way.adapters is None else way.adapters
        assert len(owners) == way.number
        sorted_rows = way.sorted(given[:, None], 8).view(way.number, way.size)
        assert ((sorted_rows == owners[:, None]) | ~torch.isin(owners, given)[:, None]).all()
        moved = way.sorted(x, 8) * owners.repeat_interleave(way.size)[:, None]
        expected = torch.where(given[:, None] >= 0, x * given[:, None], x)
        assert way.restored(moved, x, 8).equal(expected)
    whole, cut = segments.plans(index, 4)
    assert whole.adapters is None
    assert cut.number * cut.size <= 2 * int((given >= 0).sum())


def test_a_batch_of_bare_rows_is_not_sorted() -> None:
    assert segments.plans([-1] * 3, 2) == ()


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("config", [lora("0", "2"), ia3("0", "2", feedforward=("2",))], ids=["lora", "ia3"])
@pytest.mark.parametrize("length", [1, 30])
def test_every_way_to_route_computes_the_same(count: int, config: Any, length: int) -> None:
    model, x = linears(), torch.randn(24, length, 8)
    stacked = pf.stack(adapters_of(model, config, count))
    index = torch.randint(-1, count, (24,), generator=torch.Generator().manual_seed(1))
    numbers = index.tolist()  # torch 2.6 gives none inside a transform
    expected = torch.stack(
        [pf.apply(model, pf.unstack(stacked)[n] if n >= 0 else (), x[row]) for row, n in enumerate(numbers)]
    )
    close(pf.apply(model, stacked, x, index=index), expected)
    direction = torch.randn_like(x)

    def value(params: Any, x: Tensor) -> Tensor:
        return pf.apply(model, stacked.replace(params=params), x, index=index).sin().sum()

    def loop(params: Any, x: Tensor) -> Tensor:
        every = pf.unstack(stacked.replace(params=params))
        found = [pf.apply(model, every[n] if n >= 0 else (), x[row]) for row, n in enumerate(numbers)]
        return torch.stack(found).sin().sum()

    for path, leaf in grad(value)(stacked.params, x).items():
        for name, tensor in leaf.items():
            close(tensor, grad(loop)(stacked.params, x)[path][name], atol=1e-5)
    along = [jvp(lambda x, one=one: one(stacked.params, x), (x,), (direction,))[1] for one in (value, loop)]
    close(*along, rtol=1e-4)


def test_sorted_rows_are_what_is_chosen_for_one_token_of_many_rows() -> None:
    found = row_index.of_index([0, 1, 2, 3] * 8, 4)
    one, many = torch.empty(32, 1, 512), torch.empty(32, 128, 512)
    assert segments.cheapest(found.ways, 32, 16 * 1024, one, one.numel()) is found.ways[0]
    assert segments.cheapest(found.ways, 32, 16 * 1024, many, many.numel()) is None


def test_rows_in_another_order_are_computed_in_the_adapters_own() -> None:
    """And every tensor gets the gradient that `backward()` gives it alone."""
    model, x, order = linears(), torch.randn(6, 1, 8), [3, 0, 5, 1, 4, 2]
    way = segments.cheapest(row_index.of_index(order, 6).ways, 6, 8 * (8 + 12) + 1, x, 6 * 12)
    assert way is not None
    assert way.is_order
    adapters = adapters_of(model, pf.LoraConfig(r=8, target_modules=["0", "2"]), 6)
    stacked = pf.stack(adapters)
    leaves = pf.leaves(stacked)
    found = pf.apply(model, stacked, x, index=order)
    found.sin().sum().backward()
    for row, number in enumerate(order):
        own = pf.leaves(adapters[number])
        alone = pf.apply(model, adapters[number], x[row])
        close(found[row], alone)
        alone.sin().sum().backward()
        for leaf, single in zip(leaves, own, strict=True):
            assert leaf.grad is not None
            assert single.grad is not None
            close(leaf.grad[number], single.grad)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [1, 1, -1, 1]], ids=["in order", "other order", "any"])
def test_dropout_of_routed_rows_is_the_same_forward_and_back(order: list[int]) -> None:
    """With A and B the identity the delta shows each value that stayed, twice as large, and so does B's gradient."""
    model, x = nn.Sequential(nn.Linear(8, 8)).train(), torch.rand(4, 50, 8) + 0.5
    config = pf.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], lora_dropout=0.5)
    leaf = {name: torch.eye(8) for name in ("lora_A", "lora_B")}
    stacked = pf.stack([pf.init(model, config).replace(params={"0": leaf})] * 4)
    pf.leaves(stacked)
    delta = pf.apply(model, stacked, x, index=order) - model(x)
    delta.sum().backward()
    dropped, kept = (torch.isclose(delta, times * x, atol=1e-5) for times in (0, 2))
    adapted = torch.tensor(order) >= 0
    assert (dropped | kept).all()
    assert not kept[~adapted].any()
    assert ((kept[adapted].float().mean((1, 2)) - 0.5).abs() < 0.2).all()
    masks = kept[adapted].flatten(1).float()
    assert len(masks.unique(dim=0)) == len(masks)  # each row has its own
    gradient = stacked.params["0"]["lora_B"].grad
    assert gradient is not None
    for number in range(4):
        own = delta.detach()[torch.tensor(order) == number].sum((0, 1))
        close(gradient[number], own.expand(8, 8))


def test_tall_factors_of_a_stack_lie_by_column_and_so_do_copies_of_them() -> None:
    model = linears()
    adapters = adapters_of(model, lora("0", "2"), 4)
    stacked = pf.stack(adapters)
    b = stacked.params["0"]["lora_B"]
    assert b.mT.is_contiguous()
    copies = stack_slices.picked(stacked.params["0"], torch.tensor([2, 0]))
    assert copies["lora_B"].mT.is_contiguous()
    assert copies["lora_B"].equal(b[[2, 0]])
    pf.leaves(stacked)
    pf.apply(model, stacked, torch.ones(4, 8), index=range(4)).sum().backward()
    assert b.grad is not None
    assert b.grad.stride() == b.stride()
    for one, other in zip(pf.unstack(stacked), adapters, strict=True):
        torch.testing.assert_close(one.params, other.params, rtol=0, atol=0)


def token_index(*shape: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, count, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["linear-3d", "transposed-linear", "ia3-transposed-square", "embedding"])
def test_each_token_uses_its_own_adapter(name: str) -> None:
    case = BY_NAME[name]
    model, batch = case.base(), case.batch()
    adapters = adapters_of(model, case.config, 3)
    index = token_index(*batch.shape[:2], count=3)
    routed = pf.apply(model, pf.stack(adapters), batch, index=index)
    alone = torch.stack([pf.apply(model, adapter, batch) for adapter in adapters] + [pf.apply(model, (), batch)])
    close(routed, alone.gather(0, index.remainder(4).view(1, *index.shape, 1).expand(1, *alone.shape[1:]))[0])


def test_a_language_model_adapts_each_token_in_every_layer() -> None:
    """Against the mathematics: each layer's delta is the sum of the adapters' own, masked by token."""
    model = llama().eval()
    batch = {"input_ids": tokens()()}
    adapters = adapters_of(model, pf.LoraConfig(r=4, target_modules="all-linear"), 3)
    index = token_index(*batch["input_ids"].shape, count=3)
    by_hand = copy.deepcopy(model)

    def hook(path: str, _: Any, inputs: Any, output: Tensor) -> Tensor:
        for number, adapter in enumerate(adapters):
            leaf = adapter.params[path]
            delta = inputs[0] @ leaf["lora_A"].T @ leaf["lora_B"].T * adapter.buffers[path]["scaling"]
            output = output + delta * (index == number)[:, :, None]
        return output

    for path in adapters[0].params:
        by_hand.get_submodule(path).register_forward_hook(functools.partial(hook, path))
    stacked = pf.stack(adapters)
    close(pf.apply(model, stacked, batch, index=index).logits, by_hand(**batch).logits)
    same = pf.apply(model, stacked, batch, index=index[:, :1].expand(-1, index.shape[1]))
    close(same.logits, pf.apply(model, stacked, batch, index=index[:, 0]).logits)


def test_an_index_for_each_token_trains_each_adapter_on_its_tokens() -> None:
    model, x = linears(), torch.randn(4, 6, 8)
    adapters = adapters_of(model, lora("0", "2"), 3)
    stacked, index = pf.stack(adapters), token_index(4, 6, count=3)
    together = grad(lambda p: pf.apply(model, stacked.replace(params=p), x, index=index).sin().sum())(stacked.params)
    for number, adapter in enumerate(adapters):
        own = x[index == number]
        alone = grad(lambda p: pf.apply(model, adapter.replace(params=p), own).sin().sum())(adapter.params)  # noqa: B023  # called at once
        for path, leaf in alone.items():
            for name, tensor in leaf.items():
                close(together[path][name][number], tensor, atol=1e-5)


def test_an_index_of_tokens_is_refused_where_there_is_none() -> None:
    model = llama().eval()
    batch = {"input_ids": tokens()()}
    index = token_index(*batch["input_ids"].shape, count=2)
    prompts = pf.stack([pf.init(model, pf.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))] * 2)
    gates = pf.stack([pf.init(model, pf.AdaptionPromptConfig(adapter_len=2, adapter_layers=1))] * 2)
    for stacked, whole in ((prompts, "the model"), (gates, "model.layers.1.self_attn")):
        with pytest.raises(ValueError, match=rf"acts on {whole} as a whole; expected one number per row"):
            pf.apply(model, stacked, batch, index=index)
    deltas = pf.stack([pf.init(model, lora("q_proj"))] * 2)
    with pytest.raises(ValueError, match=r"index has shape \(4, 2\) and the batch has tensors of shape"):
        pf.apply(model, deltas, batch, index=index[:, :2])
    with pytest.raises(ValueError, match=r"the input here has shape .* expected the same rows and tokens"):
        pf.bind(model, deltas, index=index)(input_ids=batch["input_ids"][:, :2])


@pytest.mark.parametrize(
    "config",
    [
        pf.LoraConfig(r=2, use_dora=True, target_modules=["0"], bias="all"),
        pf.OFTConfig(oft_block_size=4, target_modules=["0"], bias="all"),
        pf.BOFTConfig(target_modules=["0"], bias="boft_only"),
        pf.GloraConfig(r=2, target_modules=["0"], bias="all"),
    ],
    ids=["DoRA", "OFT", "BOFT", "GLoRA"],
)
@pytest.mark.parametrize("index", [[2, -1, 0, 1], [1, 1, 1, -1, 0, 0, 1, 1]], ids=["in any order", "in runs"])
def test_a_method_that_reads_or_runs_its_layer_sees_each_rows_own_bias(config: Any, index: list[int]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(len(index), 8).double()
    adapters = [oracle.randomised(pf.init(model, config), seed) for seed in range(3)]
    found = pf.apply(model, pf.stack(adapters), x, index=index)
    alone = [pf.apply(model, adapters[n] if n >= 0 else (), x)[row] for row, n in enumerate(index)]
    assert off(found, torch.stack(alone)) < EXACT


def test_rows_own_biases_on_another_adapters_layer_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(2, 8)
    first = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
    stacked = pf.stack([pf.init(model, pf.OFTConfig(oft_block_size=4, target_modules=["0"], bias="all"))] * 2)
    with pytest.raises(ValueError, match="0: the routed adapters replace bias of a layer that another active adapter"):
        pf.apply(model, (first, stacked), x, index=[0, 1])


@pytest.mark.parametrize("name", ["boft", "deft", "delora", "glora", "hira", "hra", "miss", "road"])
def test_a_row_of_the_base_does_not_see_that_an_adapter_is_spoilt(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    fresh = pf.init(model, registry.BY_NAME[name].make(["0"]))
    spoilt = fresh.replace(
        params={path: {key: one * torch.nan for key, one in leaf.items()} for path, leaf in fresh.params.items()}
    )
    found = pf.apply(model, pf.stack([spoilt, oracle.randomised(fresh)]), x, index=[-1, 1])
    assert torch.equal(found[0], model(x)[0])
    assert bool(found.isfinite().all())
