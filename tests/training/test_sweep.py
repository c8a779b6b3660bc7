"""Sweeps: K adapters in one program, and K runs one after the other with `torch.optim`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import BASES
from cases import loss, trained
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf
from peftfn.training.optimizers import ADAMW, SGD

# torch's fused attention has no rule for vmap on the CPU; it runs one by one, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

STEPS = 5
RATES = (1e-3, 3e-3, 1e-2)
# Float32 rounding of other kernels, over the steps, of values of order 1. AdamW divides a gradient by its own size, so
# that rounding of a gradient that is zero but for rounding would become a whole step: eps is far above it.
ROUNDING = 1e-6
EPS = 1e-3


def lora(r: int, alpha: int, **options: Any) -> pf.LoraConfig:
    return pf.LoraConfig(r=r, lora_alpha=alpha, **{"target_modules": ["q_proj", "v_proj"], **options})


PROMPT: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
CONFIGS: dict[str, Sequence[pf.PeftConfig]] = {
    "lora": (lora(2, 4), lora(3, 16), lora(5, 5)),
    "lora on unlike sites": (lora(2, 4), lora(2, 4, target_modules=["down_proj"]), lora(4, 2)),
    "lora and a head": tuple(lora(r, 4, modules_to_save=["lm_head"]) for r in (1, 2, 3)),
    "ia3": (pf.IA3Config(),) * 3,
    "prompt": (pf.PromptTuningConfig(**PROMPT),) * 3,
    "p-tuning": (pf.PromptEncoderConfig(**PROMPT, encoder_hidden_size=8),) * 3,
    "prefix": (pf.PrefixTuningConfig(**PROMPT),) * 3,
    "adaption": (pf.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),) * 3,
}


def adapters(model: nn.Module, configs: Sequence[pf.PeftConfig]) -> list[pf.Adapter]:
    """Each from its own seed, and as it is after some training."""
    made = [pf.init(model, one, torch.Generator().manual_seed(n)) for n, one in enumerate(configs)]
    return [trained(one, seed, size=0.1) for seed, one in enumerate(made)]


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """Each seed's own data, in an order of its own."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids = torch.randint(3, 40, (2, 7), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def together(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def mapped(model: nn.Module) -> Callable[[pf.Adapter, Any], Tensor]:
    return torch.vmap(lambda adapter, batch: pf.apply(model, adapter, batch).loss, randomness="different")


def alone(model: nn.Module, adapter: pf.Adapter, seed: int, make: Callable[..., Any], max_norm: float | None) -> None:
    """Train one adapter in place, as anybody would."""
    optimizer = make(pf.leaves(adapter))
    for batch in batches(seed):
        optimizer.zero_grad()
        pf.apply(model, adapter, batch).loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(pf.leaves(adapter), max_norm)
        optimizer.step()


def assert_close(one: pf.Adapter, other: pf.Adapter, bound: float = ROUNDING) -> None:
    assert one.config == other.config
    for path, leaf in other.params.items():
        assert one.params[path].keys() == leaf.keys()
        for name, tensor in leaf.items():
            apart = (one.params[path][name] - tensor.detach()).abs().max()
            assert apart <= bound * tensor.detach().abs().max().clamp(min=1), (path, name, apart)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sweep_is_its_runs_one_by_one_leaf_by_leaf(kind: str) -> None:
    model = BASES["llama"].make()
    made = adapters(model, CONFIGS[kind])
    before = snapshot(model)
    run, losses = pf.sweep.begin(made), mapped(model)
    for rows in zip(*map(batches, range(3)), strict=True):
        run, values = pf.sweep.step(run, losses, together(rows), lr=RATES, eps=EPS, weight_decay=[0.0, 0.1, 0.01])
        assert values.shape == (3,)
    assert snapshot(model) == before
    for number, found in enumerate(pf.unstack(run.adapter)):
        given = {"lr": RATES[number], "eps": EPS, "weight_decay": (0.0, 0.1, 0.01)[number]}
        alone(model, made[number], number, functools.partial(torch.optim.AdamW, **given), None)
        assert_close(found, made[number])


