"""`combine` where PEFT has no answer or loses something: other layers, dtypes, configs, heads; gradients; errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import BASES, Attention
from cases import Experts, TransposedExperts
from oracle import distance, randomised
from same import assert_says, bits, flat
from test_combine import assert_close, deltas, sums_of_svd, weighted
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftfn as pf

WEIGHTS = [0.7, -0.4]

# Products of a few hundred float32 numbers, of size 1, in another order; an SVD in between loses one digit more.
CLOSE = 1e-5


def pair(model: nn.Module, first: dict[str, Any], second: dict[str, Any] | None = None) -> list[pf.Adapter]:
    """Two adapters with random values."""
    given = [first, first if second is None else second]
    return [randomised(pf.init(model, pf.LoraConfig(**one)), seed, 0.5) for seed, one in enumerate(given)]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))


def outputs_add_up(model: nn.Module, mixed: pf.Adapter, adapters: list[pf.Adapter], x: Tensor) -> bool:
    """Of a model that is linear in its adapted layer: the mixed output is the weighted sum of the changes."""
    base = pf.apply(model, (), x)
    expected = base + sum(
        weight * (pf.apply(model, one, x) - base) for weight, one in zip(WEIGHTS, adapters, strict=True)
    )
    return distance(pf.apply(model, mixed, x), expected) < CLOSE


def test_groups_of_a_convolution_are_kept_apart() -> None:
    """PEFT's `cat` takes each group's channels of A for the next group's B, and its `svd` has no groups."""
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(2, 4, 5, 5)
    adapters = pair(conv, {"r": 2, "target_modules": ["0"]}, {"r": 4, "target_modules": ["0"]})
    for options in ({"method": "cat"}, {"method": "svd", "rank": 6}, {"method": "svd", "rank": 5}):
        mixed = pf.combine(adapters, WEIGHTS, **options)
        assert mixed.config.r == 6
        assert_close(deltas(conv, mixed), weighted(conv, adapters, WEIGHTS))
        assert outputs_add_up(conv, mixed, adapters, x)


def test_a_dense_kernel_of_peft_s_is_combined_with_ours(tmp_path: Path) -> None:
    """With groups, A of PEFT's reads all channels: no weight has that delta, but outputs add up."""
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    ours, theirs = pair(conv, {"r": 2, "target_modules": ["0"]})
    dense = {"lora_A": torch.randn(2, 4, 3, 3), "lora_B": theirs.params["0"]["lora_B"]}
    adapters = [ours, theirs.replace(params={"0": dense})]
    for method in ("cat", "svd"):
        mixed = pf.combine(adapters, WEIGHTS, method, **({"rank": 4} if method == "svd" else {}))
        assert mixed.params["0"]["lora_A"].shape == (4, 4, 3, 3)
        assert outputs_add_up(conv, mixed, adapters, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("build", [Experts, TransposedExperts], ids=lambda build: build.__name__)
def test_experts_are_combined_one_by_one(build: Any) -> None:
    model = build()
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    adapters = pair(model, {"r": 2, "target_parameters": names}, {"r": 1, "target_parameters": names})
    expected = weighted(model, adapters, WEIGHTS)
    for mixed in (pf.combine(adapters, WEIGHTS, "cat"), pf.combine(adapters, WEIGHTS, rank=3)):
        assert mixed.config.r == 3
        assert_close(deltas(model, mixed), expected)
    nearest = deltas(model, pf.combine(adapters, WEIGHTS))
    for path, delta in expected.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        assert distance(nearest[path], (u[..., :2] * s[:, None, :2]) @ vh[:, :2]) < CLOSE


def test_attention_s_projections_are_plain_matrices() -> None:
    model = Attention()
    adapters = pair(model, {"r": 2, "target_modules": ["attention"]})
    assert_close(deltas(model, pf.combine(adapters, WEIGHTS, "cat")), weighted(model, adapters, WEIGHTS))
    assert_close(deltas(model, pf.combine(adapters, WEIGHTS)), sums_of_svd(model, adapters, WEIGHTS, 2))


def test_parts_of_a_fused_layer_are_joined(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=8, vocab_size=20)).eval()
    batch = {"input_ids": torch.randint(0, 20, (2, 5))}
    q, v, whole = ({"r": 2, "target_modules": [name]} for name in ("c_attn.q", "c_attn.v", "attn.c_attn"))
    for first, second in ((q, v), (v, q), (q, q), (q, whole)):
        adapters = pair(model, first, second)
        mixed = pf.combine(adapters, WEIGHTS, "cat")
        assert_close(deltas(model, mixed), weighted(model, adapters, WEIGHTS))
        again = pf.load(pf.save(mixed, tmp_path), model)
        assert distance(pf.apply(model, again, batch).logits, pf.apply(model, mixed, batch).logits) == 0


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_halves_are_combined_in_float32_and_the_widest_dtype_stays(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    model = mlp()
    adapters = [
        randomised(pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]), dtype=dtype), seed)
        for seed, dtype in enumerate(dtypes)
    ]
    wide = [a.replace(params={"0": {n: t.float() for n, t in a.params["0"].items()}}) for a in adapters]
    for method in ("linear", "cat", "svd"):
        mixed, exact = (pf.combine(one, WEIGHTS, method).params["0"] for one in (adapters, wide))
        for name, tensor in mixed.items():
            assert tensor.dtype == torch.promote_types(*dtypes)
            assert torch.equal(tensor, exact[name].to(tensor.dtype)), (method, name)


