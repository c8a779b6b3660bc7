"""`combine` against PEFT's `add_weighted_adapter`, and against the mathematics where PEFT is wrong or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import exact
import pytest
import torch
from bases import BASES
from oracle import IS_OLD, called, distance, loaded, outputs, quiet_peft, randomised
from torch import Tensor, nn

import peftfn as pf
from peftfn.methods.low_rank import weighted_sum

pytestmark = pytest.mark.skipif(IS_OLD, reason="other formulas for negative weights")

# Everything is float64 but the weights and roots of scalings, which peft rounds to float32: 6e-8 each.
CLOSE = 1e-6
Options = dict[str, Any]


class Case(NamedTuple):
    """A base, and two adapters for it: the options of each beside r=3 and alpha=5."""

    base: str
    first: Options
    second: Options


NAMED: Options = {"target_modules": ["0", "5"]}
CASES = {
    "linear": Case("mlp", {"target_modules": ["0", "3"]}, {"target_modules": ["3", "5"], "lora_alpha": 2}),
    "Conv1D": Case("gpt2", {"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_attn"]}),
    "embedding": Case("words", {"target_modules": ["0", "1"]}, {"target_modules": ["0"], "lora_alpha": 1}),
    "convolution": Case("convnet", {"target_modules": ["4"]}, {"target_modules": ["4", "5"], "lora_alpha": 2}),
    "convolutions": Case("convnet", {"target_modules": ["0", "8"]}, {"target_modules": ["0", "4"]}),
    "1×1 convolution": Case("convnet", {"target_modules": ["5"]}, {"target_modules": ["5", "4"]}),
    "attention": Case("attention", {"target_modules": ["attention"]}, {"target_modules": ["attention", "head"]}),
    "regex": Case("mlp", {"target_modules": "0|3"}, {"target_modules": "[35]"}),
}
# PEFT's svd flattens kernels of two dimensions only; those of one and three are held against the mathematics below.
PAIRS = [(name, m) for name in CASES for m in weighted_sum.NAMES if name != "convolutions" or not m.endswith("svd")]
ADDING = [name for name in weighted_sum.NAMES if name != "cat" and not name.endswith("svd")]


def both(case: Case, **more: Options) -> tuple[nn.Module, list[pf.Adapter]]:
    """The base of a case, and its two adapters with random values."""
    base = exact.in_float64(BASES[case.base].make())
    given = [
        {"r": 3, "lora_alpha": 5, **options, **more.get(name, {})} for name, options in zip("ab", case[1:], strict=True)
    ]
    made = [pf.init(base, pf.LoraConfig(**options)) for options in given]
    return base, [randomised(adapter, seed, 0.5) for seed, adapter in enumerate(made)]


def of_peft(base: nn.Module, adapters: list[pf.Adapter], folder: Path, *args: Any, **options: Any) -> Any:
    """A peft model whose active adapter is the combination."""
    names = [f"a{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        pf.save(adapter, folder / name)
    model = loaded(base, folder / names[0], adapter_name=names[0])
    with quiet_peft():
        for name in names[1:]:
            model.load_adapter(str(folder / name), name)
        inject = model.base_model.inject_adapter

        def then_seed(*given: Any, **named: Any) -> None:
            inject(*given, **named)  # draws a start for the new adapter, from the same numbers as dare_* after it
            torch.manual_seed(7)

        model.base_model.inject_adapter = then_seed
        model.add_weighted_adapter(names, args[0], "mixed", combination_type=args[1], **options)
        model.set_adapter("mixed")
    return model


def deltas_of_peft(model: Any) -> dict[str, Tensor]:
    """What the active adapter of a peft model adds to each weight, by the site's path."""
    found: dict[str, Tensor] = {}
    for path, layer in model.base_model.model.named_modules():
        if "mixed" in {*getattr(layer, "lora_A", ()), *getattr(layer, "lora_embedding_A", ())}:
            found[path.replace(".base_layer", "")] = layer.get_delta_weight("mixed")
    return found


