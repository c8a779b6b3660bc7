"""A forward and a training step compiled by inductor: peftfn, peft and the frozen base, each compiled, on one thread.

The numbers of graphs are of the first adapter, and then of a second one of another alpha: peftfn's are arguments of one
compiled function; in peft the second one is an adapter that `set_adapter` turns on. Before anything is timed each case
is held against peft's own, not compiled.

    python benchmarks/compiled.py --quick
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from forwards import adapters
from lib.harness import FLOOR, PEFT, Row, begin, keep, timed
from lib.setting import LINEAR, Sizes, in_peft, llama
from torch import Tensor

import peftfn as pf

TOLERANCE = 1e-4  # of the largest value: float32 sums in another order
MIDDLE = Sizes(layers=4, hidden=384, intermediate=1024, rows=4, tokens=64)
SMALL = Sizes(layers=2, hidden=128, intermediate=256, rows=2, tokens=32)
COMPILERS = ("g++", "clang++", "c++")  # that inductor takes for CPU code

Case = Callable[[], list[Tensor]]


def graphs_of(run: Case) -> int:
    """How many graphs a call compiles."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # noqa: SLF001  # torch has no public count
    run()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before  # noqa: SLF001  # the same


def compiled(function: Any, **how: Any) -> Any:
    return torch.compile(function, **how)


class Cases:
    """One Llama with two adapters of unlike alpha, and what is compiled of it.

    Attributes:
        number: which of the two adapters is on.
    """

    def __init__(self, sizes: Sizes) -> None:
        base = llama(sizes).eval().requires_grad_(False)
        configs = [
            pf.LoraConfig(r=sizes.r, lora_alpha=alpha, target_modules=LINEAR, task_type="CAUSAL_LM")
            for alpha in (8, 16)
        ]
        self.given = [adapters(base, config, 1)[0] for config in configs]
        self.base, self.theirs, self.number = base, in_peft(base, self.given), 0
        self.ids = torch.randint(0, 2048, (sizes.rows, sizes.tokens), generator=torch.Generator().manual_seed(0))
        self.paths = [(path, name) for path, leaf in self.given[0].params.items() for name in leaf]
        self.embedded = base.get_input_embeddings()(self.ids).detach().requires_grad_()

    def choose(self, number: int) -> None:
        """Turn one of the adapters on."""
        self.number = number
        self.theirs.set_adapter(str(number))

    def leaves(self) -> list[Tensor]:
        """Its tensors in peft."""
        return [self.theirs.get_parameter(f"base_model.model.{p}.{n}.{self.number}.weight") for p, n in self.paths]

    def forwards(self) -> dict[str, Case]:
        """Logits, without gradients."""
        base, theirs = compiled(self.base), compiled(self.theirs)
        ours = compiled(lambda adapter, ids: pf.apply(self.base, adapter, {"input_ids": ids}).logits, fullgraph=True)
        quiet = torch.no_grad()
        return {
            FLOOR: quiet(lambda: [base(input_ids=self.ids).logits]),
            PEFT: quiet(lambda: [theirs(input_ids=self.ids).logits]),
            "apply": quiet(lambda: [ours(self.given[self.number], self.ids)]),
        }

    def steps(self) -> dict[str, Case]:
        """The gradients of the adapter; for the floor, those of the embedding's output."""
        labels = self.ids
        base, theirs = compiled(self.base), compiled(self.theirs)

        def loss(params: Any, adapter: pf.Adapter, ids: Tensor) -> Tensor:
            return pf.apply(self.base, adapter.replace(params=params), {"input_ids": ids, "labels": ids}).loss

        step = compiled(torch.func.grad(loss), fullgraph=True)

        def ours() -> list[Tensor]:
            adapter = self.given[self.number]
            found = step(adapter.params, adapter, self.ids)
            return [found[path][name] for path, name in self.paths]

        def floor() -> list[Tensor]:
            value = base(inputs_embeds=self.embedded, labels=labels).loss
            return list(torch.autograd.grad(value, [self.embedded]))

        def by_peft() -> list[Tensor]:
            return list(torch.autograd.grad(theirs(input_ids=self.ids, labels=labels).loss, self.leaves()))

        return {FLOOR: floor, PEFT: by_peft, "torch.func.grad": ours}

    def expected(self, training: bool) -> list[Tensor]:
        """What peft computes, not compiled."""
        if not training:
            with torch.no_grad():
                return [self.theirs(input_ids=self.ids).logits]
        return list(torch.autograd.grad(self.theirs(input_ids=self.ids, labels=self.ids).loss, self.leaves()))


def check(made: Cases, cases: dict[str, Case], training: bool) -> dict[str, int]:
    """How many graphs each case took for two adapters; stop if one does not compute what peft does."""
    graphs = dict.fromkeys(cases, 0)
    for number in (1, 0):
        made.choose(number)
        expected = made.expected(training)
        for name, case in cases.items():
            graphs[name] += graphs_of(case)
            for found, reference in zip(case(), expected, strict=True) if name != FLOOR else ():
                away = float((found - reference).abs().max() / reference.abs().max())
                if not away <= TOLERANCE:
                    raise SystemExit(f"{name} is not what peft computes: {away:.1e} of the largest value apart")
    return graphs


def main() -> None:
    run = begin("Time what inductor makes of peftfn, peft and the bare base.", repeats=15, devices=("cpu",))
    if not any(map(shutil.which, COMPILERS)):
        print(f"inductor needs a C++ compiler for code on CPU, and there is none of {', '.join(COMPILERS)}.")
        return
    sizes, rows = SMALL if run.quick else MIDDLE, list[Row]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own, of peft's and transformers' code
        for training, what in ((False, "forward"), (True, "training step")):
            torch._dynamo.reset()  # noqa: SLF001  # what was compiled for the other group counts against a limit
            made = Cases(sizes)
            cases = made.steps() if training else made.forwards()
            graphs = check(made, cases, training)
            print(f"{what}, graphs for two adapters: {', '.join(f'{name} {n}' for name, n in graphs.items())}")
            counted = {f"graphs, {name}": n for name, n in graphs.items()}
            rows += timed(run, f"{what}, compiled by inductor", cases, sizes._asdict() | counted)
    keep(run, "compiled", rows)


if __name__ == "__main__":
    main()
