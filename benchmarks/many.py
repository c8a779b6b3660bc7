"""Many adapters over one base in one pass, against peft, one adapter after the other.

Groups: one token for 32 rows with an adapter each, and with adapters in another order; the gradients of 32 adapters on
32 sequences, and a step of AdamW with them; 200 adapters read from disk and the first batch answered; an ensemble of 8;
the adapter gradients of each sample. Each checks that both sides compute the same before it is timed.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from lib import setting
from lib.crowds import Crowd, by_hand, crowd, ids
from lib.harness import FLOOR, PEFT, Row, begin, keep, timed
from lib.records import BARE_ROWS, HAND
from torch import Tensor
from torch.func import grad, vmap

import peftfn as pf

TOLERANCE = 1e-5  # of the largest value: float32 sums in another order
# As they were where the goals come from: with r=16 the adapters' tensors, which are read once each, are twice as much.
SMALL = setting.Sizes(layers=4, hidden=384, intermediate=1024, rows=32, tokens=1, r=8)
WIDE = setting.Sizes(layers=6, hidden=512, intermediate=1376, rows=1, tokens=1, r=8)


def routed(made: Crowd, order: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One token for each row, with the adapter that `order` says."""
    batch, names = {"input_ids": ids(made, len(order), 1)}, [str(number) for number in order.tolist()]
    bound, hand = pf.bind(made.base, made.stacked, index=order), by_hand(made, order, made.stacked)
    cases = {
        FLOOR: lambda: made.base(**batch).logits,
        PEFT: lambda: made.theirs(**batch, adapter_names=names).logits,
        "apply(index=)": lambda: pf.apply(made.base, made.stacked, batch, index=order).logits,
        "bind(index=)": lambda: bound(**batch).logits,
        HAND: lambda: hand(**batch).logits,
    }
    return {name: torch.no_grad()(case) for name, case in cases.items()}


