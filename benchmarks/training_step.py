"""A training step, and a forward of one token: peftfn, peft and the frozen base, in one process.

The base is a Llama of random weights with LoRA on all its linear layers. "base alone" is the floor of any method that
leaves the base's weights alone: the frozen base, forward and backward down to the embedding's output, with no adapter
in it. Before a case is timed its output and its gradients are held against peft's, on the same adapter, with the values
dropped that peftfn drops.

    python benchmarks/training_step.py --quick
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import FLOOR, PEFT, Row, draw, machine, measure, pin, table, versions, write
from setting import DEEP, FULL, QUICK, Setting, build, our_dropout
from torch import Tensor

import peftfn as pf

Step = Callable[[], tuple[Tensor, list[Tensor]]]
"""Runs once and returns the logits and the gradients (of the adapter; of the embedding's output for the floor)."""

# Of the largest value: sums in another order. In bfloat16 each library rounds them at other places; measured: 0.02.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
RESULTS = Path(__file__).parent / "results"


def steps(given: Setting) -> dict[str, Step]:
    """A training step of each kind."""
    base, theirs, adapter, batch = given
    paths = [(path, name) for path, leaf in adapter.params.items() for name in leaf]
    their_leaves = [theirs.get_parameter(f"base_model.model.{path}.{name}.default.weight") for path, name in paths]
    own = adapter.replace(params={path: dict(leaf) for path, leaf in copy.deepcopy(adapter.params).items()})
    bound = pf.bind(base, copy.deepcopy(adapter))
    bound_leaves = [bound.get_parameter(f"{path}.{name}") for path, name in paths]

    def functional() -> tuple[Tensor, list[Tensor]]:
        def loss(params: Any) -> tuple[Tensor, Tensor]:
            output = pf.apply(base, adapter.replace(params=params), batch)
            return output.loss, output.logits

        grads, logits = torch.func.grad(loss, has_aux=True)(adapter.params)
        return logits, [grads[path][name] for path, name in paths]

    return {
        FLOOR: floor(copy.deepcopy(base).requires_grad_(False), batch),
        PEFT: backward(lambda: theirs(**batch), their_leaves),
        "apply + backward": backward(lambda: pf.apply(base, own, batch), pf.leaves(own)),
        "bind + backward": backward(lambda: bound(**batch), bound_leaves),
        "torch.func.grad": functional,
    }


def floor(model: Any, batch: dict[str, Tensor]) -> Step:
    """The step of a frozen base without an adapter."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return backward(lambda: model(inputs_embeds=embedded, labels=batch["labels"]), [embedded])


def backward(forward: Callable[[], Any], parameters: Sequence[Tensor]) -> Step:
    """The step that PyTorch users write: forward, `loss.backward()`, gradients in `.grad`."""

    def step() -> tuple[Tensor, list[Tensor]]:
        for parameter in parameters:
            parameter.grad = None
        output = forward()
        output.loss.backward()
        return output.logits.detach(), [parameter.grad for parameter in parameters if parameter.grad is not None]

    return step


def forwards(given: Setting) -> dict[str, Step]:
    """A forward of each kind, without gradients."""
    base, theirs, adapter, batch = given
    ids, bound = batch["input_ids"], pf.bind(base, adapter)

    def of(run: Callable[..., Any]) -> Step:
        return torch.no_grad()(lambda: (run(input_ids=ids).logits, []))

    return {
        FLOOR: of(base),
        PEFT: of(theirs),
        "bind": of(bound),
        "apply": of(lambda input_ids: pf.apply(base, adapter, {"input_ids": input_ids})),
    }


def check(cases: dict[str, Step], plain: Step, theirs: Any) -> None:
    """Stop if a case does not compute what peft does; `plain` is what the floor does, run in peft's model."""
    with our_dropout(theirs):
        expected = _seeded(cases[PEFT])
    with theirs.disable_adapter():
        bare = _seeded(plain)
    for name, case in cases.items():
        if name == PEFT:
            continue
        (logits, grads), (their_logits, their_grads) = _seeded(case), bare if name == FLOOR else expected
        for ours, reference in zip([logits, *grads], [their_logits, *their_grads], strict=True):
            apart = float((ours - reference).abs().max() / reference.abs().max())
            if not apart <= TOLERANCE[logits.dtype]:
                raise SystemExit(f"{name} is not what peft computes: {apart:.1e} of the largest value apart")


def _seeded(step: Step) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)  # the same dropout for everyone
    logits, grads = step()
    return logits.clone(), [grad.clone() for grad in grads]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a training step of peftfn, of peft, and of the base alone.")
    parser.add_argument("--quick", action="store_true", help="a smaller model; nothing is written without --output")
    parser.add_argument("--threads", type=int, default=1, help="threads (1); with one, CPU time is measured")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each case (9)")
    parser.add_argument("--output", type=Path, help="folder for the JSON and the picture (results, beside this file)")
    given = parser.parse_args()
    if given.repeats < 2:
        parser.error(f"--repeats {given.repeats}: quartiles need 2 or more")
    return given


def main() -> None:
    given = arguments()
    clock = pin(given.threads)
    sizes = QUICK if given.quick else FULL
    rows: list[Row] = []
    for dtype, dropout in itertools.product((torch.float32, torch.bfloat16), (0.0, 0.1)):
        made = build(sizes, dropout, training=True, dtype=dtype)
        cases = steps(made)
        check(cases, floor(made.theirs, made.batch), made.theirs)
        name = {torch.float32: "float32", torch.bfloat16: "bfloat16 base"}[dtype]
        group = f"training step, {name}, dropout {dropout:g}"
        rows += shown(measure(group, cases, clock, sizes._asdict(), repeats=given.repeats))
    made = build(DEEP, 0.0, training=False)
    cases = forwards(made)
    check(cases, cases[PEFT], made.theirs)
    rows += shown(measure("forward of one token", cases, clock, DEEP._asdict(), repeats=3 * given.repeats, calls=5))
    folder = given.output or (None if given.quick else RESULTS)
    if folder is not None:
        report(rows, folder, given.threads)


def shown(rows: list[Row]) -> list[Row]:
    """The same rows, after printing them: the next group takes a minute or two."""
    print(table(rows), end="\n\n", flush=True)
    return rows


def report(rows: Sequence[Row], folder: Path, threads: int) -> None:
    """Write the JSON and the picture."""
    place, used = machine(threads), versions("torch", "transformers", "peft", "peftfn")
    write(rows, folder / "training_step.json", machine=place, versions=used)
    on = f"{place['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    draw(rows, folder / "training_step.png", f"{on}, torch {used['torch']}, peft {used['peft']}")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
