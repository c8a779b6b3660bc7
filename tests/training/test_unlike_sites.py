"""What an adapter of a stack does at sites that others have and it lacks: nothing, also after training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import registry
import torch
from cases import gpt2, loss, trained
from torch import Tensor, nn

import peftfn as pf

# Float64 rounding of kernels that are batched otherwise, over a few steps on values of order 1.
EXACT = 1e-11
STEPS, ROWS = 3, 2
NAMED = [one for one in registry.METHODS if {"linear", "transposed-square", "linear-even"} & {*one.kinds}]
CASES = {"lora": {}, "ia3": {}} | {
    f"{one.name} {more}".strip(): options
    for one in NAMED
    for more, options in {"": {}, **{k: o for k, (kind, o) in one.others.items() if kind != "embedding"}}.items()
}
# A bias, or a whole module, that only some have, is refused (test_what_only_some_replace_is_refused); so are configs of
# BD-LoRA that name unlike layers.
APART = ("ln-tuning", "bdlora")
CASES = {name: options for name, options in CASES.items() if options.get("bias") is None and name not in APART}
Losses = Callable[[pf.Adapter, Any], Tensor]


def base() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double().eval()


def config(name: str, *targets: str) -> Any:
    method = next(one for one in registry.METHODS if one.name == name.partition(" ")[0])
    if method.name == "ia3":  # whichever side it scales, it has to be the same for all
        return pf.IA3Config(target_modules=list(targets), feedforward_modules=[one for one in targets if one == "2"])
    return method.make(targets, **CASES[name])


def made(model: nn.Module, configs: list[Any]) -> list[pf.Adapter]:
    draws = [torch.Generator().manual_seed(seed) for seed in range(len(configs))]
    fresh = [pf.init(model, one, draw, dtype=torch.float64) for one, draw in zip(configs, draws, strict=True)]
    return [trained(one, seed, size=0.1) for seed, one in enumerate(fresh)]


def mapped(model: nn.Module) -> Losses:
    return torch.vmap(lambda adapter, batch: loss(pf.apply(model, adapter, batch)))


def by_row(model: nn.Module) -> Losses:
    def losses(stacked: pf.Adapter, batch: Any) -> Tensor:
        tensors = dict(batch) if isinstance(batch, dict) else {"": batch}
        flat = {name: one.flatten(0, 1) for name, one in tensors.items()}
        count = next(iter(tensors.values())).shape[0]
        index = torch.arange(count).repeat_interleave(ROWS)
        found = pf.apply(model, stacked, flat.get("", flat), index=index)
        found = getattr(found, "logits", found)
        return torch.stack([loss(one) for one in found.unflatten(0, (count, ROWS))])

    return losses


def steps(adapters: list[pf.Adapter], losses: Losses, batch: Any) -> pf.Adapter:
    run = pf.sweep.begin(adapters)
    repeated = torch.utils._pytree.tree_map(lambda one: torch.stack([one] * len(adapters)), batch)
    for _ in range(STEPS):
        run, _ = pf.sweep.step(run, losses, repeated, lr=0.1, eps=1e-3, weight_decay=0.1, max_norm=0.05)
    return run.adapter


def assert_as_alone(adapters: list[pf.Adapter], model: nn.Module, batch: Any) -> None:
    """Hold adapters trained together, mapped and by rows, against each of them trained alone."""
    ones = [pf.unstack(steps([one], mapped(model), batch))[0] for one in adapters]
    for how in (mapped, by_row):
        assert_same(ones, steps(adapters, how(model), batch), model, batch)


def assert_same(ones: list[pf.Adapter], stacked: pf.Adapter, model: nn.Module, batch: Any) -> None:
    inside = torch.vmap(lambda one: getattr(out := pf.apply(model, one, batch), "logits", out))(stacked)
    for alone, found, now in zip(ones, pf.unstack(stacked), inside, strict=True):
        assert (found.config, found.sites) == (alone.config, alone.sites)
        assert {path: set(leaf) for path, leaf in found.buffers.items()} == {
            path: set(leaf) for path, leaf in alone.buffers.items()
        }
        for path, leaf in alone.params.items():
            for name, tensor in leaf.items():
                assert (tensor - found.params[path][name]).abs().max() <= EXACT, (path, name)
        expected = pf.apply(model, alone, batch)
        assert (now - getattr(expected, "logits", expected)).abs().max() <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_in_a_stack_of_unlike_sites_each_trains_as_it_does_alone(name: str) -> None:
    model, batch = base(), torch.linspace(-1, 1, ROWS * 8, dtype=torch.float64).view(ROWS, 8)
    adapters = made(model, [config(name, "0"), config(name, "0", "2"), config(name, "2")])
    grads, _ = pf.sweep.gradients(pf.stack(adapters), mapped(model), torch.stack([batch] * 3))
    for path, number in (("0", 2), ("2", 0)):
        assert all(not one[number].any() for one in grads[path].values())
    assert_as_alone(adapters, model, batch)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("parts", [("q", "v"), ("v", "")], ids=str)
def test_on_parts_of_a_fused_projection_each_keeps_to_its_own(parts: tuple[str, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = gpt2(1).double().eval()
    named = [f"c_attn.{part}" if part else "c_attn" for part in parts]
    adapters = made(model, [pf.LoraConfig(r=2, target_modules=[one], **options) for one in named])
    assert_as_alone(adapters, model, {"input_ids": torch.arange(10).view(ROWS, 5)})


def test_one_gradient_of_a_bound_stack_and_of_mapped_gradients_is_that_of_the_sweep() -> None:
    model, batch = base(), torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8)
    stacked = pf.stack(made(model, [config("road", "0"), config("road", "2")]))
    expected, _ = pf.sweep.gradients(stacked, mapped(model), torch.stack([batch] * 2))

    def own(adapter: pf.Adapter) -> Any:
        return torch.func.grad(lambda params: loss(pf.apply(model, adapter.replace(params=params), batch)))(
            adapter.params
        )

    index = torch.arange(2).repeat_interleave(2)
    bound = pf.bind(model, stacked, index=index)
    found = bound(batch.repeat(2, 1)).unflatten(0, (2, 2))
    (loss(found[0]) + loss(found[1])).backward()
    for path, leaf in torch.vmap(own)(stacked).items():
        for name, grad in leaf.items():
            assert (grad - expected[path][name]).abs().max() <= EXACT
            held = dict(bound.named_parameters())[f"{path}.{name}"]
            assert (held.grad - expected[path][name]).abs().max() <= EXACT
    kept = pf.unstack(pf.unbind(bound))
    assert [list(one.params) for one in kept] == [["0"], ["2"]]


def test_a_stack_kept_in_part_and_stacked_again_is_marked_anew() -> None:
    model = base()
    run = pf.sweep.begin(made(model, [config("miss", "0"), config("miss", "0", "2"), config("miss", "2")]))
    kept = pf.sweep.keep(run, [0, 2])
    assert [list(one.params) for one in pf.unstack(kept.adapter)] == [["0"], ["2"]]
    assert kept.adapter.buffers["0"]["present_in_stack"].tolist() == [1, 0]
    assert "0" not in pf.sweep.keep(run, [0, 1]).adapter.buffers


def test_lora_needs_no_mark_of_whole_layers() -> None:
    stacked = pf.stack(made(base(), [config("lora", "0"), config("lora", "2")]))
    assert all(set(leaf) == {"scaling"} for leaf in stacked.buffers.values())


def test_what_only_some_replace_is_refused() -> None:
    adapters = made(base(), [pf.LoraConfig(r=1, bias="lora_only", target_modules=[one]) for one in ("0", "2")])
    with pytest.raises(ValueError, match="only some of the adapters replace 0"):
        pf.stack(adapters)


def test_a_saved_embedding_that_only_some_have_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    both = [pf.init(model, pf.LoraConfig(r=1, target_modules=["0"])) for _ in range(2)]
    saved = {**both[0].buffers["0"], "weight": torch.ones(6, 4)}
    with pytest.raises(ValueError, match=r"only some of the adapters replace 0 \(weight\)"):
        pf.stack([both[0].replace(buffers={"0": saved}), both[1]])


def test_how_the_base_stores_its_weights_is_no_difference_of_adapters() -> None:
    torch.manual_seed(0)
    model = gpt2(1).double().eval()
    one, other = made(model, [pf.LoraConfig(r=2, target_modules=["c_attn"])] * 2)
    unlike = other.replace(config=dataclasses.replace(other.config, fan_in_fan_out=False))
    stacked, batch = pf.stack([one, unlike]), {"input_ids": torch.arange(10).view(2, 5)}
    found = pf.apply(model, stacked, batch, index=[0, 1]).logits
    for row, adapter in enumerate((one, other)):
        assert (found[row] - pf.apply(model, adapter, batch).logits[row]).abs().max() <= EXACT
    assert pf.unstack(stacked)[1].config == unlike.config
