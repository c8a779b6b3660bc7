"""Attention under `torch.vmap`: one call of the fused kernel, that gives what a call for each slice gives."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, bert, gpt2, llama, loss, output, tokens, trained
from exact import EXACT, in_float64
from oracle import IS_OLD
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, FalconForCausalLM, ViTConfig, ViTForImageClassification

import peftfn as pf
from peftfn.core import transforms
from peftfn.models import attention

MAPPED, ROWS, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 4, 5, 7, 8
ROUNDING = 1e-6  # float32 sums in another order, relative to the largest value
Run = Callable[..., Any]


UNSEEN = None if transforms.TRACES_WHOLE else 0
"""The count with a torch older than 2.12, whose modes do not see what runs in a `Function` under `torch.vmap`."""


class Kernels(TorchDispatchMode):
    """Counts the calls of torch's fused attention, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "flash_attention" in str(func)
        return func(*args, **(kwargs or {}))


def with_gradients(run: Run, **how: Any) -> Run:
    """The output, and the gradients of query, key and value."""

    def both(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
        def value_of(*given: Tensor) -> tuple[Tensor, Tensor]:
            found = run(*given, attn_mask=mask, **how)
            return found.square().sum(), found

        grads, found = grad(value_of, argnums=(0, 1, 2), has_aux=True)(query, key, value)
        return found, *grads

    return both


def one_by_one(run: Run, dims: tuple[int | None, ...], given: tuple[Tensor, ...]) -> list[Tensor]:
    slices = [
        run(*[one if dim is None else one.select(dim, number) for one, dim in zip(given, dims, strict=True)])
        for number in range(MAPPED)
    ]
    return [torch.stack(each) for each in zip(*slices, strict=True)]


MASKS: dict[str, tuple[int, ...] | None] = {
    "no mask": None,
    "(L, S)": (QUERIES, KEYS),
    "(1, 1, L, S)": (1, 1, QUERIES, KEYS),
    "(B, 1, L, S)": (ROWS, 1, QUERIES, KEYS),
    "(B, H, L, S)": (ROWS, HEADS, QUERIES, KEYS),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [HEADS, 2], ids=["", "grouped queries"])
@pytest.mark.parametrize("mask", MASKS)
def test_mapped_attention_is_that_of_each_slice(mask: str, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = MASKS[mask]
    shapes = [(ROWS, HEADS, QUERIES, WIDTH), *[(ROWS, heads, KEYS, WIDTH)] * 2, *([] if shape is None else [shape])]
    ways = [(0, 1, None), (0, None), (2, None), *([] if shape is None else [(0, None)])]
    for dims in itertools.product(*ways):
        if dims.count(None) == len(dims):
            continue
        sizes = [(*s[:d], MAPPED, *s[d:]) if d is not None else s for s, d in zip(shapes, dims, strict=True)]
        given = tuple(torch.randn(size) for size in sizes)
        if shape is not None and dtype == torch.bool:
            given = (*given[:3], given[3] > -1)
        how = {"is_causal": shape is None and dtype == torch.bool, "enable_gqa": heads < HEADS, "scale": 0.3}
        with Kernels() as kernels:
            found = vmap(with_gradients(attention.attention, **how), in_dims=dims)(*given)
        assert kernels.count in (2, UNSEEN)  # one forward, one backward
        for one, other in zip(found, one_by_one(with_gradients(F.scaled_dot_product_attention, **how), dims, given)):  # noqa: B905  # four each
            assert float((one - other).abs().max()) <= ROUNDING * float(other.abs().max())


@pytest.mark.parametrize("turned", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dim", [0, 4])
def test_the_order_of_axes_in_memory_does_not_matter(turned: tuple[int, ...], dim: int) -> None:
    """As after a convolution, whose output has the tokens last, or where the mapped axis is the last one."""
    torch.manual_seed(0)
    shapes = [(ROWS, HEADS, QUERIES, WIDTH), *[(ROWS, HEADS, KEYS, WIDTH)] * 2]
    given = [torch.randn(MAPPED, *shape, dtype=torch.float64) for shape in shapes]
    for number in turned:
        given[number] = given[number].mT.contiguous().mT
    given = [one.movedim(0, dim) for one in given]

    def back(run: Run) -> Run:  # the gradient of what it returns has its axes in another order, too
        return with_gradients(lambda *inputs, attn_mask: run(*inputs).mT.contiguous().mT)

    with Kernels() as kernels:
        found = vmap(back(attention.attention), in_dims=dim)(*given)
    assert kernels.count in (2, UNSEEN)
    for one, other in zip(
        found, one_by_one(back(F.scaled_dot_product_attention), (dim,) * 3, tuple(given)), strict=True
    ):
        assert float((one - other).abs().max()) <= EXACT * float(other.abs().max())


def test_two_maps_are_one_call() -> None:
    given = torch.randn(3, 4, 2, 2, 5, 8)
    with Kernels() as kernels:
        found = vmap(vmap(lambda x: attention.attention(x, x, x), in_dims=1, out_dims=1))(given.transpose(1, 2))
    assert kernels.count in (1, UNSEEN)
    flat = given.flatten(0, 2)
    torch.testing.assert_close(found.transpose(1, 2).flatten(0, 2), F.scaled_dot_product_attention(flat, flat, flat))


def test_where_torch_would_not_run_the_kernel_torch_does_what_it_does() -> None:
    x = torch.randn(3, 2, 2, 5, 8)
    of = lambda x, bias, p=0.0: attention.attention(x, x, x, bias, p)  # noqa: E731  # one expression
    with Kernels() as kernels:
        dropped = vmap(of, in_dims=(0, None, None), randomness="same")(x[:1].expand(3, *x.shape[1:]), None, 0.5)
        with sdpa_kernel(SDPBackend.MATH):
            torch.func.jvp(lambda x: vmap(of, in_dims=(0, None))(x, None), (x,), (x,))
    assert kernels.count == 0
    assert torch.equal(dropped[0], dropped[1])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        vmap(grad(lambda x: grad(lambda x: of(x, None).square().sum())(x).square().sum()))(x)


def test_a_bias_has_its_gradient_which_the_kernel_has_not() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(3, 2, 2, 5, 8), torch.randn(3, 5, 5)
    of = lambda bias, x: attention.attention(x, x, x, bias).square().sum()  # noqa: E731  # one expression
    expected = torch.stack([grad(of)(*given) for given in zip(bias, x, strict=True)])
    torch.testing.assert_close(vmap(grad(of))(bias, x), expected)
    with pytest.raises(RuntimeError, match="not differentiable"), pytest.warns(UserWarning, match="batching rule"):
        grad(lambda bias: vmap(of)(bias, x).sum())(bias)  # torch does not see from within that it is asked for


def vit() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "num_channels": 1}
    return ViTForImageClassification(ViTConfig(**sizes))


def falcon() -> nn.Module:
    """Its masks are transformers' own, its attention is its own."""
    return FalconForCausalLM(FalconConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], "input_ids"),
    "bert": (bert, ["query", "value"], "input_ids"),
    "gpt2": (gpt2, ["c_attn"], "input_ids"),
    "vit": (vit, ["q_proj", "v_proj", "query", "value"], "pixel_values"),
}


