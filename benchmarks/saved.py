"""What autograd keeps for the backward pass of a training step, in bytes: ours, peft's, and that of the frozen base.

Every tensor that `saved_tensors_hooks` show and that is not the base's own or the adapter's, each storage once. What
the frozen base keeps is taken off both; before anything is counted the step is held against peft's.

    python benchmarks/saved.py --quick
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from lib.harness import FLOOR, PEFT, Quartiles, begin, keep
from lib.records import exactly
from lib.setting import FULL, QUICK, Sizes, build
from torch import Tensor, nn
from training_step import NAMES, Step, backward, check, floor, group_of, steps

import peftfn as pf


class Kept(NamedTuple):
    """One count.

    Attributes:
        group: the setting that it is of.
        what: whose step.
        bytes: what autograd keeps.
        to_floor: that over what the step of the base alone keeps.
        to_peft: over what peft's keeps.
        excess: what is kept beyond the base alone, over what peft keeps beyond it.
        repeats: one; it is the same each time.
        sizes: what the model and the batch measure.
    """

    group: str
    what: str
    bytes: int
    to_floor: Quartiles
    to_peft: Quartiles
    excess: Quartiles
    repeats: int
    sizes: Mapping[str, int]


def of_the_base(model: nn.Module) -> Iterator[Tensor]:
    """The base's own tensors, with what its packed weights are read by."""
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None), parameter):
            yield from (value for value in getattr(one, "__dict__", {}).values() if isinstance(value, Tensor))


def saved(step: Step, model: nn.Module, adapter: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps between a step's forward and backward, without the base's own and the adapter's."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*of_the_base(model), *adapter)}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(seen.values())


def compared(group: str, ours: int, theirs: int, bare: int, sizes: Sizes) -> list[Kept]:
    """The rows of one setting, and a line that says what came of it."""
    found = {FLOOR: bare, PEFT: theirs, "peftfn": ours}
    print(
        f"{group}: beyond the base {(ours - bare) / 2**20:.1f} MiB, peft {(theirs - bare) / 2**20:.1f} MiB: "
        f"{(ours - bare) / (theirs - bare):.3f}",
        flush=True,
    )
    return [
        Kept(
            group,
            what,
            kept,
            exactly(kept / bare),
            exactly(kept / theirs),
            exactly((kept - bare) / (theirs - bare)),
            1,
            sizes._asdict(),
        )
        for what, kept in found.items()
    ]


def main() -> None:
    run = begin("Count what a training step keeps for its backward pass.")
    sizes = QUICK if run.quick else FULL
    rows: list[Kept] = []
    for dtype, p in itertools.product(NAMES, (0.0, 0.1)):
        made = build(sizes, p, training=True, dtype=dtype, device=run.device)
        cases = steps(made)
        check(cases, floor(made.theirs, made.batch), made.theirs)
        leaves = pf.leaves(made.adapter)
        frozen, bound = copy.deepcopy(made.base).requires_grad_(False), pf.bind(made.base, made.adapter)
        bare = saved(floor(frozen, made.batch), frozen, [])
        ours = saved(backward(lambda: bound(**made.batch), []), made.base, leaves)  # noqa: B023  # called at once
        rows += compared(f"kept, {group_of(dtype, p)}", ours, saved(cases[PEFT], made.theirs, []), bare, sizes)
    keep(run, "saved", rows, unit="× what the base alone keeps")


if __name__ == "__main__":
    main()
