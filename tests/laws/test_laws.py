"""The laws of the design, one function each, for every row of the table in cases.py (PEFT: test_against_peft.py)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import optree
import pytest
import quantized
import torch
import torch.utils._pytree as torch_pytree
from cases import Case, having, loss, output, trained
from exact import EXACT, FLOAT32, Float64, a_rounding_away, assert_close_to_truth, in_float64, off
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import peftfn as pf
from peftfn import methods
from peftfn.methods.traits import Files

# How much further from the truth than weights a rounding away. A packed layer's stay where they are, and a prompt alone
# is moved: 9 times was the most then, 3 else. A product in half precision comes to thousands.
FURTHER = 32


def cases(law: str) -> Any:
    return pytest.mark.parametrize("case", having(law), ids=lambda case: case.name)


def call(model: nn.Module, batch: Any) -> Tensor:
    return output(model(**batch) if isinstance(batch, dict) else model(batch))


def applied(model: nn.Module, adapter: Any, batch: Any, **kwargs: Any) -> Tensor:
    return output(pf.apply(model, adapter, batch, **kwargs))


def every_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters under each of their names, so that a tied weight can come apart."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def dense_name(name: str) -> str:
    """The name of a weight, of one that GPTQ and HQQ hold under other names too."""
    path, _, own = name.rpartition(".")
    return f"{path}.weight" if own in ("qweight", "qzeros", "scales", "g_idx", "W_q") else name


def rows(batch: Any, pick: Any) -> Any:
    return {name: tensor[pick] for name, tensor in batch.items()} if isinstance(batch, dict) else batch[pick]


@contextlib.contextmanager
def no_fast_attention() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Exact(NamedTuple):
    """A case in float64, wherever its model would take float32."""

    case: Case
    model: nn.Module
    batch: Any

    def adapter(self, seed: int = 0) -> pf.Adapter:
        """A trained adapter in float64."""
        adapter = trained(pf.init(self.model, self.case.config, dtype=torch.float64), seed)
        return adapter.replace(params=in_float64(adapter.params))  # a head that was packed

    def loss(self, adapter: pf.Adapter, params: Any) -> Tensor:
        """The loss as a function of the trained tensors."""
        return loss(pf.apply(self.model, adapter.replace(params=params), self.batch))

    def close(self, one: Any, other: Any) -> None:
        """Equal but for the order of sums; a format that rounds moves each tensor by a share of its largest value."""
        pairs = list(zip(torch_pytree.tree_leaves(one), torch_pytree.tree_leaves(other), strict=True))
        largest = max(quantized.largest(b) for _, b in pairs)
        for a, b in pairs:
            assert quantized.largest(a - b) <= EXACT * largest + self.case.rounding * quantized.largest(b)


@pytest.fixture
def exact(case: Case) -> Iterator[Exact]:
    """The case in float64, and no float32 until the test has ended."""
    made = Exact(case, case.exact(), in_float64(case.batch()))
    with Float64():
        yield made


@cases("purity")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_base_is_the_same_after_init_apply_backward_and_merge(case: Case, train: bool) -> None:
    model, batch = case.base().train(train), case.batch()
    before = snapshot(model)
    adapter = trained(pf.init(model, case.config))
    pf.leaves(adapter)
    loss(pf.apply(model, adapter, batch)).backward()
    if "merge" not in case.exceptions:
        pf.merge(every_name(model), adapter, model=model)
    after = snapshot(model)
    if train and "draws" in case.exceptions:  # from torch's generator, as dropout does
        assert after.pop("rng") != before.pop("rng")
    assert after == before
    assert all(tensor.grad is not None for tensor in pf.leaves(adapter))


@cases("identity")
def test_fresh_adapter_gives_the_bases_output_bit_for_bit(case: Case) -> None:
    model, batch = case.base(), case.batch()
    with torch.no_grad():  # nn.MultiheadAttention takes another kernel when something requires grad
        fresh, bare = applied(model, pf.init(model, case.config), batch), applied(model, (), batch)
        expected = call(model, batch)  # last: an nn.Embedding with max_norm writes to itself when it runs
    assert torch.equal(fresh, expected)
    assert torch.equal(bare, expected)


@cases("identity")
def test_trained_adapter_changes_the_output(case: Case) -> None:
    model, batch = case.base(), case.batch()
    adapted = applied(model, trained(pf.init(model, case.config)), batch)
    assert (adapted - applied(model, (), batch)).abs().max() > 1e-3


@cases("merge")
def test_merged_weights_compute_what_apply_does(case: Case, exact: Exact) -> None:
    model, batch, adapter = exact.model, exact.batch, exact.adapter()
    params = every_name(model)
    before = dict(params)
    merged = pf.merge(params, adapter, model=model)
    adapted = applied(model, adapter, batch)
    assert params.keys() == before.keys()
    unnamed = {f"{path}.bias" for path, module in model.named_modules() if "bias" in vars(module)}  # HQQ's
    assert {dense_name(name) for name in merged} - unnamed == {dense_name(name) for name in params}
    assert all(params[name] is before[name] for name in params)
    assert sum(merged[name] is not params.get(name) for name in merged) > 0
    if case.pack:  # the base's own forward takes no dense weight
        exact.close(applied(model, (), batch, params=merged), adapted)
        return
    args = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    merged = {name: tensor.detach().clone() for name, tensor in merged.items()}  # max_norm writes to what it is given
    exact.close(output(functional_call(model, merged, *args, tie_weights=False)), adapted)


@cases("sum")
def test_two_adapters_are_the_second_on_the_merged_first(exact: Exact) -> None:
    model, batch = exact.model, exact.batch
    first, second = exact.adapter(1), exact.adapter(2)
    merged = pf.merge(every_name(model), first, model=model)
    exact.close(applied(model, (first, second), batch), applied(model, second, batch, params=merged))


@cases("stack")
def test_vmap_over_a_stack_is_each_adapter_alone(exact: Exact) -> None:
    model, batch = exact.model, exact.batch
    adapters = [exact.adapter(seed) for seed in range(3)]
    stacked = pf.stack(adapters)
    with warnings.catch_warnings():  # of `nn.MultiheadAttention`, which falls back to a loop under vmap
        warnings.filterwarnings("ignore", message=".*batching rule", category=UserWarning)
        together = vmap(lambda adapter: applied(model, adapter, batch))(stacked)
        gradients = vmap(grad(exact.loss, argnums=1))(stacked, stacked.params)
    for number, adapter in enumerate(adapters):
        exact.close(together[number], applied(model, adapter, batch))
        alone = grad(exact.loss, argnums=1)(adapter, adapter.params)
        exact.close(torch_pytree.tree_map(lambda tensor: tensor[number], gradients), alone)  # noqa: B023  # called at once


@cases("stack")
def test_unstack_gives_back_what_was_stacked(case: Case) -> None:
    model = case.base()
    adapters = [trained(pf.init(model, case.config), seed) for seed in range(2)]
    for one, other in zip(pf.unstack(pf.stack(adapters)), adapters, strict=True):
        assert one.config == other.config
        assert_same(one, other)


@cases("routing")
def test_each_row_uses_its_own_adapter(exact: Exact) -> None:
    model, batch = exact.model, exact.batch
    adapters = [exact.adapter(seed) for seed in range(3)]
    routed = applied(model, pf.stack(adapters), batch, index=[2, -1, 0, 2])
    for row, number in enumerate([2, -1, 0, 2]):
        alone = applied(model, adapters[number] if number >= 0 else (), batch)[row]
        exact.close(routed[row][-len(alone) :], alone)  # a row without a prompt has masked places before it


@cases("gradients")
def test_grad_and_backward_agree(exact: Exact) -> None:
    adapter = exact.adapter()
    functional = grad(exact.loss, argnums=1)(adapter, adapter.params)
    leaves = pf.leaves(adapter)
    exact.loss(adapter, adapter.params).backward()
    assert all(tensor.grad is not None for tensor in leaves)
    exact.close([tensor.grad for tensor in leaves], functional)


@cases("float32")
def test_float32_is_as_near_to_float64_as_weights_a_rounding_away(case: Case) -> None:
    """The laws above hold for the mathematics; here is what float32 makes of it, beside what its rounding makes of it.

    Some adapters make a model of which every rounding is felt more than those of the base. So the reference is the
    truth for other weights: each of the base's and the adapter's one float32 rounding away, up or down.
    """
    model, batch = case.base(), case.batch()
    adapters = [trained(pf.init(model, case.config), seed) for seed in range(3)]
    ours = in_every_way(model, adapters, batch)
    model, batch, adapters = case.exact(), in_float64(batch), [in_float64(adapter) for adapter in adapters]
    with Float64():
        truth = in_every_way(model, adapters, batch)
        rounded = in_every_way(a_rounding_away(model), a_rounding_away(adapters), batch)
    for way, found in ours.items():
        assert_close_to_truth(in_float64(found), rounded[way], truth[way], FURTHER, FLOAT32)


def in_every_way(model: nn.Module, adapters: list[pf.Adapter], batch: Any) -> dict[str, Any]:
    """Outputs and gradients, alone, stacked and routed."""

    def value(adapter: pf.Adapter, params: Any) -> Tensor:
        return loss(pf.apply(model, adapter.replace(params=params), batch))

    one, stacked = adapters[0], pf.stack(adapters)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule", category=UserWarning)
        return {
            "output": applied(model, one, batch),
            "gradient": grad(value, argnums=1)(one, one.params),
            "outputs of a stack": vmap(lambda adapter: applied(model, adapter, batch))(stacked),
            "gradients of a stack": vmap(grad(value, argnums=1))(stacked, stacked.params),
            "rows": applied(model, stacked, batch, index=[2, 1, 0, 2]),
        }


@cases("slope")
def test_gradient_is_the_slope(exact: Exact) -> None:
    """Against the mathematics: the directional derivative, by finite differences."""
    adapter = exact.adapter()
    direction = torch_pytree.tree_map(torch.randn_like, adapter.params)

    def value(step: float) -> Tensor:
        moved = torch_pytree.tree_map(lambda tensor, along: tensor + step * along, adapter.params, direction)
        return exact.loss(adapter, moved)

    gradient = grad(exact.loss, argnums=1)(adapter, adapter.params)
    slope = sum(torch_pytree.tree_leaves(torch_pytree.tree_map(lambda g, d: (g * d).sum(), gradient, direction)))
    # Of four points: two are off by the step's square times the third derivative, 1e-4 of a wide Llama's slope at 1e-5.
    step = 1e-6  # between two kinks of T5's ReLUs
    measured = (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)
    torch.testing.assert_close(torch.as_tensor(slope), measured, rtol=1e-5, atol=1e-8)
    # The fused kernels have no forward-mode derivative, and nn.MultiheadAttention does not see that one is asked for.
    with sdpa_kernel(SDPBackend.MATH), no_fast_attention():
        forward = jvp(lambda params: exact.loss(adapter, params), (adapter.params,), (direction,))
    torch.testing.assert_close(forward[1], torch.as_tensor(slope), rtol=1e-9, atol=1e-12)


@cases("round trip")
def test_saved_adapter_loads_bit_for_bit(case: Case, tmp_path: Any) -> None:
    model = case.base()
    adapter = trained(pf.init(model, case.config))
    needs_base = methods.of(adapter.config).files.derived is not Files().derived  # files lack what is made of it
    alone = () if needs_base or "alone" in case.exceptions else (pf.load(pf.save(adapter, tmp_path)),)
    for loaded in (*alone, pf.load(pf.save(adapter, tmp_path), model)):
        assert loaded.config == adapter.config
        assert_same(loaded, adapter)


@cases("randomness")
def test_init_takes_its_randomness_from_the_generator_alone(case: Case) -> None:
    model = case.base()
    before = torch.get_rng_state()
    one, again = (pf.init(model, case.config, torch.Generator().manual_seed(3)) for _ in range(2))
    other = pf.init(model, case.config, torch.Generator().manual_seed(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(one, again)
    assert_same(pf.init(model, case.config), pf.init(model, case.config))
    assert any(not torch.equal(a, b) for a, b in zip(*map(torch_pytree.tree_leaves, (one, other)), strict=True))


@cases("pytree")
def test_torch_and_optree_see_the_same_tree(case: Case) -> None:
    adapter = pf.init(case.base(), case.config)
    ours = torch_pytree.tree_leaves(adapter)
    theirs = optree.tree_leaves(adapter)
    assert len(ours) == len(theirs) > 0
    assert all(one is other for one, other in zip(ours, theirs, strict=True))
    doubled = optree.tree_map(lambda tensor: tensor * 2, adapter)
    assert isinstance(doubled, pf.Adapter)
    assert doubled.config is adapter.config
    assert list(doubled.params) == list(adapter.params) == sorted(adapter.params)


def assert_same(one: pf.Adapter, other: pf.Adapter) -> None:
    for mine, yours in ((one.params, other.params), (one.buffers, other.buffers)):
        assert {path: list(leaf) for path, leaf in mine.items()} == {path: list(leaf) for path, leaf in yours.items()}
        for path, leaf in mine.items():
            for name, tensor in leaf.items():
                assert tensor.dtype == yours[path][name].dtype
                assert torch.equal(tensor, yours[path][name]), f"{path}.{name}"


def test_dropout_follows_the_mode_and_the_rules_of_vmap() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = trained(pf.init(model, pf.LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5)))
    x = torch.randn(4, 8)
    model.train()
    assert not torch.equal(pf.apply(model, adapter, x), pf.apply(model, adapter, x))
    torch.manual_seed(3)
    first = pf.apply(model, adapter, x)
    torch.manual_seed(3)
    assert torch.equal(pf.apply(model, adapter, x), first)
    stacked = pf.stack([adapter, adapter])
    same = vmap(lambda one: pf.apply(model, one, x), randomness="same")(stacked)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda one: pf.apply(model, one, x), randomness="different")(stacked)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random"):
        vmap(lambda one: pf.apply(model, one, x))(stacked)
    model.eval()
    assert torch.equal(pf.apply(model, adapter, x), pf.apply(model, adapter, x))


def test_adapters_of_unlike_rank_alpha_and_sites_stack() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    configs = [
        pf.LoraConfig(r=2, target_modules=["0"]),
        pf.LoraConfig(r=5, lora_alpha=20, target_modules=["0", "2"], rank_pattern={"2": 3}),
        pf.LoraConfig(r=3, target_modules=["2"], use_rslora=True),
    ]
    adapters = [trained(pf.init(model, config), seed) for seed, config in enumerate(configs)]
    stacked = pf.stack(adapters)
    assert stacked.params["0"]["lora_A"].shape == (3, 5, 8)
    together = vmap(lambda adapter: pf.apply(model, adapter, x))(stacked)
    routed = pf.apply(model, stacked, x, index=torch.tensor([2, 0, -1, 1]))
    for number, adapter in enumerate(adapters):
        alone, row = pf.apply(model, adapter, x), [1, 3, 0][number]
        assert off([together[number], routed[row]], [alone, alone[row]]) < EXACT
    gradients = vmap(grad(lambda p, a: loss(pf.apply(model, a.replace(params=p), x))))(stacked.params, stacked)
    padding = gradients["0"]["lora_A"][0, 2:]
    assert torch.equal(padding, torch.zeros_like(padding)), "padding is exact in training too"
    for one, adapter in zip(pf.unstack(stacked), adapters, strict=True):
        assert_same(one, adapter)
