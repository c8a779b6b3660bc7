"""LN tuning against peft, and what is peculiar to copies of a base's own tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cases import gpt2, llama, tokens
from exact import EXACT, off
from quantized import packed
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import peftfn as pf


class Block(nn.Module):
    """A norm, a norm that keeps statistics, and a module with two layers and a ReLU in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.statistics = nn.BatchNorm1d(6)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) -> (rows, 6)."""
        return x + self.mlp(self.statistics(self.norm(x)))


def model_and_batch() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 3)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean = torch.randn(6).double()
    return model.eval(), torch.randn(4, 6).double()


def made(model: nn.Module, seed: int = 0, **options: Any) -> pf.Adapter:
    return oracle.randomised(pf.init(model, pf.LNTuningConfig(**options)), seed)


TARGETS: dict[str, dict[str, Any]] = {
    "norms": {"target_modules": ["norm"]},
    "norms with statistics": {"target_modules": ["norm", "statistics"]},
    "modules with layers inside": {"target_modules": ["0.mlp", "1.norm"]},
    "a regex": {"target_modules": r"1\.(norm|mlp)"},
    "less some, and a head": {"target_modules": ["norm"], "exclude_modules": ["0.norm"], "modules_to_save": ["2"]},
    "linear layers": {"target_modules": "all-linear", "exclude_modules": ["2"]},
}


@oracle.by_new_peft
@pytest.mark.parametrize("options", TARGETS.values(), ids=list(TARGETS))
def test_outputs_gradients_merges_and_files_are_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = model_and_batch()
    adapter = made(model, **options)
    pf.save(adapter, tmp_path / "ours")
    theirs = oracle.loaded(model, tmp_path / "ours")
    expected = theirs(x)
    assert off(pf.apply(model, adapter, x), expected) < EXACT
    assert (expected - model(x)).abs().max() > 1e-2
    expected.square().mean().backward()
    params = {path: {n: t.clone().requires_grad_() for n, t in leaf.items()} for path, leaf in adapter.params.items()}
    pf.apply(model, adapter.replace(params=params), x).square().mean().backward()
    named = {key: one.grad for key, one in oracle.trained(theirs).items()}
    plain = {re.sub(r"\.(ln_tuning_layers|modules_to_save)\.default", "", key): one for key, one in named.items()}
    found = {f"base_model.model.{path}.{n}": t.grad for path, leaf in params.items() for n, t in leaf.items()}
    assert off(found, plain) < EXACT
    merged = pf.merge(model.state_dict(), adapter)
    if not any("mlp." in path for path in adapter.params):  # peft looks for a weight of the module itself, and fails
        whole = {re.sub(r"modules_to_save\.default\.", "", key): t for key, t in oracle.merged_of(theirs).items()}
        assert off(merged, {key: whole[key] for key in merged}) < EXACT
    assert off(functional_call(model, merged, (x,)), expected) < EXACT
    with oracle.quiet_peft():
        theirs.save_pretrained(tmp_path / "theirs")
    for again in (pf.load(tmp_path / "theirs", model), pf.load(tmp_path / "theirs"), pf.load(tmp_path / "ours", model)):
        assert off((again.params, again.buffers), (adapter.params, adapter.buffers)) == 0.0
    assert again.config == adapter.config


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_default_modules_are_pefts_and_a_fresh_copy_changes_nothing(build: Callable[[], Any]) -> None:
    model, ids = build().eval(), tokens()()
    adapter, before = pf.init(model, pf.LNTuningConfig()), snapshot(model)
    other = oracle.made(model, {"kind": "LNTuningConfig"})
    assert set(oracle.trained(other)) == {
        f"base_model.model.{path}.ln_tuning_layers.default.{name}"
        for path, leaf in adapter.params.items()
        for name in leaf
    }
    assert torch.equal(pf.apply(model, adapter, ids).logits, model(ids).logits)
    assert torch.equal(pf.bind(model, adapter)(ids).logits, model(ids).logits)
    assert snapshot(model) == before


def test_stacks_routes_and_transforms_are_calls_one_by_one() -> None:
    model, x = model_and_batch()
    one, other = (made(model, seed, target_modules=["norm"]) for seed in (1, 2))
    alone = [pf.apply(model, each, x) for each in (one, other)]
    stacked = pf.stack([one, other])
    assert off(vmap(lambda a: pf.apply(model, a, x))(stacked), torch.stack(alone)) < EXACT
    routed = pf.apply(model, stacked, x, index=[1, 0, -1, 1])
    assert off(routed, torch.stack([alone[1][0], alone[0][1], model(x)[2], alone[1][3]])) < EXACT
    assert off([each.params for each in pf.unstack(stacked)], [one.params, other.params]) == 0.0

    def loss(params: Any, adapter: pf.Adapter) -> Tensor:
        return pf.apply(model, adapter.replace(params=params), x).square().mean()

    gradients = vmap(grad(loss))(stacked.params, stacked)
    second = {path: {name: t[1] for name, t in leaf.items()} for path, leaf in gradients.items()}
    assert off(second, grad(loss)(other.params, other)) < EXACT


def test_rows_have_their_own_norms_inside_a_fused_encoder_layer() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(3, 5, 8)
    one, other = (made(model, seed, target_modules=["norm1"]) for seed in (1, 2))
    with torch.no_grad():
        expected = [pf.apply(model, one, x)[0], pf.apply(model, other, x)[1], model(x)[2]]
        found = pf.apply(model, pf.stack([one, other]), x, index=[0, 1, -1])
    torch.testing.assert_close(found, torch.stack(expected))


def test_two_copies_of_one_tensor_are_refused_and_beside_lora_it_counts() -> None:
    model, x = model_and_batch()
    one, other = (made(model, seed, target_modules=["norm"]) for seed in (1, 2))
    with pytest.raises(ValueError, match=r"two of the active adapters replace 0\.norm\.\w+; only one can"):
        pf.apply(model, (one, other), x)
    lora = oracle.randomised(pf.init(model, pf.LoraConfig(r=2, target_modules=["2"])))
    merged = pf.merge(dict(model.named_parameters()), (one, lora))
    assert off(pf.apply(model, (one, lora), x), functional_call(model, merged, (x,))) < EXACT


def test_a_packed_layer_is_trained_dense() -> None:
    torch.manual_seed(0)
    model = packed(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "nf4")
    x = torch.randn(3, 64)
    adapter = made(model, target_modules=["0"])
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    assert merged["0.weight"] is adapter.params["0"]["weight"]
    torch.testing.assert_close(pf.apply(model, (), x, params=merged), pf.apply(model, adapter, x))


def test_a_module_without_tensors_is_refused() -> None:
    model, _ = model_and_batch()
    with pytest.raises(ValueError, match=r"names '0\.mlp\.1', a ReLU; expected a module with tensors of its own"):
        pf.init(model, pf.LNTuningConfig(target_modules=["0.mlp.1"]))


def test_a_file_that_lacks_a_copy_is_refused(tmp_path: Path) -> None:
    model, _ = model_and_batch()
    adapter = made(model, target_modules=["norm"])
    params = {path: leaf for path, leaf in adapter.params.items() if path != "1.norm"}
    pf.save(adapter.replace(params=params), tmp_path)
    with pytest.raises(KeyError, match=r"missing sites 1 \(1\.norm\)"):
        pf.load(tmp_path, model)
