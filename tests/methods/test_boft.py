"""BOFT where peft says nothing: files of one factor, sizes that do not divide, dropout, layers that peft has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import quantized
import safetensors.torch
import torch
from exact import EXACT, off
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf
from peftfn.methods.boft import rotation


def butterfly(rotations: Tensor) -> Tensor:
    """The product of the factors as the paper has it: of factor i, a block takes every 2ⁱth half block of a run."""
    factors, blocks, block, _ = rotations.shape
    size, half = blocks * block, block // 2
    product = torch.eye(size, dtype=rotations.dtype)
    for number in range(factors):
        run = block * 2**number
        order = [
            start + 2 * half * pair + half * side + inside
            for start in range(0, size, run)
            for side in (0, 1)
            for pair in range(2**number)
            for inside in range(half)
        ]
        there = torch.eye(size, dtype=rotations.dtype)[order]
        product = there @ torch.block_diag(*rotations[number]) @ there.T @ product
    return product


def test_a_layer_gets_its_inputs_turned_by_every_factor_and_its_outputs_scaled() -> None:
    model, x = nn.Sequential(nn.Linear(16, 5)).double(), torch.randn(3, 16).double()
    config = pf.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["0"], init_weights=False)
    adapter = pf.init(model, config, dtype=torch.float64)
    leaf = adapter.params["0"]
    turned = butterfly(rotation(leaf["boft_R"]))
    assert off(turned @ turned.T, torch.eye(16, dtype=torch.float64)) < EXACT
    assert bool((turned.abs() > 1e-9).all()), "three factors of four mix all sixteen"
    expected = x @ turned @ (leaf["boft_s"] * model[0].weight).T + model[0].bias
    assert off(pf.apply(model, adapter, x), expected) < EXACT


def test_a_file_of_one_factor_is_read_as_one_whatever_its_config_asks(tmp_path: Path) -> None:
    """PEFT makes such files where it cannot build its extension."""
    model, x = nn.Sequential(nn.Linear(8, 3)).double(), torch.randn(2, 8).double()
    config = pf.BOFTConfig(boft_n_butterfly_factor=2, target_modules=["0"], init_weights=False)
    adapter = pf.init(model, config, dtype=torch.float64)
    pf.save(adapter, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors = {key: one[:1].clone() if key.endswith("boft_R") else one for key, one in tensors.items()}
    safetensors.torch.save_file(tensors, file)
    read = pf.load(tmp_path, model)
    one = pf.BOFTConfig(target_modules=["0"])
    leaf = {"boft_R": adapter.params["0"]["boft_R"][:1], "boft_s": adapter.params["0"]["boft_s"]}
    expected = pf.apply(model, pf.init(model, one).replace(params={"0": leaf}), x)
    assert off(pf.apply(model, read, x), expected) == 0.0


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(4, 6, (1, 3), stride=(1, 2), padding=(0, 1)), nn.Conv1d(4, 6, 2, dilation=2)]
)
def test_a_convolution_keeps_its_geometry(convolution: nn.Module) -> None:
    """peft runs it with a square kernel, one stride, one padding and no dilation."""
    model = nn.Sequential(convolution).double()
    x = torch.randn(2, 4, *([7] * len(convolution.kernel_size))).double()
    adapter = pf.init(model, pf.BOFTConfig(target_modules=["0"], init_weights=False), dtype=torch.float64)
    leaf, weight = adapter.params["0"], convolution.weight.detach()
    turned = leaf["boft_s"].T * (weight.flatten(1) @ butterfly(rotation(leaf["boft_R"])).T)
    expected = functional_call(model, {"0.weight": turned.view(weight.shape)}, (x,))
    assert off(pf.apply(model, adapter, x), expected) < EXACT


def test_dropout_leaves_a_share_of_one_factors_blocks_as_they_are_in_training_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 40, bias=False)), torch.randn(1, 40)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(40))
    adapter = oracle.randomised(pf.init(model, pf.BOFTConfig(boft_dropout=0.35, target_modules=["0"])))
    adapter.params["0"]["boft_s"].fill_(1.0)
    whole = pf.apply(model.eval(), adapter, x)
    kept: set[tuple[bool, ...]] = set()
    for _ in range(10):
        found = pf.apply(model.train(), adapter, x).view(10, 4)
        same, gone = found == x.view(10, 4), found == whole.view(10, 4)
        assert bool((same.all(1) | gone.all(1)).all())
        assert int(same.all(1).sum()) == 3
        kept.add(tuple(same.all(1).tolist()))
    assert len(kept) > 1
    two = pf.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5, target_modules=["0"])
    adapter = oracle.randomised(pf.init(model, two))
    drawn = {round(float(pf.apply(model, adapter, x).sum()), 4) for _ in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"0: boft_block_size=5 does not divide the 12 inputs", {"boft_block_size": 5}),
        (r"0: boft_block_num=5 does not divide the 12 inputs", {"boft_block_size": 0, "boft_block_num": 5}),
        (r"0: boft_block_num=24 does not divide the 12 inputs", {"boft_block_size": 0, "boft_block_num": 24}),
        (r"0: boft_n_butterfly_factor=3 mixes runs of 16 inputs", {"boft_n_butterfly_factor": 3}),
        (r"expected an even block", {"boft_block_size": 3, "boft_n_butterfly_factor": 2}),
    ],
)
def test_sizes_that_do_not_divide_are_refused_where_the_layer_is_known(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.init(nn.Sequential(nn.Linear(12, 3)), pf.BOFTConfig(target_modules=["0"], **options))


@pytest.mark.parametrize(
    ("said", "options"),
    [
        (r"boft_block_size=0 and boft_block_num=0; expected one of them to be 0", {"boft_block_size": 0}),
        (r"boft_block_size=4 and boft_block_num=2; expected one of them to be 0", {"boft_block_num": 2}),
        (r"boft_n_butterfly_factor=0; expected a positive", {"boft_n_butterfly_factor": 0}),
        (r"boft_dropout=1.0; expected a share", {"boft_dropout": 1.0}),
        (r"bias='lora_only'; expected 'none', 'all' or 'boft_only'", {"bias": "lora_only"}),
    ],
)
def test_a_config_that_says_nonsense_is_one_clear_error(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=said):
        pf.BOFTConfig(**options)


def test_adapters_of_unlike_factors_do_not_stack_and_an_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 4))
    made = [pf.init(model, pf.BOFTConfig(boft_n_butterfly_factor=m, target_modules=["0"])) for m in (1, 2)]
    with pytest.raises(ValueError, match=r"boft_n_butterfly_factor of \['1', '2'\]; expected one value"):
        pf.stack(made)
    with pytest.raises(ValueError, match="1: BOFT cannot act on this embedding; expected linear or transposed linear"):
        pf.init(model, pf.BOFTConfig(target_modules=["1"]))


def test_a_packed_layer_runs_on_the_turned_input_and_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized.packed(nn.Sequential(nn.Linear(64, 32)), "nf4")
    x = torch.randn(3, 64)
    adapter = oracle.randomised(pf.init(model, pf.BOFTConfig(target_modules=["0"])))
    merged = pf.merge(dict(model.named_parameters()), adapter, model=model)
    expected = x @ merged["0.weight"].T + model[0].bias
    made = quantized.products(monkeypatch)
    torch.testing.assert_close(pf.apply(model, adapter, x), expected, rtol=1e-5, atol=1e-5)
    assert made