def test_momentum_and_clipping_are_each_adapters_own() -> None:
    model = BASES["llama"].make()
    made = adapters(model, CONFIGS["lora"])
    run, losses, limits = pf.sweep.begin(made, SGD), mapped(model), (0.1, 0.5, 100.0)
    for rows in zip(*map(batches, range(3)), strict=True):
        run, _ = pf.sweep.step(run, losses, together(rows), SGD, lr=0.05, momentum=[0.0, 0.5, 0.9], max_norm=limits)
    for number, found in enumerate(pf.unstack(run.adapter)):
        given = {"lr": 0.05, "momentum": (0.0, 0.5, 0.9)[number]}
        alone(model, made[number], number, functools.partial(torch.optim.SGD, **given), limits[number])
        assert_close(found, made[number])


def test_padding_to_a_larger_rank_is_still_zero_after_training() -> None:
    model = BASES["llama"].make()
    run, losses = pf.sweep.begin(adapters(model, CONFIGS["lora"])), mapped(model)
    for rows in zip(*map(batches, range(3)), strict=True):
        run, _ = pf.sweep.step(run, losses, together(rows), lr=0.1)
    for leaf in run.adapter.params.values():
        assert leaf["lora_A"].shape[1] == 5
        assert not leaf["lora_A"][0, 2:].any()
        assert not leaf["lora_B"][1, :, 3:].any()
        assert leaf["lora_A"][0, :2].all()


def test_an_adapter_that_has_stopped_stays_bit_for_bit_and_the_others_go_on_as_without_it() -> None:
    model = BASES["llama"].make()
    made, losses = adapters(model, CONFIGS["lora"]), mapped(model)
    runs = [pf.sweep.begin(made), pf.sweep.begin(made)]
    for number, rows in enumerate(zip(*map(batches, range(3)), strict=True)):
        stopped = runs[0]
        runs[0], _ = pf.sweep.step(runs[0], losses, together(rows), lr=RATES, active=[True, number < 2, True])
        runs[1], _ = pf.sweep.step(runs[1], losses, together(rows), lr=RATES)
        if number >= 2:
            before, after = (torch.utils._pytree.tree_leaves(run) for run in (stopped, runs[0]))
            assert all(torch.equal(new[1], old[1]) for new, old in zip(after, before, strict=True))
            assert not torch.equal(after[0][0], before[0][0])
    one, two = (pf.unstack(run.adapter) for run in runs)
    assert_close(one[0], two[0], bound=0)
    assert_close(one[2], two[2], bound=0)
    assert float(runs[0].state.step[1]) == 2
    assert float(runs[0].state.step[0]) == STEPS


def test_what_is_kept_goes_on_as_if_the_others_had_never_been_there() -> None:
    model = BASES["llama"].make()
    made, losses = adapters(model, CONFIGS["lora on unlike sites"]), mapped(model)
    run, pair = pf.sweep.begin(made), pf.sweep.begin([made[2], made[0]])
    for number, rows in enumerate(zip(*map(batches, range(3)), strict=True)):
        some = [rows[2], rows[0]]
        if number == 2:
            run = pf.sweep.keep(run, [2, 0])
        run, _ = pf.sweep.step(run, losses, together(rows if number < 2 else some), lr=0.01, eps=EPS)
        pair, _ = pf.sweep.step(pair, losses, together(some), lr=0.01, eps=EPS)
    for one, other in zip(pf.unstack(run.adapter), pf.unstack(pair.adapter), strict=True):
        assert_close(one, other)
    assert [one.config for one in pf.unstack(run.adapter)] == [made[2].config, made[0].config]


def test_an_adapter_that_diverges_does_not_touch_the_others() -> None:
    model = BASES["llama"].make()
    made, losses = adapters(model, CONFIGS["lora"]), mapped(model)
    runs = [pf.sweep.begin(made), pf.sweep.begin(made)]
    for rows in zip(*map(batches, range(3)), strict=True):
        runs[0], values = pf.sweep.step(runs[0], losses, together(rows), lr=(1e-3, 1e30, 1e-2), max_norm=1.0)
        runs[1], _ = pf.sweep.step(runs[1], losses, together(rows), lr=(1e-3, 1e-3, 1e-2), max_norm=1.0)
    assert values.isfinite().tolist() == [True, False, True]
    for number in (0, 2):
        assert_close(pf.unstack(runs[0].adapter)[number], pf.unstack(runs[1].adapter)[number], bound=0)


