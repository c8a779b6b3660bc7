"""How many graphs `torch.compile` makes for many adapters, counted: peftfn's `apply` and peft's `set_adapter`.

One Llama and one compiled function for all adapters, whose outputs are held against calls that are not compiled. Whole
graphs are asked for (`fullgraph=True`) of both.

    python benchmarks/graphs.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lib.harness import PEFT, begin, machine, versions
from lib.records import save
from lib.setting import LINEAR, Sizes, in_peft, llama, trained
from torch import Tensor

import peftfn as pf

TINY = Sizes(layers=2, hidden=64, intermediate=96, rows=16, tokens=4)
COUNT = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order

Call = Callable[[int], Tensor]


def counted(make: Callable[[Any], Call], calls: int, expected: Sequence[Tensor]) -> int:
    """The graphs that the calls take; stop if one of them is not what it is without a compiler."""
    torch._dynamo.reset()  # noqa: SLF001  # torch has no public name for it
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        seen.append(graph)
        return graph.forward

    call = make(backend)
    for number in range(calls):
        torch.testing.assert_close(call(number), expected[number], **CLOSE)
    return len(seen)


def adapters(base: Any, ranks: Sequence[int]) -> list[pf.Adapter]:
    """One of each rank, each with an alpha of its own."""
    configs = [
        pf.LoraConfig(r=r, lora_alpha=r + number, target_modules=LINEAR, task_type="CAUSAL_LM")
        for number, r in enumerate(ranks)
    ]
    return [trained(base, one, torch.Generator().manual_seed(number)) for number, one in enumerate(configs)]


def of_adapters(base: Any, ids: Tensor, ranks: Sequence[int]) -> dict[str, int]:
    """Graphs for adapters of these ranks, one call of each."""
    given = adapters(base, ranks)
    expected = [pf.apply(base, one, {"input_ids": ids}).logits for one in given]

    def ours(backend: Any) -> Call:
        run = torch.compile(lambda one: pf.apply(base, one, {"input_ids": ids}).logits, fullgraph=True, backend=backend)
        return lambda number: run(given[number])

    theirs = in_peft(base, given)

    def by_peft(backend: Any) -> Call:
        run = torch.compile(lambda: theirs(input_ids=ids).logits, fullgraph=True, backend=backend)

        def call(number: int) -> Tensor:
            theirs.set_adapter(str(number))
            return run()

        return call

    return {"peftfn": counted(ours, len(given), expected), PEFT: counted(by_peft, len(given), expected)}


def of_routes(base: Any, ids: Tensor, count: int) -> dict[str, int]:
    """Graphs for so many assignments of four adapters to rows."""
    given = adapters(base, [4, 4, 4, 4])
    stacked, generator = pf.stack(given), torch.Generator().manual_seed(0)
    routes = [torch.randint(-1, len(given), (len(ids),), generator=generator) for _ in range(count)]
    expected = [pf.apply(base, stacked, {"input_ids": ids}, index=route).logits for route in routes]

    def ours(backend: Any) -> Call:
        def forward(route: Tensor) -> Tensor:
            return pf.apply(base, stacked, {"input_ids": ids}, index=route).logits

        run = torch.compile(forward, fullgraph=True, backend=backend)
        return lambda number: run(routes[number])

    theirs = in_peft(base, given)

    def by_peft(backend: Any) -> Call:
        run = torch.compile(lambda names: theirs(input_ids=ids, adapter_names=names).logits, backend=backend)
        return lambda number: run(["__base__" if one < 0 else str(one) for one in routes[number].tolist()])

    return {"peftfn": counted(ours, count, expected), PEFT: counted(by_peft, count, expected)}


def main() -> None:
    run = begin("Count the graphs that torch.compile makes.", devices=("cpu",))
    base = llama(TINY).eval().requires_grad_(False)
    ids = torch.randint(0, 2048, (TINY.rows, TINY.tokens), generator=torch.Generator().manual_seed(0))
    count = 4 if run.quick else COUNT
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own, of peft's and transformers' code
        torch._dynamo.config.recompile_limit = 4 * COUNT  # noqa: SLF001  # else Dynamo stops compiling, and counting
        found = {
            f"{count} adapters of one rank": of_adapters(base, ids, [4] * count),
            f"{count} adapters of mixed ranks": of_adapters(base, ids, [2, 4, 8, 16] * (count // 4)),
            f"{count} assignments of rows": of_routes(base, ids, count),
        }
    for what, counts in found.items():
        print(f"{what}: {counts['peftfn']} by peftfn, {counts[PEFT]} by peft")
    if run.folder is not None:
        about = {
            "repeats": 1,
            "machine": machine(run.threads),
            "versions": versions("torch", "transformers", "peft", "peftfn"),
        }
        rows = [
            {"group": "graphs", "what": what, "graphs": counts["peftfn"], "graphs of peft": counts[PEFT]}
            for what, counts in found.items()
        ]
        save(rows, run.folder / "graphs.json", **about)


if __name__ == "__main__":
    main()