def ensemble(made: Crowd, count: int, rows: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The logits of `count` members, (members, rows, tokens, words)."""
    batch = {"input_ids": ids(made, rows, tokens)}
    members = pf.stack(made.adapters[:count])

    def loop() -> Tensor:
        found: list[Tensor] = []
        for number in range(count):
            made.theirs.set_adapter(str(number))
            found.append(made.theirs(**batch).logits)
        return torch.stack(found)

    def mapped() -> Tensor:
        return vmap(lambda one: pf.apply(made.base, one, batch).logits)(members)

    index = torch.arange(count).repeat_interleave(rows)
    folded, shape = {"input_ids": batch["input_ids"].repeat(count, 1)}, (count, rows, tokens, -1)
    bound = pf.bind(made.base, members, index=index)
    cases = {
        FLOOR: lambda: made.base(**batch).logits,
        PEFT: loop,
        "vmap": mapped,
        "apply(index=)": lambda: pf.apply(made.base, members, folded, index=index).logits.view(shape),
        "bind(index=)": lambda: bound(**folded).logits.view(shape),
        BARE_ROWS: lambda: made.base(**folded).logits.view(shape),
    }
    if rows == 1:
        hand = by_hand(made, index, members)
        cases[HAND] = lambda: hand(**folded).logits.view(shape)
    return {name: torch.no_grad()(case) for name, case in cases.items()}


def training(made: Crowd, count: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The gradients of `count` adapters, each on a sequence of its own, flat."""
    text, order = ids(made, count, tokens), torch.arange(count)
    members = pf.stack(made.adapters[:count])
    leaves = pf.leaves(members)
    names = [str(number) for number in range(count)]

    def floor() -> Tensor:
        embedded = made.base.get_input_embeddings()(text).detach().requires_grad_()
        _loss(made.base(inputs_embeds=embedded).logits, text).backward()
        return embedded

    def loop() -> Tensor:
        found: list[Tensor] = []
        for number, name in enumerate(names):
            made.theirs.set_adapter(name)
            trained = [p for p in made.theirs.parameters() if p.requires_grad]
            for parameter in trained:
                parameter.grad = None
            _loss(made.theirs(input_ids=text[number : number + 1]).logits, text[number : number + 1]).backward()
            found.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        return torch.stack(found)

    def routed() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        _loss(pf.apply(made.base, members, {"input_ids": text}, index=order).logits, text).backward()
        return _flat({leaf.data_ptr(): leaf.grad for leaf in leaves}, members)

    def gradient(member: pf.Adapter, row: Tensor) -> Any:
        def value(params: Any) -> Tensor:
            return _loss(pf.apply(made.base, member.replace(params=params), {"input_ids": row}).logits, row)

        return grad(value)(member.params)

    def mapped() -> Tensor:
        grads = vmap(gradient)(members, text[:, None])
        found = {t.data_ptr(): grads[p][n] for p, leaf in members.params.items() for n, t in leaf.items()}
        return _flat(found, members)

    return {FLOOR: floor, PEFT: loop, "apply(index=)": routed, "vmap(grad)": mapped}


def steps(made: Crowd, count: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """One step of AdamW for `count` adapters, each with a learning rate and a sequence of its own: the new numbers.

    Every call goes on from the one before, in both libraries, so peft's adapters are not what they were after this.
    """
    text, order = ids(made, count, tokens), torch.arange(count)
    # AdamW divides by a gradient's own size: this eps keeps the rounding of the small ones small.
    rates, eps = torch.linspace(1e-4, 1e-3, count), 1.0
    now = {"run": pf.sweep.begin(made.adapters[:count])}
    names = [str(number) for number in range(count)]
    optimizers: list[Any] = []
    for name, rate in zip(names, rates.tolist(), strict=True):
        made.theirs.set_adapter(name)
        trained = [p for p in made.theirs.parameters() if p.requires_grad]
        optimizers.append(torch.optim.AdamW(trained, lr=rate, eps=eps))

    def loop() -> Tensor:
        for number, (name, optimizer) in enumerate(zip(names, optimizers, strict=True)):
            made.theirs.set_adapter(name)
            optimizer.zero_grad()
            row = text[number : number + 1]
            _loss(made.theirs(input_ids=row).logits, row).backward()
            optimizer.step()
        return torch.stack(
            [torch.cat([p.detach().flatten() for p in one.param_groups[0]["params"]]) for one in optimizers]
        )

    def losses(stacked: pf.Adapter, text: Tensor) -> Tensor:
        logits = pf.apply(made.base, stacked, {"input_ids": text}, index=order).logits
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="none")
        return each.view(count, -1).sum(1)

    def swept() -> Tensor:
        now["run"], _ = pf.sweep.step(now["run"], losses, text, lr=rates, eps=eps)
        members = now["run"].adapter
        return _flat({t.data_ptr(): t for leaf in members.params.values() for t in leaf.values()}, members)

    return {FLOOR: training(made, count, tokens)[FLOOR], PEFT: loop, "sweep.step": swept}


def per_sample(made: Crowd, rows: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """One batched gradient in peft's place, and the gradient of each row."""
    text, adapter = ids(made, rows, tokens), made.adapters[0]

    def value(params: Any, batch: Tensor) -> Tensor:
        return _loss(pf.apply(made.base, adapter.replace(params=params), {"input_ids": batch}).logits, batch)

    def whole() -> Tensor:
        return _flat_tree(grad(value)(adapter.params, text))

    def each() -> Tensor:
        grads = vmap(grad(lambda params, row: value(params, row[None])), in_dims=(None, 0))(adapter.params, text)
        return torch.cat([tensor.sum(0).flatten() for leaf in grads.values() for tensor in leaf.values()])

    def losses(stacked: pf.Adapter, text: Tensor) -> Tensor:
        logits = pf.apply(made.base, stacked, {"input_ids": text}, index=torch.arange(rows)).logits
        found = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="none")
        return found.view(rows, -1).sum(1)

    def copies() -> Tensor:
        grads, _ = pf.sweep.gradients(pf.stack([adapter] * rows), losses, text)
        return torch.cat([tensor.sum(0).flatten() for leaf in grads.values() for tensor in leaf.values()])

    return {FLOOR: whole, PEFT: whole, "each row": each, "an adapter a row": copies}


def _loss(logits: Tensor, text: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="sum")


def _flat(grads: Mapping[int, Tensor | None], members: pf.Adapter) -> Tensor:
    """(members, numbers): gradients in the order in which the layers run, A before B, as peft holds them."""
    tensors = [tensor for path in _in_order(members) for _, tensor in sorted(members.params[path].items())]
    found = [grads[tensor.data_ptr()] for tensor in tensors]
    return torch.cat([tensor.flatten(1) for tensor in found if tensor is not None], 1)


def _in_order(members: pf.Adapter) -> list[str]:
    names = {name: number for number, name in enumerate(setting.LINEAR)}
    return sorted(members.params, key=lambda path: (int(path.split(".")[2]), names[path.rpartition(".")[2]]))


def _flat_tree(tree: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    return torch.cat([tensor.flatten() for leaf in tree.values() for tensor in leaf.values()])


def from_disk(made: Crowd, count: int, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Read `count` adapters from disk, then answer one mixed batch: the logits."""
    for number in range(count):
        pf.save(made.adapters[number % len(made.adapters)], folder / str(number))
    order = torch.arange(0, count, max(1, count // 32))[:32]
    batch, names = {"input_ids": ids(made, len(order), 1)}, [str(number) for number in order.tolist()]
    places = [str(folder / str(number)) for number in range(count)]

    def theirs() -> Tensor:
        model: Any = peft.PeftModel.from_pretrained(copy.deepcopy(made.base), places[0], "0")
        for number, place in enumerate(places[1:], start=1):
            model.load_adapter(place, str(number))
        return model.eval()(**batch, adapter_names=names).logits

    def ours() -> Tensor:
        return pf.apply(made.base, pf.load_stack(places, device=made.base.device), batch, index=order).logits

    cases = {FLOOR: lambda: made.base(**batch).logits, PEFT: theirs, "load_stack": ours}
    return {name: torch.no_grad()(case) for name, case in cases.items()}


def check(cases: Mapping[str, Callable[[], Tensor]]) -> None:
    """Stop if a case does not compute what peft does."""
    expected = cases[PEFT]()
    for name, case in cases.items():
        if name not in (FLOOR, PEFT, BARE_ROWS):
            found = case()
            apart = float((found - expected).abs().max() / expected.abs().max())
            if not apart <= TOLERANCE:
                raise SystemExit(f"{name} is not what peft computes: {apart:.1e} of the largest value apart")


def main() -> None:
    run = begin(__doc__.splitlines()[0])
    rows: list[Row] = []

    def add(
        group: str,
        cases: Mapping[str, Callable[[], Tensor]],
        sizes: setting.Sizes,
        rounds: int | None = None,
        **more: int,
    ) -> None:
        check(cases)
        warm_up = 2 if rounds is None else 0  # what takes minutes ran once to be checked
        rows.extend(timed(run, group, cases, sizes._asdict() | more, repeats=rounds, warm_up=warm_up))

    most, on_disk = (8, 8) if run.quick else (32, 200)
    small = SMALL._replace(rows=most)
    made = crowd(small, most, run.device)
    add(f"one token, {most} rows, an adapter each", routed(made, torch.arange(most)), small)
    add(f"one token, {most} rows, in another order", routed(made, torch.arange(most).flip(0)), small)
    add(f"training {most} adapters, 16 tokens each", training(made, most, 16), small, tokens_each=16)
    add("training 8 adapters, 32 tokens each", training(made, 8, 32), small, tokens_each=32)
    add(f"a step of {most} adapters, 16 tokens each", steps(made, most, 16), small, tokens_each=16)
    add("gradients of 8 rows of 32 tokens, each", per_sample(made, 8, 32), small, tokens_each=32)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        # peft takes minutes for them: few rounds
        add(f"{on_disk} adapters from disk, then one batch", from_disk(made, on_disk, Path(folder)), small, 2)
    for loaded in sorted({8, most}):
        add(f"ensemble of 8, one token, {loaded} in peft", ensemble(crowd(WIDE, loaded, run.device), 8, 1, 1), WIDE)
    top = crowd(WIDE, 8, run.device, targets=r".*layers\.(5)\..*_proj")
    add("ensemble of 8, adapted at the top, 4×64 tokens", ensemble(top, 8, 4, 64), WIDE)
    keep(run, "many", rows)


if __name__ == "__main__":
    main()