def test_rows_routed_to_their_adapters_train_them_as_mapping_does() -> None:
    model = BASES["llama"].make()
    made = adapters(model, CONFIGS["lora"])
    ids = torch.randint(3, 40, (3, 7))

    def by_rows(stacked: pf.Adapter, ids: Tensor) -> Tensor:
        logits = pf.apply(model, stacked, {"input_ids": ids}, index=torch.arange(3)).logits
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.view(3, -1).mean(1)

    routed, _ = pf.sweep.step(pf.sweep.begin(made), by_rows, ids, lr=RATES, eps=EPS)
    batch = {"input_ids": ids[:, None], "labels": ids[:, None]}
    whole, _ = pf.sweep.step(pf.sweep.begin(made), mapped(model), batch, lr=RATES, eps=EPS)
    for one, other in zip(pf.unstack(routed.adapter), pf.unstack(whole.adapter), strict=True):
        assert_close(one, other)


def test_dropout_is_each_adapters_own_and_drawn_from_torchs_generator() -> None:
    model = BASES["llama"].make().train()
    config = dataclasses.replace(lora(4, 8), lora_dropout=0.5)
    twice = [trained(pf.init(model, config), 0)] * 2
    batch = together([next(batches(0))] * 2)
    torch.manual_seed(3)
    grads, values = pf.sweep.gradients(pf.stack(twice), mapped(model), batch)
    torch.manual_seed(3)
    again, _ = pf.sweep.gradients(pf.stack(twice), mapped(model), batch)
    assert values[0] != values[1]
    one = next(iter(grads))
    assert not torch.equal(grads[one]["lora_B"][0], grads[one]["lora_B"][1])
    assert torch.equal(grads[one]["lora_B"], again[one]["lora_B"])


def test_a_run_is_a_value() -> None:
    model = BASES["mlp"].make()
    made = [pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]), torch.Generator().manual_seed(n)) for n in (0, 1)]
    run, x = pf.sweep.begin(made), torch.randn(2, 4, 10)
    copies = [leaf.clone() for leaf in torch.utils._pytree.tree_leaves(run)]
    after, _ = pf.sweep.step(run, torch.vmap(lambda a, x: loss(pf.apply(model, a, x))), x, lr=0.1)
    leaves = torch.utils._pytree.tree_leaves(run)
    assert all(torch.equal(one, other) for one, other in zip(leaves, copies, strict=True))
    assert not any(leaf.requires_grad for leaf in torch.utils._pytree.tree_leaves((run, after)))


def test_wrong_numbers_of_values_are_one_clear_error() -> None:
    model = BASES["mlp"].make()
    made = [pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))] * 2
    run, x = pf.sweep.begin(made), torch.randn(2, 4, 10)
    losses = torch.vmap(lambda a, x: loss(pf.apply(model, a, x)))
    with pytest.raises(ValueError, match=r"lr has shape \(3,\); expected one number, or 2: one for each adapter"):
        pf.sweep.step(run, losses, x, lr=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"losses returned shape \(\); expected \(2,\), one loss for each adapter"):
        pf.sweep.step(run, lambda a, x: losses(a, x).mean(), x, lr=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        pf.sweep.step(run, losses, x, ADAMW, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="keep was given no number"):
        pf.sweep.keep(run, [])


@pytest.mark.parametrize(
    ("numbers", "error", "said"),
    [
        ([5], ValueError, r"keep was given \[5\]; this run has adapters 0 to 2, each of them once"),
        ([-1], ValueError, r"given \[-1\]; this run has adapters 0 to 2"),
        ([0, 0], ValueError, r"given \[0, 0\]; .* each of them once"),
        ([True], TypeError, r"given \[True\]; expected integers"),
        (["0"], TypeError, r"given \['0'\]; expected integers"),
    ],
)
def test_keep_says_which_numbers_it_takes(numbers: Any, error: type[Exception], said: str) -> None:
    run = pf.sweep.begin([pf.init(nn.Sequential(nn.Linear(4, 2)), pf.LoraConfig(r=1, target_modules=["0"]))] * 3)
    with pytest.raises(error, match=said):
        pf.sweep.keep(run, numbers)
    assert pf.stack(pf.unstack(pf.sweep.keep(run, torch.tensor([2, 0])).adapter)).params["0"]["lora_A"].shape[0] == 2  # type: ignore[arg-type]
