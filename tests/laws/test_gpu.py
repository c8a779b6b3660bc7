"""On a GPU: the laws, dropout, bitsandbytes, autocast and compile. `make test-gpu` runs them where torch sees one.

`pytest tests/laws/test_gpu.py --device cpu` tries the tests themselves.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import quantized
import test_laws as laws
import torch
from bases import BASES
from cases import BY_NAME, Case, linears, llama, lora, loss, mlp, trained
from exact import EXACT, Float64, allowed, assert_close_to_truth, in_float64, off
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

import peftfn as pf


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    given = request.config.getoption("device")
    if given is None and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU; --device cpu tries these tests")
    return torch.device(given or "cuda")


def moved(tree: Any, device: torch.device) -> Any:
    """The tree, or the module, on the device."""
    if isinstance(tree, nn.Module):
        return tree.to(device)
    return tree_map(lambda one: one.to(device) if isinstance(one, Tensor) else one, tree)


def there(case: Case, device: torch.device) -> Case:
    """The case on the device: packed there too, for bitsandbytes has kernels of its own for each."""
    build, batch = case.build, case.batch
    return dataclasses.replace(case, build=lambda: moved(build(), device), batch=lambda: moved(batch(), device))


# A case of each kind of layer, of each method, and of each format of bitsandbytes.
NAMES = ["linear", "linear-3d", "linear-head", "transposed-linear", "embedding", "embedding-max-norm", "conv1d"]
NAMES += ["conv2d", "conv2d-circular", "conv2d-groups", "conv3d", "attention", "experts", "tied-head", "fused-parts"]
NAMES += ["llama", "albert", "prompt-t5", "p-tuning-lstm-gpt2", "prefix-llama", "prefix-bert", "adaption-llama"]
NAMES += ["ia3-llama", "adalora-llama"]
NAMES += [f"{name}-{kind}" for name in ("linear-3d", "llama", "ia3-linear") for kind in ("nf4", "fp4", "8-bit")]
IN_FLOAT32: dict[str, Callable[[Case], None]] = {
    "purity": functools.partial(laws.test_base_is_the_same_after_init_apply_backward_and_merge, train=True),
    "identity": laws.test_fresh_adapter_gives_the_bases_output_bit_for_bit,
    "float32": laws.test_float32_is_as_near_to_float64_as_weights_a_rounding_away,
}
IN_FLOAT64: dict[str, Callable[[laws.Exact], None]] = {
    "merge": lambda exact: laws.test_merged_weights_compute_what_apply_does(exact.case, exact),
    "sum": laws.test_two_adapters_are_the_second_on_the_merged_first,
    "stack": laws.test_vmap_over_a_stack_is_each_adapter_alone,
    "routing": laws.test_each_row_uses_its_own_adapter,
    "gradients": laws.test_grad_and_backward_agree,
    "slope": laws.test_gradient_is_the_slope,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", [*IN_FLOAT32, *IN_FLOAT64])
def test_law(law: str, name: str, device: torch.device) -> None:
    if reason := BY_NAME[name].exceptions.get(law):
        pytest.skip(reason)
    case = there(BY_NAME[name], device)
    if law in IN_FLOAT32:
        IN_FLOAT32[law](case)
        return
    exact = laws.Exact(case, case.exact(), in_float64(case.batch()))
    with Float64():
        IN_FLOAT64[law](exact)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_and_scales_as_it_says_and_backward_has_the_same_mask(p: float, device: torch.device) -> None:
    torch.manual_seed(0)
    model = moved(nn.Sequential(nn.Linear(256, 256, bias=False)), device).double().train()
    adapter = pf.init(model, pf.LoraConfig(r=256, lora_alpha=256, target_modules=["0"], lora_dropout=p))
    eye = torch.eye(256, device=device, dtype=torch.float64)
    adapter = adapter.replace(params={"0": {"lora_A": eye, "lora_B": eye}})  # the delta is the dropped input itself
    x = torch.ones(512, 256, device=device, dtype=torch.float64)

    def dropped(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return pf.apply(model, adapter, x) - model(x)

    delta = dropped(x)
    kept = delta > 0.5
    assert off(delta, kept / (1 - p)) < 2**-13  # the probability is rounded to 1 in 16384
    assert abs(float((~kept).double().mean()) - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert off(torch.autograd.functional.vjp(dropped, x, x)[1], delta) < EXACT  # of ones, through the same mask
    assert dropped(x).equal(delta)
    different = vmap(lambda x: pf.apply(model, adapter, x), randomness="different")(torch.stack([x, x]))
    assert not different[0].equal(different[1])


FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "computes in bfloat16": {"compute_dtype": torch.bfloat16},
    "computes in float16": {"compute_dtype": torch.float16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*FORMATS, "8-bit"])
def test_bitsandbytes_own_forward_and_gradient_are_ours(name: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    pack = quantized.eight_bit if name == "8-bit" else functools.partial(quantized.four_bit, **FORMATS[name])
    layer = pack(moved(nn.Linear(128, 64), device).to(dtype))
    model, x = nn.Sequential(layer), torch.randn(6, 128, device=device, dtype=dtype)
    ours = functools.partial(pf.apply, model, ())
    theirs = copy.deepcopy(model)  # its first forward may pack the weight anew
    rounds = torch.finfo(FORMATS.get(name, {}).get("compute_dtype") or dtype).eps
    most = 0.02 if name == "8-bit" else 4 * rounds  # 8 bits of input and of output; a product and a bias
    assert oracle.distance(ours(x), theirs(x)) <= most
    (found,) = torch.autograd.functional.vjp(ours, x, torch.ones_like(ours(x)))[1:]
    (expected,) = torch.autograd.functional.vjp(theirs, x, torch.ones_like(ours(x)))[1:]
    assert oracle.distance(found, expected) <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "convnet", "bert", "llama", "gpt2"])
def test_under_autocast_it_is_as_near_to_float64_as_peft(
    name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    targets = {"mlp": ["0", "3"], "convnet": ["4", "8"]}
    base, batch = moved(BASES[name].make(), device), moved(BASES[name].inputs(), device)
    adapter = oracle.randomised(pf.init(base, oracle.config_of(pf, {"r": 4, "target_modules": targets.get(name)})))
    theirs = moved(oracle.loaded(base, pf.save(adapter, tmp_path)), device)
    with torch.autocast(device.type, dtype):
        ours = oracle.outputs(pf.apply(base, adapter, batch)), oracle.gradients(base, adapter, batch)
        found = oracle.outputs(oracle.called(theirs, batch)), oracle.gradients_of(theirs, batch)
    theirs, batch = in_float64(theirs), in_float64(batch)
    with Float64():
        truth = oracle.outputs(oracle.called(theirs, batch)), oracle.gradients_of(theirs, batch)
    for mine, other, true in zip(ours, found, truth, strict=True):
        assert_close_to_truth(mine, other, true)


@pytest.mark.parametrize("build", [mlp, linears, llama])
def test_compiled_step_is_the_eager_one(build: Callable[[], nn.Module], device: torch.device) -> None:
    torch.manual_seed(0)
    model = moved(build(), device).eval()
    batch = moved({"input_ids": torch.randint(0, 20, (4, 6))} if build is llama else torch.randn(4, 8), device)
    config = lora("q_proj", "down_proj") if build is llama else lora("0")
    one, other = (trained(pf.init(model, config), seed) for seed in range(2))

    def step(adapter: pf.Adapter, batch: Any) -> Any:
        return grad(lambda params: loss(pf.apply(model, adapter.replace(params=params), batch)))(adapter.params)

    compiled = torch.compile(step, fullgraph=True)
    found = [compiled(adapter, batch) for adapter in (one, other)]
    eager = [step(adapter, batch) for adapter in (one, other)]
    model, batch = in_float64(model), in_float64(batch)
    with Float64():
        truth = [step(in_float64(adapter), batch) for adapter in (one, other)]
    assert off(found, truth) <= allowed(eager, truth, laws.FURTHER)