def setting(name: str) -> tuple[nn.Module, list[pf.Adapter], dict[str, Tensor]]:
    build, names, key = MODELS[name]
    torch.manual_seed(1)
    model = build().eval()
    ends = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    config = pf.LoraConfig(r=2, target_modules=[one for one in names if one in ends])
    batch = {key: torch.randn(4, 1, 8, 8) if key == "pixel_values" else tokens()()}
    return model, [trained(pf.init(model, config), seed) for seed in range(3)], batch


@pytest.fixture
def silent() -> Iterator[None]:
    """What torch says of a missing batching rule is an error, on whatever line it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule")
        yield


# The BERT of transformers 4 calls torch's attention itself.
by_name = pytest.mark.parametrize("name", [name for name in MODELS if not (IS_OLD and name == "bert")])


@pytest.mark.usefixtures("silent")
@by_name
def test_adapters_that_are_mapped_run_each_attention_once(name: str) -> None:
    model, adapters, batch = setting(name)
    before, kind = snapshot(model), model.config._attn_implementation
    with Kernels() as kernels:
        found = vmap(lambda adapter: output(pf.apply(model, adapter, batch)))(pf.stack(adapters))
    assert kernels.count in (2, UNSEEN)  # of two layers
    assert (snapshot(model), model.config._attn_implementation) == (before, kind)
    for one, adapter in zip(found, adapters, strict=True):
        alone = output(pf.apply(model, adapter, batch))
        assert float((one - alone).abs().max()) <= ROUNDING * float(alone.abs().max())


@pytest.mark.usefixtures("silent")
@by_name
def test_gradients_of_rows_that_are_mapped_run_each_attention_once_each_way(name: str) -> None:
    model, (adapter, *_), batch = setting(name)
    model, adapter, batch = in_float64(model), in_float64(adapter), in_float64(batch)
    one = grad(
        lambda params, row: loss(
            pf.apply(model, adapter.replace(params=params), {name: tensor[None] for name, tensor in row.items()})
        )
    )
    with Kernels() as kernels:
        together = vmap(one, in_dims=(None, 0))(adapter.params, batch)
    assert kernels.count in (4, UNSEEN)  # of two layers
    for number in range(4):
        expected = one(adapter.params, {name: tensor[number] for name, tensor in batch.items()})
        for path, leaf in expected.items():
            for key, tensor in leaf.items():
                assert (together[path][key][number] - tensor).abs().max() <= EXACT * max(1.0, tensor.abs().max())


def test_torch_alone_takes_slice_after_slice() -> None:
    """Otherwise there is no need for this any more."""
    x = torch.randn(3, 2, 2, 5, 8)
    with Kernels() as kernels, pytest.warns(UserWarning, match="batching rule"):
        vmap(lambda x: F.scaled_dot_product_attention(x, x, x))(x)
    assert kernels.count in (3, UNSEEN)


@pytest.mark.skipif(IS_OLD, reason="the Falcon of transformers 4 writes to its mask in place, which vmap refuses")
@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")  # Falcon calls torch's attention itself
def test_masks_that_are_mapped_are_right_where_a_model_calls_attention_itself() -> None:
    torch.manual_seed(0)
    model = falcon().eval()
    adapter = trained(pf.init(model, pf.LoraConfig(r=2, target_modules=["query_key_value"])))
    ids, masks = tokens()(), torch.ones(4, 6, dtype=torch.long)
    masks[0, :3] = masks[1, :1] = 0
    one = lambda ids, mask: output(pf.apply(model, adapter, {"input_ids": ids[None], "attention_mask": mask[None]}))  # noqa: E731  # one expression
    for found, *given in zip(vmap(one)(ids, masks), ids, masks, strict=True):
        torch.testing.assert_close(found, one(*given), rtol=ROUNDING, atol=ROUNDING)


def test_a_call_that_nothing_maps_is_transformers_own() -> None:
    case = BY_NAME["llama"]
    model, batch = case.base(), case.batch()
    adapter = pf.init(model, case.config)
    names: list[str] = []
    seen = lambda module, *_: names.append(module.config._attn_implementation)  # noqa: E731  # one expression
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            module.register_forward_pre_hook(seen)
    grad(lambda params: loss(pf.apply(model, adapter.replace(params=params), batch)))(adapter.params)
    assert names == ["sdpa", "sdpa"]
    vmap(lambda adapter: output(pf.apply(model, adapter, batch)))(pf.stack([adapter, adapter]))
    assert names[2:] == ["peftfn_sdpa", "peftfn_sdpa"]
