"""What autograd keeps for the backward pass of a training step, in bytes: ours, peft's, and that of the frozen base.

Every tensor that `saved_tensors_hooks` show and that is not the base's own or the adapter's, each storage once. What
the frozen base keeps is taken off both; before anything is counted the step is held against peft's.

    python benchmarks/saved.py --quick
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from harness import PEFT, machine, pin, versions
from setting import FULL, QUICK, build
from torch import Tensor, nn
from training_step import Step, backward, check, floor, steps

import peftfn as pf

RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what a training step keeps for its backward pass.")
    parser.add_argument("--quick", action="store_true", help="a smaller model; nothing is written without --output")
    parser.add_argument("--output", type=Path, help="folder for the JSON (results, beside this file)")
    given = parser.parse_args()
    pin(1)
    sizes = QUICK if given.quick else FULL
    rows = []
    for dtype, p in itertools.product((torch.float32, torch.bfloat16), (0.0, 0.1)):
        made = build(sizes, p, training=True, dtype=dtype)
        cases = steps(made)
        check(cases, floor(made.theirs, made.batch), made.theirs)
        leaves = pf.leaves(made.adapter)
        frozen, bound = copy.deepcopy(made.base).requires_grad_(False), pf.bind(made.base, made.adapter)
        bare = saved(floor(frozen, made.batch), frozen, [])
        ours = saved(backward(lambda: bound(**made.batch), []), made.base, leaves) - bare  # noqa: B023  # called at once
        theirs = saved(cases[PEFT], made.theirs, []) - bare
        what = f"{str(dtype).removeprefix('torch.')} base, dropout {p:g}"
        rows.append({"what": what, "ours": ours, "peft": theirs, "base": bare, "ratio": round(ours / theirs, 3)})
        print(f"{what:30}  {ours / 2**20:7.1f} MiB, peft {theirs / 2**20:7.1f} MiB: {ours / theirs:.3f}", flush=True)
    folder = given.output or (None if given.quick else RESULTS)
    if folder is not None:
        about = {"sizes": sizes._asdict(), "machine": machine(1), "versions": versions("torch", "transformers", "peft")}
        folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row | about) for row in rows)
        (folder / "saved.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"written to {folder}")


if __name__ == "__main__":
    main()
