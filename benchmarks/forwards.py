"""Forwards of one token with each of four adapters in turn: peftfn, peft and the bare base.

peft turns each adapter on with `set_adapter`; here it is another module, or another argument.

    python benchmarks/forwards.py --quick
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from lib.harness import FLOOR, PEFT, Row, begin, keep, timed
from lib.setting import DEEP, LINEAR, QUICK, Sizes, in_peft, llama, moved, trained
from torch import Tensor, nn

import peftfn as pf

TOLERANCE = 1e-4  # of the largest value: float32 sums in another order
COUNT = 4

Run = Callable[[], Tensor]


def adapters(model: nn.Module, config: pf.PeftConfig, count: int) -> list[pf.Adapter]:
    """So many of them, all different."""
    return [trained(model, config, torch.Generator().manual_seed(seed)) for seed in range(count)]


def switching(sizes: Sizes, device: torch.device) -> dict[str, Run]:
    """A forward of one token with each adapter in turn."""
    base = llama(sizes).eval()
    given = adapters(base, pf.LoraConfig(r=sizes.r, target_modules=LINEAR, task_type="CAUSAL_LM"), COUNT)
    theirs = in_peft(base, given).eval()
    base, theirs, given = (moved(one, device) for one in (base, theirs, given))
    bound = [pf.bind(base, adapter) for adapter in given]
    ids = torch.ones(1, 1, dtype=torch.long, device=device)

    def by_peft() -> Tensor:
        outputs: list[Tensor] = []
        for number in range(COUNT):
            theirs.set_adapter(str(number))
            outputs.append(theirs(input_ids=ids).logits)
        return torch.cat(outputs)

    return {
        FLOOR: lambda: torch.cat([base(input_ids=ids).logits for _ in given]),
        PEFT: by_peft,
        "bind": lambda: torch.cat([module(input_ids=ids).logits for module in bound]),
        "apply": lambda: torch.cat([pf.apply(base, adapter, {"input_ids": ids}).logits for adapter in given]),
    }


def check(cases: dict[str, Run]) -> None:
    """Stop if a case does not compute what peft does."""
    expected = cases[PEFT]()
    for name in cases.keys() - {FLOOR, PEFT}:
        apart = float((cases[name]() - expected).abs().max() / expected.abs().max())
        if not apart <= TOLERANCE:
            raise SystemExit(f"{name} is not what peft computes: {apart:.1e} of the largest value apart")


def main() -> None:
    run = begin("Time forwards that switch among adapters.", repeats=25)
    rows: list[Row] = []
    with torch.no_grad():
        sizes = QUICK._replace(rows=1, tokens=1) if run.quick else DEEP
        cases = switching(sizes, run.device)
        check(cases)
        rows += timed(run, "switching", cases, sizes._asdict())
    keep(run, "forwards", rows)


if __name__ == "__main__":
    main()
