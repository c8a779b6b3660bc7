"""Bases whose weights accelerate keeps elsewhere: in CPU memory, on disk, or nowhere but behind its hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bases import BASES
from oracle import called, distance, outputs, randomised
from snapshot import snapshot
from torch import Tensor, nn

import peftfn as pf
from peftfn.models import copies

LLAMA = BASES["llama"]
OPTIONS: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": "all-linear"},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "a head and a norm": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "a parameter": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate_proj.weight"]},
    "biases": {"target_modules": ["v_proj"], "bias": "all"},
}
# The same products in the same order; only where weights are added up first does the order differ.
SAME = 1e-6
SUMS = 2e-5


def hooked(model: Any, folder: Path) -> Any:
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def on_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def mixed(model: Any, folder: Path) -> Any:
    where = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


def whole_blocks(model: Any, folder: Path) -> Any:
    """Hooks that bring the weights of all modules inside."""
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True))
    return model


def among_others(model: Any, folder: Path) -> Any:
    """A hook beside another one."""
    on_cpu(model, folder)
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp.up_proj, AlignDevicesHook(io_same_device=True), append=True)
    return model


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    way.__name__: way for way in (hooked, on_cpu, on_disk, mixed, whole_blocks, among_others)
}


def adapter_for(options: dict[str, Any]) -> pf.Adapter:
    return randomised(pf.init(LLAMA.make(), pf.LoraConfig(**options)))


def hooks_of(model: nn.Module) -> list[Any]:
    """What every hook knows, and the bits of the weights that it keeps."""
    found: list[Any] = []
    for hook in (one for module in model.modules() for one in copies.hooks(module)):
        known = {name: value for name, value in vars(hook).items() if name not in ("weights_map", "hooks")}
        kept: Any = getattr(hook, "weights_map", None) or {}
        kept = getattr(kept, "dataset", kept)  # all that the model's hooks share, where they see a part of it each
        found.append((repr(known), {name: kept[name].tolist() for name in kept}))
    return found


def gradients(run: Callable[[], Any], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs(run()).square().mean(), leaves))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_offloaded_base_runs_adapted_with_the_same_gradients_and_stays_as_it_is(
    way: Callable[[Any, Path], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    batch, adapter = LLAMA.inputs(), adapter_for(options)
    leaves = pf.leaves(adapter)
    plain = LLAMA.make()
    expected = outputs(pf.apply(plain, adapter, batch)).detach()
    grads = gradients(lambda: pf.apply(plain, adapter, batch), leaves)
    model = way(LLAMA.make(), tmp_path)
    before, kept = snapshot(model), hooks_of(model)
    assert distance(outputs(pf.apply(model, adapter, batch)), expected) < SAME
    for found, one in zip(gradients(lambda: pf.apply(model, adapter, batch), leaves), grads, strict=True):
        assert distance(found, one) < SAME
    bound = pf.bind(model, adapter)
    assert distance(outputs(called(bound, batch)), expected) < SAME
    outputs(called(bound, batch)).square().mean().backward()
    by_memory = {parameter.data_ptr(): parameter.grad for parameter in bound.parameters() if parameter.requires_grad}
    for leaf, one in zip(leaves, grads, strict=True):
        grad = by_memory[leaf.data_ptr()]
        assert grad is not None
        assert distance(grad, one) < SAME
    assert snapshot(model) == before
    assert hooks_of(model) == kept
    with torch.no_grad():
        assert distance(outputs(called(model, batch)), outputs(called(plain, batch))) < SAME


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_offloaded_base_is_merged_from_where_its_weights_are(
    way: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    adapter, plain, batch = adapter_for(OPTIONS["layers"]), LLAMA.make(), LLAMA.inputs()
    model = way(LLAMA.make(), tmp_path)
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    expected = pf.merge(dict(plain.named_parameters()), adapter)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    found = pf.apply(model, (), batch, params=merged)
    assert distance(outputs(found), outputs(pf.apply(plain, adapter, batch))) < SUMS


def test_a_bound_offloaded_base_is_saved_whole(tmp_path: Path) -> None:
    adapter, plain = adapter_for(OPTIONS["layers"]), LLAMA.make()
    model = on_disk(LLAMA.make(), tmp_path / "offload")
    pf.bind(model, adapter).save_pretrained(tmp_path / "merged", merge=True)
    loaded: Any = type(plain).from_pretrained(tmp_path / "merged")
    expected = pf.merge(plain.state_dict(), adapter)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_model_that_transformers_offloads_to_disk_runs_adapted(tmp_path: Path) -> None:
    plain: Any = LLAMA.make()
    plain.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    where |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model: Any = type(plain).from_pretrained(tmp_path / "base", device_map=where, offload_folder=tmp_path / "offload")
    assert any(one.is_meta for one in model.parameters())
    adapter, batch = adapter_for(OPTIONS["layers"]), LLAMA.inputs()
    expected = outputs(pf.apply(plain, adapter, batch))
    assert distance(outputs(pf.apply(model, adapter, batch)), expected) < SAME
    assert distance(outputs(called(pf.bind(model, adapter), batch)), expected) < SAME


def test_a_weight_on_the_meta_device_is_not_merged_in_silence(tmp_path: Path) -> None:
    model: nn.Module = on_cpu(LLAMA.make(), tmp_path)
    with pytest.raises(ValueError, match=r"is on the meta device.*model=model"):
        pf.merge(dict(model.named_parameters()), adapter_for(OPTIONS["layers"]))