def deltas(base: nn.Module, adapter: pf.Adapter) -> dict[str, Tensor]:
    """The same of ours."""
    names = {
        path: place.name for path, place in pf.methods.of(adapter.config).targets.sites(base, adapter.config).items()
    }
    params = {name: tensor.detach() for name, tensor in base.named_parameters(remove_duplicate=False)}
    merged = pf.merge({name: torch.zeros_like(tensor) for name, tensor in params.items()}, adapter, model=base)
    return {path: merged[names[path]] for path in adapter.params}


def weighted(base: nn.Module, adapters: list[pf.Adapter], weights: list[float]) -> dict[str, Tensor]:
    """Σ w·ΔW, by the mathematics."""
    found: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in deltas(base, adapter).items():
            found[path] = found.get(path, torch.zeros(())) + weight * delta
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for path, delta in theirs.items():
        assert distance(ours[path], delta) < CLOSE, path


def options_of(method: str) -> Options:
    return {"density": 0.6} if method in weighted_sum.PRUNED else {}


@pytest.mark.parametrize("weights", [[0.75, 0.375], [1.5, -0.625]], ids=str)
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_combination_is_peft_s(name: str, method: str, weights: list[float], tmp_path: Path) -> None:
    base, adapters = both(CASES[name])
    options = options_of(method)
    mixed = pf.combine(adapters, weights, method, **options, generator=torch.Generator().manual_seed(7))
    model = of_peft(base, adapters, tmp_path, weights, method, **options)
    assert_close(deltas(base, mixed), deltas_of_peft(model))
    if name != "attention":  # whose output projection peft counts twice
        batch = exact.in_float64(BASES[CASES[name].base].inputs())
        assert distance(outputs(pf.apply(base, mixed, batch)), outputs(called(model, batch))) < CLOSE


def test_clamp_frequency_and_full_density_are_peft_s(tmp_path: Path) -> None:
    base, adapters = both(CASES["linear"])
    several: list[tuple[str, Options, Options]] = [
        ("svd", {"clamp": 0.9}, {"svd_clamp": 0.9}),
        ("svd", {"rank": 2, "full_matrices": False}, {"svd_rank": 2, "svd_full_matrices": False}),
        ("ties", {"density": 0.5, "majority_sign_method": "frequency"}, {}),
        ("ties_svd", {"density": 1.0, "rank": 1}, {"density": 1.0, "svd_rank": 1}),
    ]
    for number, (method, ours, theirs) in enumerate(several):
        mixed = pf.combine(adapters, [0.75, -0.375], method, **ours)
        model = of_peft(base, adapters, tmp_path / str(number), [0.75, -0.375], method, **(theirs or ours))
        assert_close(deltas(base, mixed), deltas_of_peft(model))


@pytest.mark.parametrize("method", ["svd", "cat", "dare_ties"])
def test_one_adapter_alone_is_scaled_as_peft_scales_it(method: str, tmp_path: Path) -> None:
    base, adapters = both(CASES["linear"])
    mixed = pf.combine(adapters[:1], [-0.375], method, **options_of(method))
    assert_close(deltas(base, mixed), deltas_of_peft(of_peft(base, adapters[:1], tmp_path, [-0.375], method)))
    assert_close(deltas(base, mixed), weighted(base, adapters[:1], [-0.375]))
    assert mixed.config.r == 3


def sums_of_svd(base: nn.Module, adapters: list[pf.Adapter], weights: list[float], rank: int) -> dict[str, Tensor]:
    """The nearest matrices of a rank to Σ w·ΔW, by torch's SVD of the whole."""
    found: dict[str, Tensor] = {}
    for path, delta in weighted(base, adapters, weights).items():
        u, s, vh = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
        found[path] = ((u[:, :rank] * s[:rank]) @ vh[:rank]).view(delta.shape).float()
    return found