def test_float64_stays_float64() -> None:
    model = mlp().double()
    adapters = pair(model, {"r": 2, "target_modules": ["0"]})
    mixed = pf.combine(adapters, WEIGHTS)
    assert mixed.params["0"]["lora_A"].dtype == mixed.buffers["0"]["scaling"].dtype == torch.float64
    exact = sum(
        w * 4 * a.params["0"]["lora_B"] @ a.params["0"]["lora_A"] for w, a in zip(WEIGHTS, adapters, strict=True)
    )
    u, s, vh = torch.linalg.svd(exact)
    merged = pf.merge({"0.weight": torch.zeros(8, 6, dtype=torch.float64)}, mixed)["0.weight"]
    torch.testing.assert_close(merged, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-12, atol=1e-12)


# --- configs ---------------------------------------------------------------------------------------------------------


def test_names_that_do_not_add_up_become_paths(tmp_path: Path) -> None:
    base, x = BASES["llama"].make(), BASES["llama"].inputs()
    several = [
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, {"target_modules": ["v_proj"]}),
        ({"target_modules": ["q_proj"]}, {"target_modules": r".*\.v_proj"}),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, {"target_modules": ["q_proj", "v_proj"]}),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}),
    ]
    for first, second in several:
        adapters = pair(base, {"r": 2, **first}, {"r": 2, **second})
        mixed = pf.combine(adapters, WEIGHTS, "cat")
        assert set(mixed.params) == {path for one in adapters for path in one.params}
        again = pf.load(pf.save(mixed, tmp_path), base)
        assert torch.equal(pf.apply(base, again, x).logits, pf.apply(base, mixed, x).logits)


def heads(base: nn.Module) -> list[pf.Adapter]:
    return pair(base, {"r": 2, "target_modules": ["0"], "modules_to_save": ["2"]})


def test_a_head_is_kept_if_there_is_one_to_keep(tmp_path: Path) -> None:
    base = mlp()
    first, second = heads(base)
    plain = pair(base, {"r": 2, "target_modules": ["0"]})[1]
    same = second.replace(params={**second.params, "2": {n: t.clone() for n, t in first.params["2"].items()}})
    for other in (plain, same):
        for order in ((first, other), (other, first)):
            mixed = pf.combine(order, WEIGHTS, "cat")
            assert torch.equal(mixed.params["2"]["weight"], first.params["2"]["weight"])
            assert mixed.config.modules_to_save == ("2",)
            assert flat(pf.load(pf.save(mixed, tmp_path), base)).keys() == flat(mixed).keys()


def test_biases_are_kept_where_one_adapter_has_them(tmp_path: Path) -> None:
    base = mlp()
    adapters = pair(
        base,
        {"r": 2, "target_modules": ["0"], "bias": "lora_only"},
        {"r": 2, "target_modules": ["2"], "bias": "lora_only"},
    )
    mixed = pf.load(pf.save(pf.combine(adapters, WEIGHTS, "cat"), tmp_path), base)
    for one in adapters:
        for path, leaf in one.params.items():
            assert torch.equal(mixed.params[path]["bias"], leaf["bias"])


# --- laws ------------------------------------------------------------------------------------------------------------


def zeros(tree: Any) -> Any:
    return {path: {name: torch.zeros_like(tensor) for name, tensor in leaf.items()} for path, leaf in tree.items()}


def moved(tree: Any, by: Any, step: float) -> Any:
    return {path: {name: t + step * by[path][name] for name, t in leaf.items()} for path, leaf in tree.items()}


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_gradients_reach_adapters_and_weights(method: str) -> None:
    model, x = mlp().double(), torch.randn(3, 6, dtype=torch.float64)
    adapters = pair(model, {"r": 2, "target_modules": ["0", "2"]}, {"r": 2, "target_modules": ["0"]})

    def value(trees: Any, weights: Tensor) -> Tensor:
        made = [one.replace(params=tree) for one, tree in zip(adapters, trees, strict=True)]
        return pf.apply(model, pf.combine(made, weights, method), x).square().sum()

    trees = [one.params for one in adapters]
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    grads, of_weights = torch.func.grad(value, argnums=(0, 1))(trees, weights)
    step = 1e-6
    for index in range(2):
        there, back = (value(trees, weights + sign * step * torch.eye(2)[index]) for sign in (1, -1))
        torch.testing.assert_close(of_weights[index], (there - back) / (2 * step), rtol=1e-6, atol=1e-6)
    noise = [randomised(one.replace(params=zeros(one.params)), 9, 1.0).params for one in adapters]
    there, back = (
        value([moved(tree, by, sign * step) for tree, by in zip(trees, noise, strict=True)], weights)
        for sign in (1, -1)
    )
    pairs = zip(grads, noise, strict=True)
    slope = sum((grad[path][name] * by[path][name]).sum() for grad, by in pairs for path in by for name in by[path])
    torch.testing.assert_close(slope, (there - back) / (2 * step), rtol=1e-6, atol=1e-6)


