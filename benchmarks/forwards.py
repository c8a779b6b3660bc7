"""Forwards without gradients: a convolution, by shape, and switching among adapters: peftfn, peft and the bare base.

A convolution and its low-rank delta run beside each other or as one kernel (`peftfn.methods.running` has the rule);
both are timed as well, against what the rule picks. Switching is one forward of one token with each of four adapters
in turn: peft's `set_adapter` before each, here another module or another argument.

    python benchmarks/forwards.py --quick
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from harness import FLOOR, PEFT, Row, begin, keep, timed
from setting import DEEP, LINEAR, QUICK, Sizes, llama, moved, trained
from torch import Tensor, nn

import peftfn as pf
from peftfn.methods import running

TOLERANCE = 1e-4  # of the largest value: float32 sums in another order
NAMES = ("a", "b", "c", "d")

Run = Callable[[], Tensor]


class Shape(NamedTuple):
    """A convolution and its input."""

    rows: int
    inputs: int
    outputs: int
    side: int
    kernel: int = 3
    stride: int = 1
    r: int = 16


SHAPES = (
    Shape(8, 64, 64, 32),
    Shape(8, 64, 128, 32),
    Shape(8, 64, 128, 32, stride=2),
    Shape(8, 128, 128, 16),
    Shape(8, 320, 320, 16),
    Shape(4, 256, 256, 8, kernel=1),
    Shape(1, 512, 512, 2),
)


def adapters(model: nn.Module, config: pf.PeftConfig, count: int) -> list[pf.Adapter]:
    """So many of them, all different."""
    return [trained(model, config, torch.Generator().manual_seed(seed)) for seed in range(count)]


def in_peft(model: nn.Module, given: list[pf.Adapter]) -> Any:
    """The same adapters in peft, on a copy of the model."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 with transformers 5.23: about names inside it
        for name, adapter in zip(NAMES, given, strict=False):
            pf.save(adapter, f"{folder}/{name}")
        theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), f"{folder}/a", adapter_name="a")
        for name in NAMES[1 : len(given)]:
            theirs.load_adapter(f"{folder}/{name}", adapter_name=name)
    return theirs.eval()


def convolution(shape: Shape, device: torch.device) -> dict[str, Run]:
    """A forward of each kind."""
    torch.manual_seed(0)
    size = (shape.inputs, shape.outputs, shape.kernel, shape.stride, shape.kernel // 2)
    base = nn.Sequential(nn.Conv2d(*size)).eval().requires_grad_(False)
    x = torch.randn(shape.rows, shape.inputs, shape.side, shape.side)
    given = adapters(base, pf.LoraConfig(r=shape.r, target_modules=["0"]), 1)
    base, theirs, given, x = (moved(one, device) for one in (base, in_peft(base, given), given, x))
    bound = pf.bind(base, given[0])
    rule = running.is_cheaper_as_one

    def forced(as_one: bool) -> Tensor:
        running.is_cheaper_as_one = lambda *_: as_one
        try:
            return bound(x)
        finally:
            running.is_cheaper_as_one = rule

    return {
        FLOOR: lambda: base(x),
        PEFT: lambda: theirs(x),
        "bind": lambda: bound(x),
        "always apart": functools.partial(forced, False),
        "always as one": functools.partial(forced, True),
    }


def switching(sizes: Sizes, device: torch.device) -> dict[str, Run]:
    """A forward of one token with each adapter in turn."""
    base = llama(sizes).eval()
    given = adapters(base, pf.LoraConfig(r=sizes.r, target_modules=LINEAR, task_type="CAUSAL_LM"), len(NAMES))
    base, theirs, given = (moved(one, device) for one in (base, in_peft(base, given), given))
    bound = [pf.bind(base, adapter) for adapter in given]
    ids = torch.ones(1, 1, dtype=torch.long, device=device)

    def by_peft() -> Tensor:
        outputs: list[Tensor] = []
        for name in NAMES:
            theirs.set_adapter(name)
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
    run = begin("Time convolutions, and switching among adapters.", repeats=25)
    rows: list[Row] = []
    with torch.no_grad():
        sizes = QUICK._replace(rows=1, tokens=1) if run.quick else DEEP
        cases = switching(sizes, run.device)
        check(cases)
        rows += timed(run, "switching", cases, sizes._asdict())
        for shape in SHAPES[: 2 if run.quick else None]:
            cases = convolution(shape, run.device)
            check(cases)
            group = f"convolution {shape.kernel}×{shape.kernel}/{shape.stride} {shape.inputs}→{shape.outputs}"
            rows += timed(run, group, cases, shape._asdict(), calls=3)
    keep(run, "forwards", rows)


if __name__ == "__main__":
    main()