@pytest.mark.parametrize("name", CASES)
def test_cat_is_the_weighted_sum_and_svd_the_nearest_of_its_rank(name: str) -> None:
    base, adapters = both(CASES[name], b={"r": 2})
    weights = [0.75, -0.375]
    expected = weighted(base, adapters, weights)
    assert_close(deltas(base, pf.combine(adapters, weights, "cat")), expected)
    assert_close(deltas(base, pf.combine(adapters, weights, rank=5)), expected)
    for rank in (1, 3, None):
        mixed = pf.combine(adapters, weights, rank=rank)
        assert_close(deltas(base, mixed), sums_of_svd(base, adapters, weights, rank or 3))


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
def test_peft_reads_what_was_combined(method: str, tmp_path: Path) -> None:
    """Ranks that differ by site are in the file's patterns, and the scaling is 1 at each of them."""
    pattern: Options = {"r": 4, "rank_pattern": {"3": 2}, "alpha_pattern": {"3": 7}}
    alike: Options = {"r": 4, "rank_pattern": {"3": 2}} if method in ADDING else {"r": 2}
    base, adapters = both(CASES["linear"], a=pattern, b=alike)
    mixed = pf.combine(adapters, [0.75, -0.375], method, **options_of(method))
    for path, leaf in mixed.params.items():
        assert mixed.buffers[path]["scaling"] == 1
        assert leaf["lora_A"].shape[0] == leaf["lora_B"].shape[1]
    if method == "cat":
        assert {path: leaf["lora_A"].shape[0] for path, leaf in mixed.params.items()} == {"0": 4, "3": 4, "5": 2}
        assert mixed.config.r == mixed.config.lora_alpha == 4
        assert dict(mixed.config.rank_pattern) == dict(mixed.config.alpha_pattern) == {"^5": 2}
    model = loaded(base, pf.save(mixed, tmp_path))
    x = BASES["mlp"].inputs().double()
    assert distance(pf.apply(base, mixed, x), model(x)) < CLOSE
    again = pf.load(tmp_path, base)
    assert again.config == mixed.config
    assert torch.equal(pf.apply(base, again, x), pf.apply(base, mixed, x))


def test_a_rank_is_cut_to_what_a_layer_can_have() -> None:
    base, adapters = both(CASES["linear"], a={"r": 12}, b={"r": 12})
    mixed = pf.combine(adapters, [0.7, 0.4])
    assert {path: leaf["lora_A"].shape[0] for path, leaf in mixed.params.items()} == {"0": 10, "3": 12, "5": 3}
    assert_close(deltas(base, mixed), sums_of_svd(base, adapters, [0.7, 0.4], 12))


def test_a_rank_above_that_of_the_sum_can_be_trained_on() -> None:
    """The rest of A is orthonormal and the rest of B zero, as in a fresh LoRA: B gets a gradient."""
    _, adapters = both(CASES["linear"])
    mixed = pf.combine(adapters, [0.7, 0.4], rank=8).params["3"]
    torch.testing.assert_close(mixed["lora_A"] @ mixed["lora_A"].T, torch.eye(8).double(), rtol=0, atol=CLOSE)
    assert mixed["lora_B"][:, 6:].abs().max() < CLOSE


@pytest.mark.parametrize("method", ["svd", "linear"])
def test_rslora_is_in_the_factors_once(method: str) -> None:
    """PEFT keeps use_rslora in the config of the combination, and so multiplies it by sqrt(r) once more."""
    base, adapters = both(CASES["linear"], a={"use_rslora": True})
    weights = [0.75, -0.375]
    mixed = pf.combine(adapters, weights, method)
    if method == "svd":
        assert_close(deltas(base, mixed), sums_of_svd(base, adapters, weights, 3))
    first = weighted(base, adapters[:1], weights[:1])  # the second adapter has no site "0": no cross terms there
    assert distance(deltas(base, mixed)["0"], first["0"]) < CLOSE
    assert not mixed.config.use_rslora


def test_linear_has_cross_terms() -> None:
    base, adapters = both(CASES["linear"])
    mixed = deltas(base, pf.combine(adapters, [0.75, -0.375], "linear"))["3"]
    (a1, b1), (a2, b2) = ((leaf["lora_A"], leaf["lora_B"]) for leaf in (one.params["3"] for one in adapters))
    p, q = (0.75 * 5 / 3) ** 0.5, (0.375 * 2 / 3) ** 0.5
    expected = (p * b1 + q * b2) @ (p * a1 - q * a2)
    assert distance(mixed, expected) < CLOSE
    assert distance(mixed, weighted(base, adapters, [0.75, -0.375])["3"]) > 0.1
