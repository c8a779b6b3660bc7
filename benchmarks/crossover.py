"""Rows that get a copy of their adapter's weights, against rows sorted by adapter: where one way overtakes the other.

One linear layer of LoRA in each case, no gradients, process CPU time, the ways in turns, medians. The library
(`peftfn.runtime.routing.segments`) chooses between them by the memory that each one moves; the last column is its pick.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from lib import harness
from torch import Tensor, nn

import peftfn as pf
from peftfn.methods import lora
from peftfn.models import surgery
from peftfn.models.layers import LINEAR, Site
from peftfn.runtime.routing import routed_sites, row_index, segments

WIDTH = 512
ROWS = 32
WAYS = ("copied", "by adapter", "in use")


class Case(NamedTuple):
    """32 rows of some tokens, over some adapters of some rank; `even` gives each adapter as many rows."""

    adapters: int
    rank: int
    tokens: int
    even: bool


CASES = [
    Case(adapters, rank, tokens, even)
    for adapters, even in ((32, True), (32, False), (8, False), (128, False))
    for rank in (8, 16, 64)
    for tokens in (1, 4, 8, 16, 32, 64)
]


def ways_of(case: Case) -> tuple[dict[str, Callable[[], Tensor]], str]:
    """A call for each way, and the name of the one that is chosen."""
    draw = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    config = pf.LoraConfig(r=case.rank, target_modules=["0"], init_lora_weights=False)
    stacked = pf.stack([pf.init(base, config, draw)] * case.adapters)
    index = torch.randint(case.adapters, (ROWS,), generator=draw)
    if case.even:
        index = torch.randperm(ROWS, generator=draw) % case.adapters
    found = row_index.of_index(index, case.adapters)
    x = torch.randn(ROWS, case.tokens, WIDTH, generator=draw)
    leaf = {**stacked.params["0"], **stacked.buffers["0"]}
    run = surgery.base_forward(base[0])
    site = Site("0", LINEAR, base[0], "weight", run)

    def call(ways: tuple[segments.Segments, ...]) -> Callable[[], Tensor]:
        step = routed_sites.step(lora.METHOD, config, leaf, found._replace(ways=ways), run, site)
        return torch.no_grad()(lambda: step(x))

    numbers = sum(tensor[0].numel() for tensor in leaf.values())
    chosen = segments.cheapest(found.ways, ROWS, numbers, x, x.numel())
    name = WAYS[0] if chosen is None else WAYS[1 + [way is chosen for way in found.ways].index(True)]
    return {"copied": call(()), **{WAYS[1 + n]: call((way,)) for n, way in enumerate(found.ways)}}, name


def forced(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with its one way taken, whatever it costs."""

    def made() -> Tensor:
        kept = segments.cheapest
        segments.cheapest = lambda ways, *_: ways[0] if ways else None
        try:
            return run()
        finally:
            segments.cheapest = kept

    return made


def measure(cases: dict[str, Callable[[], Tensor]], clock: Callable[[], float], rounds: int) -> dict[str, float]:
    """Medians in milliseconds of the cases in turns."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for number in range(rounds + 2):
        random.Random(number).shuffle(order)
        for name in order:
            start = clock()
            for _ in range(5):
                cases[name]()
            samples[name].append((clock() - start) * 200)
    return {name: statistics.median(times[2:]) for name, times in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds of a few cases")
    given = parser.parse_args()
    clock = harness.pin(1)
    print("adapters  rank  tokens  " + "".join(f"{name:>12}" for name in WAYS) + "  ms, chosen")
    right, lost = 0, 1.0
    cases = CASES[::5] if given.quick else CASES
    for case in cases:
        calls, chosen = ways_of(case)
        calls = {name: forced(run) for name, run in calls.items()}
        outputs = [run() for run in calls.values()]
        assert all(torch.allclose(one, outputs[0], atol=1e-4) for one in outputs)
        found = measure(calls, clock, 3 if given.quick else 11)
        right += found[chosen] == min(found.values())
        lost = max(lost, found[chosen] / min(found.values()))
        spread = "even" if case.even else ""
        print(f"{case.adapters:8}  {case.rank:4}  {case.tokens:6}  ", end="")
        print("".join(f"{found[name]:12.3f}" for name in WAYS) + f"  {chosen} {spread}", flush=True)
    print(f"the fastest was chosen in {right} of {len(cases)} cases; the worst choice took {lost:.2f} of its time")


if __name__ == "__main__":
    main()
