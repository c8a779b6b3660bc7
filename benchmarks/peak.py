"""The memory that a training step takes, at its peak, beyond what is there before it: ours, peft's, the frozen base's.

Each sample is the first step of a process of its own: what the system counts for that process (VmHWM of Linux), with
all that torch, its allocator and its kernels take. So the base's own step is the floor here, too.

    python benchmarks/peak.py --quick
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from lib.harness import FLOOR, PEFT, Quartiles, Run, begin, keep, pin
from lib.records import quartiles
from lib.setting import FULL, QUICK, Sizes, build
from lib.timing import count_anew, in_child, peak
from training_step import NAMES, group_of, steps

CASES = (FLOOR, PEFT, "apply + backward", "bind + backward", "torch.func.grad")
SETTINGS = [(dtype, p) for dtype in NAMES for p in (0.0, 0.1)]


class Peak(NamedTuple):
    """What a step takes at most.

    Attributes:
        group: the setting that it is of.
        what: whose step.
        mib: MiB beyond what was there before.
        to_floor: that over what the step of the base alone takes, in the same round.
        to_peft: over what peft's takes.
        excess: what it takes beyond the base alone, over the median of what peft's takes beyond it.
        repeats: samples.
        sizes: what the model and the batch measure.
    """

    group: str
    what: str
    mib: Quartiles
    to_floor: Quartiles
    to_peft: Quartiles
    excess: Quartiles
    repeats: int
    sizes: Mapping[str, int]


def child(case: str, number: int, quick: bool, threads: int) -> None:
    """One sample: bytes, on stdout."""
    pin(threads)
    dtype, p = SETTINGS[number]
    step = steps(build(QUICK if quick else FULL, p, training=True, dtype=dtype))[case]
    before = count_anew()
    step()
    print(json.dumps(peak() - before))


def sample(case: str, number: int, run: Run) -> int:
    """What the step of a case takes, in a process of its own."""
    return in_child(__file__, case, number, int(run.quick), run.threads)


def compared(group: str, taken: Mapping[str, Sequence[int]], sizes: Sizes) -> list[Peak]:
    """The rows of one setting, and a line for each that says what came of it."""
    bare, theirs = taken[FLOOR], taken[PEFT]
    (beyond, _, _) = quartiles([one - floor for one, floor in zip(theirs, bare, strict=True)])
    rows = [
        Peak(
            group,
            case,
            quartiles([one / 2**20 for one in found]),
            quartiles([one / floor for one, floor in zip(found, bare, strict=True)]),
            quartiles([one / other for one, other in zip(found, theirs, strict=True)]),
            quartiles([(one - floor) / beyond for one, floor in zip(found, bare, strict=True)]),
            len(found),
            sizes._asdict(),
        )
        for case, found in taken.items()
    ]
    for row in rows:
        beyond_peft = f"beyond the base, over peft {row.excess.median:.3f}"
        print(f"{group}, {row.what}: {row.mib.median:.0f} MiB; over the base {row.to_floor.median:.3f}; {beyond_peft}")
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        case, number, quick, threads = sys.argv[2:]
        child(case, int(number), bool(int(quick)), int(threads))
        return
    run = begin("Measure the memory that a training step takes at its peak.", repeats=3, devices=("cpu",))
    rows: list[Peak] = []
    rounds = range(1 if run.quick else run.repeats)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # memory is counted by process, whoever else runs
        waiting = [
            (setting, {case: [pool.submit(sample, case, number, run) for _ in rounds] for case in CASES})
            for number, setting in list(enumerate(SETTINGS))[-1 if run.quick else 0 :]
        ]
        for setting, several in waiting:
            taken = {case: [one.result() for one in found] for case, found in several.items()}
            rows += compared(f"peak, {group_of(*setting)}", taken, QUICK if run.quick else FULL)
    keep(run, "peak", rows, unit="× what the base alone takes")


if __name__ == "__main__":
    main()
