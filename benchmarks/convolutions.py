"""A convolution with LoRA, by shape, in training and without gradients: peftfn, peft and the bare base.

A convolution and its low-rank delta run beside each other, or with one kernel that is made for the call
(`peftfn.methods.low_rank.conv_kernel` has the rule). Both are timed as well, and the last table has what the rule picks
against the better of the two. "base alone" is the frozen convolution, forward and, in training, backward to its input.
Each case is held against peft, outputs and gradients, before it is timed.

    python benchmarks/convolutions.py --quick
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from forwards import TOLERANCE, adapters
from lib.harness import FLOOR, PEFT, Row, Run, begin, keep, timed
from lib.setting import in_peft
from torch import Tensor, nn
from tqdm import tqdm

import peftfn as pf
from peftfn.methods.low_rank import site_forward

OURS, APART, AS_ONE = "peftfn", "always apart", "always as one"


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
    # around the rule's border: few positions for the size of the kernel, small kernels, and low ranks
    Shape(8, 64, 64, 32, r=4),
    Shape(8, 32, 32, 56, r=8),
    Shape(2, 128, 128, 8),
    Shape(1, 128, 128, 8),
    Shape(1, 256, 256, 16),
    Shape(1, 256, 256, 8),
    Shape(4, 512, 512, 8),
    Shape(2, 512, 512, 8),
    Shape(8, 512, 512, 8, kernel=1),
    Shape(1, 256, 1024, 14, kernel=1),
    Shape(8, 256, 64, 28, kernel=1),
    Shape(8, 3, 64, 64, kernel=7, stride=2),
)

Case = Callable[[], list[Tensor]]
"""Returns the output and, in training, the gradients of x, A and B."""


@contextlib.contextmanager
def forced(as_one: bool) -> Iterator[None]:
    rule = site_forward.is_cheaper_as_one
    site_forward.is_cheaper_as_one = lambda *_: as_one
    try:
        yield
    finally:
        site_forward.is_cheaper_as_one = rule


def cases(shape: Shape, training: bool) -> dict[str, Case]:
    """A run of each kind."""
    torch.manual_seed(0)
    size = (shape.inputs, shape.outputs, shape.kernel, shape.stride, shape.kernel // 2)
    base = nn.Sequential(nn.Conv2d(*size)).eval().requires_grad_(False)
    x = torch.randn(shape.rows, shape.inputs, shape.side, shape.side).requires_grad_(training)
    given = adapters(base, pf.LoraConfig(r=shape.r, target_modules=["0"]), 1)
    bound, theirs = pf.bind(base, given[0]), in_peft(base, given)
    own = [bound.get_parameter(f"0.{name}") for name in ("lora_A", "lora_B")]
    names = [f"base_model.model.0.{name}.0.weight" for name in ("lora_A", "lora_B")]
    reference = [theirs.get_parameter(name).requires_grad_(training) for name in names]
    dy = torch.randn_like(base(x))

    def run(module: Any, leaves: list[Tensor]) -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [module(x)]
        y = module(x)
        return [y, *torch.autograd.grad(y, [x, *leaves], dy)]

    def ours(as_one: bool) -> list[Tensor]:
        with forced(as_one):
            return run(bound, own)

    return {
        FLOOR: lambda: run(base, []),
        PEFT: lambda: run(theirs, reference),
        OURS: lambda: run(bound, own),
        APART: lambda: ours(False),
        AS_ONE: lambda: ours(True),
    }


def check(made: dict[str, Case]) -> None:
    """Stop if a case does not compute what peft does."""
    expected = made[PEFT]()
    for name in (OURS, APART, AS_ONE):
        for found, reference in zip(made[name](), expected, strict=True):
            away = float((found - reference).abs().max() / reference.abs().max())
            if not away <= TOLERANCE:
                raise SystemExit(f"{name} is not what peft computes: {away:.1e} of the largest value apart")


def measured(run: Run, shape: Shape, training: bool) -> list[Row]:
    """The rows of one shape."""
    made = cases(shape, training)
    check(made)
    start = run.clock()
    made[FLOOR]()
    calls = max(1, int(0.02 / max(run.clock() - start, 1e-5)))  # of 20 ms together: a clock is no finer
    what = "training" if training else "forward"
    side, kernel = (f"{n}×{n}" for n in (shape.side, shape.kernel))
    group = f"{what}, {shape.rows}×{shape.inputs}→{shape.outputs} {side}, {kernel}/{shape.stride}, r={shape.r}"
    return timed(run, group, made, shape._asdict(), calls=calls)


def picks(rows: list[Row]) -> str:
    """For each group: what the rule takes, both ways, and what it gives up against the better of them."""
    lines = [f"{'ms':58}{'peftfn':>8}{'apart':>8}{'as one':>8}{'peft':>8}  / better"]
    for group in dict.fromkeys(row.group for row in rows):
        ms = {row.what: row.ms.median for row in rows if row.group == group}
        best = min(ms[APART], ms[AS_ONE])
        times = "".join(f"{ms[what]:8.2f}" for what in (OURS, APART, AS_ONE, PEFT))
        lines.append(f"{group:58}{times}  {ms[OURS] / best:8.3f}")
    return "\n".join(lines)


def main() -> None:
    run = begin("Time convolutions with LoRA, by shape.", repeats=15, devices=("cpu",))
    todo = [(shape, training) for training in (False, True) for shape in SHAPES[: 1 if run.quick else None]]
    rows = [row for shape, training in tqdm(todo) for row in measured(run, shape, training)]
    print(picks(rows))
    keep(run, "convolutions", rows)


if __name__ == "__main__":
    main()