def test_weights_can_be_mapped_over() -> None:
    model, x = mlp(), torch.randn(3, 6)
    adapters, many = pair(model, {"r": 2, "target_modules": ["0"]}), torch.tensor([WEIGHTS, [0.2, 0.5]])
    for method in ("linear", "cat"):
        mapped = torch.vmap(lambda w, how=method: pf.apply(model, pf.combine(adapters, w, how), x))(many)
        alone = pf.apply(model, pf.combine(adapters, [0.2, 0.5], method), x)
        torch.testing.assert_close(mapped[1], alone, rtol=1e-5, atol=1e-6)


def test_combining_changes_no_argument_and_no_global_random_state() -> None:
    adapters = pair(mlp(), {"r": 2, "target_modules": ["0"]})
    before = [{name: bits(t).clone() for name, t in flat(one).items()} for one in adapters]
    state = torch.get_rng_state()
    made = [pf.combine(adapters, WEIGHTS, "dare_ties_svd", density=0.5) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for one, old in zip(adapters, before, strict=True):
        assert all(bits(tensor).equal(old[name]) for name, tensor in flat(one).items())
    assert all(bits(t).equal(bits(flat(made[1])[name])) for name, t in flat(made[0]).items())
    other = pf.combine(adapters, WEIGHTS, "dare_ties_svd", density=0.5, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other.params["0"]["lora_A"], made[0].params["0"]["lora_A"])


# --- errors ----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"weights": [1.0]}, "ValueError: 2 adapters and 1 weights"),
    "weights of two axes": ({"weights": torch.ones(2, 1)}, "ValueError: expected one axis of 2"),
    "method": ({"method": "lineer"}, "ValueError: method='lineer' is unknown; expected one of svd, linear"),
    "no density": ({"method": "ties"}, "ValueError: method='ties' needs density="),
    "density 0": ({"method": "ties", "density": 0}, "ValueError: density=0; expected a number above 0 and at most 1"),
    "density 1.5": ({"method": "dare_linear", "density": 1.5}, "ValueError: density=1.5; expected a number"),
    "density for nothing": ({"density": 0.5}, "ValueError: density=0.5; expected none: 'svd' prunes nothing"),
    "rank for nothing": ({"method": "cat", "rank": 2}, "ValueError: rank=2 has no meaning for method='cat'"),
    "rank": ({"rank": 0}, "ValueError: rank=0; expected a positive integer"),
    "clamp": ({"clamp": 2}, "ValueError: clamp=2; expected a quantile"),
    "sign": ({"majority_sign_method": "most"}, "ValueError: majority_sign_method='most'; expected total or frequency"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name: str) -> None:
    options, said = BAD[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        pf.combine(**{"adapters": pair(mlp(), {"r": 2, "target_modules": ["0"]}), "weights": WEIGHTS, **options})
    assert_says(caught, said)


def test_wrong_adapters_are_named() -> None:
    base = mlp()
    first, second = pair(base, {"r": 2, "target_modules": ["0"]}, {"r": 3, "target_modules": ["0"]})
    tall = nn.Sequential(nn.Linear(6, 9))
    odd = pf.init(nn.Sequential(nn.Embedding(6, 8)), pf.LoraConfig(r=2, target_modules=["0"]))
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {"weights": []}, "ValueError: no adapter"),
        ([first, base], {}, "TypeError: adapter is a list of Adapter, Sequential"),
        ([pf.stack([first, first]), first], {}, "TypeError: was given a stack"),
        ([first, second], {"method": "linear"}, "ValueError: at '0' the adapters have ranks [2, 3]"),
        ([first, second], {"method": "dare_ties", "density": 0.5}, "ValueError: Use method='svd' or 'cat'"),
        ([first, *pair(tall, {"r": 2, "target_modules": ["0"]})[:1]], {}, "ValueError: weights of 8×6, 9×6; expected"),
        ([first, odd], {}, "ValueError: holds ['lora_embedding_A', 'lora_embedding_B'] at '0'"),
        (heads(base), {}, "ValueError: several adapters hold 2."),
        ([first, *pair(base, {"r": 2, "target_modules": ["2"], "bias": "all"})[:1]], {}, "ValueError: bias of"),
        ([heads(base)[0], *pair(base, {"r": 2, "target_modules": ["2"]})[:1]], {}, "ValueError: replaced whole by"),
    ]
    for adapters, options, said in wrong:
        with pytest.raises((ValueError, TypeError)) as caught:
            pf.combine(adapters, **{"weights": WEIGHTS, **options})
        assert_says(caught, said)
