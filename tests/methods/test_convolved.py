"""The Function that a convolution with a low-rank delta runs as: against plain operations, alone and in `apply`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from test_adapted import EXACT, first_and_second, saved
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import peftfn as pf
from peftfn.methods.low_rank import conv_kernel, site_forward
from peftfn.methods.low_rank.linear_kernel import Delta

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 5, 3), (2, 6, 11)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 5)),
    "2d, strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1)), (2, 4, 9, 8)),
    "2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 3)),
}


def made(name: str) -> tuple[Any, list[Tensor]]:
    """The layer, and x, W, b, A, B and s."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build()
    weight, ones = layer.weight.detach(), [1] * (layer.weight.dim() - 2)
    a, b = torch.randn(2, *weight.shape[1:]), torch.randn(len(weight), 2, *ones)
    tensors = [torch.randn(shape), weight, layer.bias.detach(), a, b, torch.tensor(0.7)]
    return layer.double(), [tensor.double().requires_grad_() for tensor in tensors]


def plain(layer: Any, tensors: Sequence[Tensor]) -> Tensor:
    x, weight, bias, a, b, s = tensors
    delta = (b.flatten(1) @ a.flatten(1)).view(weight.shape)
    return functional_call(layer, {"weight": weight + s * delta, "bias": bias}, (x,))


def ours(layer: Any, tensors: Sequence[Tensor]) -> Tensor:
    x, weight, bias, *delta = tensors
    return conv_kernel.convolution(layer, x, weight, bias, Delta(*delta))


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_first_and_second_derivatives_are_those_of_plain_operations(name: str) -> None:
    layer, tensors = made(name)
    found = first_and_second(lambda *given: ours(layer, given), tensors)
    expected = first_and_second(lambda *given: plain(layer, given), tensors)
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, **EXACT)


@pytest.mark.parametrize("asked", range(6), ids=["x", "W", "b", "A", "B", "s"])
def test_each_gradient_can_be_asked_for_alone(asked: int) -> None:
    layer, tensors = made("2d, strided")
    tensors = [tensor.detach() for tensor in tensors]
    tensors[asked].requires_grad_()
    expected = torch.autograd.grad(plain(layer, tensors).square().sum(), tensors[asked])
    torch.testing.assert_close(
        torch.autograd.grad(ours(layer, tensors).square().sum(), tensors[asked]), expected, **EXACT
    )


class Net(nn.Module):
    """A convolution after something that has a gradient, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.conv = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 128, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4, h, w) -> (rows, 128, h / 2, w / 2)."""
        return self.conv(self.before(x).tanh())


def net(r: int = 4, p: float = 0.0) -> tuple[nn.Module, pf.Adapter, Tensor]:
    torch.manual_seed(0)
    base = Net()
    adapter = pf.init(base, pf.LoraConfig(r=r, target_modules=["conv"], lora_dropout=p))
    return base, oracle.randomised(adapter), torch.randn(4, 4, 32, 32)


def gradients(base: nn.Module, adapter: pf.Adapter, x: Tensor) -> list[Tensor]:
    loss = lambda params: pf.apply(base, adapter.replace(params=params), x).square().mean()  # noqa: E731  # one expression
    return [tensor for leaf in grad(loss)(adapter.params).values() for tensor in leaf.values()]


def test_what_is_kept_is_x_and_r_numbers_a_position() -> None:
    base = nn.Sequential(nn.Conv2d(16, 128, 3, padding=1, stride=2))
    adapter, x = pf.init(base, pf.LoraConfig(r=4, target_modules=["0"])), torch.randn(4, 16, 32, 32)
    held = [*adapter.buffers["0"].values(), *pf.leaves(adapter)]
    assert saved(lambda: pf.apply(base, adapter, x), [*base.parameters(), *held, x]) == 4 * (4 * 4 * 16 * 16)


def test_in_apply_the_gradients_are_those_of_the_two_apart() -> None:
    base, adapter, x = net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_forward, "is_cheaper_as_one", lambda *_: False)
        expected = gradients(base, adapter, x)
    for one, other in zip(gradients(base, adapter, x), expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())  # float32, sums in another order
    training = pf.leaves(adapter)
    pf.apply(base, adapter, x).square().mean().backward()
    for one, other in zip(training, expected, strict=True):
        assert one.grad is not None
        assert float((one.grad - other).abs().max()) <= 1e-5 * float(other.abs().max())


def test_few_positions_dropout_and_every_other_transform_run_as_plain_operations() -> None:
    base, adapter, x = net()
    calls: list[int] = []
    real = conv_kernel.convolution
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_kernel, "convolution", lambda *given: calls.append(1) or real(*given))
        gradients(base, adapter, x)
        assert len(calls) == 1
        gradients(base, adapter, x[:, :, :4, :4])
        gradients(base.train(), net(p=0.5)[1], x)
        stacked = pf.stack([adapter, adapter])
        mapped = vmap(lambda adapter: pf.apply(base, adapter, x))(stacked)
        _, tangent = jvp(lambda x: pf.apply(base, adapter, x), (x,), (x,))
        assert len(calls) == 1
    torch.testing.assert_close(mapped[0], pf.apply(base, adapter, x), rtol=1e-5, atol=1e-5)
    assert tangent.isfinite().all()


def test_derivatives_of_derivatives_in_apply_are_those_of_the_two_apart() -> None:
    base, adapter, x = net()

    def second(params: Any) -> Tensor:
        loss = lambda params: pf.apply(base, adapter.replace(params=params), x).sin().mean()  # noqa: E731  # one expression
        return sum((t.square().sum() for leaf in grad(loss)(params).values() for t in leaf.values()), torch.zeros(()))

    found = grad(second)(adapter.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_forward, "is_cheaper_as_one", lambda *_: False)
        expected = grad(second)(adapter.params)
    for path, leaf in expected.items():
        for name, tensor in leaf.items():
            assert float((found[path][name] - tensor).abs().max()) <= 1e-4 * float(tensor.abs().max())  # float32
