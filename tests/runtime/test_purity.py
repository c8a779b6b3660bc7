"""Law 1 where it is hard: a forward that raises or writes to itself, threads, a base that requires grad."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as torch_pytree
from cases import llama, lora, loss, mlp, output, tokens, trained
from snapshot import snapshot
from torch import Tensor, nn
from torch.func import grad

import peftfn as pf


class Writing(nn.Module):
    """A module whose forward writes to everything it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[int] = []
        self.cache: dict[str, Any] = {"calls": 0}
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> (rows, 4), leaving traces."""
        self.calls += 1
        self.seen.append(self.calls)
        self.cache["calls"] += 1
        self.count += 1
        self.register_buffer("table", torch.zeros(5), persistent=False)
        self.register_buffer("later", torch.zeros(2))
        self.linear.register_forward_hook(lambda module, inputs, result: None)
        self.extra = nn.Identity()
        return self.linear(x)


def test_a_forward_that_writes_to_itself_leaves_the_base_alone() -> None:
    model = Writing().eval()
    adapter = trained(pf.init(model, lora("linear")))
    x = torch.randn(2, 4)
    for mode in (False, True):
        before = snapshot(model.train(mode))
        for _ in range(3):
            pf.apply(model, adapter, x)
        assert snapshot(model) == before


def test_a_call_sees_every_change_of_the_base() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    adapter = pf.init(model, lora("0"))
    pf.apply(model, adapter, x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(pf.apply(model, adapter, x), model(x))
    model[2] = nn.Linear(4, 3)
    assert torch.equal(pf.apply(model, adapter, x), model(x))
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()}, assign=True)
    assert torch.equal(pf.apply(model, adapter, x), model(x))
    model[1].p = 1.0
    assert torch.equal(pf.apply(model.train(), adapter, x), model[2].bias.expand(2, 3))
    model.double().eval()
    assert pf.apply(model, adapter, x.double()).dtype == torch.float64
    model[0].register_forward_hook(lambda module, inputs, result: result + 1)
    assert torch.equal(pf.apply(model, adapter, x.double()), model(x.double()))


class Raising(nn.Module):
    """Raises half-way, after the first layer has run."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.error: BaseException | None = error

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 4) -> (rows, 4), or raise."""
        x = self.norm(self.first(x))
        if self.error is not None:
            raise self.error
        return self.second(x)


@pytest.mark.parametrize("error", [ValueError("half-way"), KeyboardInterrupt(), RuntimeError("half-way")])
def test_base_and_adapter_are_the_same_when_the_forward_raises(error: BaseException) -> None:
    model = Raising(error).train()
    adapter = trained(pf.init(model, lora("first", "second", modules_to_save=["norm"])))
    plain = trained(pf.init(model, lora("first", "second")))
    kept = [tensor.clone() for tensor in torch_pytree.tree_leaves(adapter)]
    x = torch.randn(3, 4)
    before = snapshot(model)
    calls: list[Callable[[], Any]] = [
        lambda: pf.apply(model, plain, x),
        lambda: pf.apply(model, plain, x, params=pf.merge(dict(model.named_parameters()), adapter)),
        lambda: pf.apply(model.eval(), pf.stack([plain, plain]), x, index=[0, 1, -1]),
        lambda: grad(lambda p: pf.apply(model.eval(), adapter.replace(params=p), x).sum())(adapter.params),
        lambda: torch.vmap(lambda row: pf.apply(model.eval(), adapter, row[None]))(x),
        lambda: pf.bind(model, adapter)(x),
    ]
    for call in calls:
        with pytest.raises(type(error)):
            call()
        assert snapshot(model.train()) == before
    assert all(torch.equal(one, other) for one, other in zip(torch_pytree.tree_leaves(adapter), kept, strict=True))
    model.error = None
    assert pf.apply(model, plain, torch.randn(3, 4)).shape == (3, 4), "and the next call works"


@pytest.mark.parametrize("build", [mlp, llama])
def test_eight_threads_with_their_own_adapters_and_one_with_the_bare_base(build: Callable[[], nn.Module]) -> None:
    """4,000 adapted calls (8 threads × 500), some of them with gradients, while a ninth thread runs the base."""
    model = build().eval()
    batch = {"input_ids": tokens()()} if build is llama else torch.randn(4, 8)
    config = pf.LoraConfig(r=2, target_modules="all-linear")
    adapters = [trained(pf.init(model, config), seed) for seed in range(8)]

    def bare() -> Tensor:
        with torch.no_grad():
            return output(model(**batch) if isinstance(batch, dict) else model(batch))

    expected = [output(pf.apply(model, adapter, batch)) for adapter in adapters]
    gradients = [gradient(model, adapter, batch) for adapter in adapters]
    of_base = bare()
    before = snapshot(model)
    wrong: list[str] = []
    done = threading.Event()

    def adapted(number: int) -> None:
        for step in range(500 if build is mlp else 60):
            if step % 25 == 24:
                found = gradient(model, adapters[number], batch)
                if not all(torch.equal(a, b) for a, b in zip(found, gradients[number], strict=True)):
                    wrong.append(f"gradient {number} at {step}")
            elif not torch.equal(output(pf.apply(model, adapters[number], batch)), expected[number]):
                wrong.append(f"output {number} at {step}")

    def unadapted() -> None:
        while not done.is_set():
            if not torch.equal(bare(), of_base):
                wrong.append("base")

    run_threads([lambda number=number: adapted(number) for number in range(8)], unadapted, done, wrong)
    assert wrong == []
    assert snapshot(model) == before


def gradient(model: nn.Module, adapter: pf.Adapter, batch: Any) -> list[Tensor]:
    found = grad(lambda params: loss(pf.apply(model, adapter.replace(params=params), batch)))(adapter.params)
    return torch_pytree.tree_leaves(found)


def run_threads(
    work: list[Callable[[], None]], beside: Callable[[], None], done: threading.Event, wrong: list[str]
) -> None:
    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001  # whatever a thread raises is a wrong answer
            wrong.append(repr(error))

    ninth = threading.Thread(target=guarded, args=(beside,))
    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in (ninth, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    ninth.join()


@pytest.mark.parametrize("how", ["apply", "bind", "torch.func"])
def test_a_base_that_requires_grad_is_still_a_constant(how: str) -> None:
    """No `.grad`, no changed flag or bit, and nothing saved for the base's weight gradients."""
    model, batch = llama().train(), {"input_ids": tokens()()}
    batch["labels"] = batch["input_ids"]
    adapter = trained(pf.init(model, lora("q_proj", "v_proj")))
    frozen = llama().train().requires_grad_(False)
    frozen.load_state_dict(model.state_dict())
    before = snapshot(model)

    def step(base: nn.Module) -> int:
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        if how == "torch.func":
            grad(lambda params: pf.apply(base, adapter.replace(params=params), batch).loss)(adapter.params)
            return saved
        module = pf.bind(base, adapter) if how == "bind" else None
        optimizer = torch.optim.AdamW(pf.leaves(adapter) if module is None else trainable(module), lr=0.0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = pf.apply(base, adapter, batch) if module is None else module(**batch)
        result.loss.backward()
        optimizer.step()
        return saved

    assert step(model) == step(frozen), "the same bytes are saved as on a frozen base: no weight gradient is prepared"
    assert snapshot(model) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def trainable(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def test_params_are_arguments_like_any_other() -> None:
    """Base parameters given by name: differentiable, mapped, and values for a model on the meta device."""
    model, x = mlp().eval(), torch.randn(4, 8)
    adapter = trained(pf.init(model, lora("0", "3")))
    params = dict(model.named_parameters()) | dict(model.named_buffers())
    weight = grad(lambda p: pf.apply(model, adapter, x, params=p).sum())({"3.bias": params["3.bias"].detach()})
    assert torch.equal(weight["3.bias"], torch.full((4,), 4.0))
    two = {name: torch.stack([tensor, tensor * 2]) for name, tensor in params.items() if tensor.is_floating_point()}
    mapped = torch.vmap(lambda p: pf.apply(model, adapter, x, params=p))(two)
    torch.testing.assert_close(mapped[0], pf.apply(model, adapter, x), rtol=1e-5, atol=1e-6)
    with torch.device("meta"):
        empty = mlp().eval()
    assert torch.equal(pf.apply(empty, adapter, x, params=params), pf.apply(model, adapter, x))
    made = pf.init(empty, lora("0", "3"))
    assert torch.equal(pf.apply(empty, made, x, params=params), model(x))
    with pytest.raises(ValueError, match="meta device"):
        pf.apply(empty, adapter, x, params=dict(model.named_parameters()))


def test_tied_names_follow_each_other_unless_each_is_given() -> None:
    from cases import Tied

    model, ids = Tied().eval(), tokens()()
    new = torch.randn(20, 8)
    only = pf.apply(model, (), ids, params={"emb.weight": new})
    assert torch.equal(only, pf.apply(model, (), ids, params={"head.weight": new}))
    apart = pf.apply(model, (), ids, params={"emb.weight": new, "head.weight": model.head.weight})
    assert torch.equal(
        apart,
        torch.func.functional_call(
            model, {"emb.weight": new, "head.weight": model.head.weight.clone()}, (ids,), tie_weights=False
        ),
    )
    assert not torch.equal(only, apart)
