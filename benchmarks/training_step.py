"""A training step, and a forward of one token: peftfn, peft and the frozen base, in one process.

The base is a Llama of random weights with LoRA on all its linear layers. "base alone" is the floor of any method that
leaves the base's weights alone: the frozen base, forward and backward down to the embedding's output, with no adapter
in it. Before a case is timed its output and its gradients are held against peft's, on the same adapter, with the values
dropped that peftfn drops.

    python benchmarks/training_step.py --quick
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lib.harness import FLOOR, PEFT, Row, begin, keep, timed
from lib.records import BESIDE, FUNCTIONAL_FLOOR
from lib.setting import DEEP, FULL, QUICK, Setting, build, our_dropout
from torch import Tensor

import peftfn as pf

Step = Callable[[], tuple[Tensor, list[Tensor]]]
"""Runs once and returns the logits and the gradients (of the adapter; of the embedding's output for the floor)."""

# Of the largest value: sums in another order. In bfloat16 each library rounds them at other places; measured: 0.02.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16 base"}


def steps(given: Setting) -> dict[str, Step]:
    """A training step of each kind."""
    base, theirs, adapter, batch = given
    paths = [(path, name) for path, leaf in adapter.params.items() for name in leaf]
    their_leaves = [theirs.get_parameter(f"base_model.model.{path}.{name}.0.weight") for path, name in paths]
    own = adapter.replace(params={path: dict(leaf) for path, leaf in copy.deepcopy(adapter.params).items()})
    bound = pf.bind(base, copy.deepcopy(adapter))
    bound_leaves = [bound.get_parameter(f"{path}.{name}") for path, name in paths]

    def functional() -> tuple[Tensor, list[Tensor]]:
        def loss(params: Any) -> tuple[Tensor, Tensor]:
            output = pf.apply(base, adapter.replace(params=params), batch)
            return output.loss, output.logits

        grads, logits = torch.func.grad(loss, has_aux=True)(adapter.params)
        return logits, [grads[path][name] for path, name in paths]

    frozen = copy.deepcopy(base).requires_grad_(False)
    return {
        FLOOR: floor(frozen, batch),
        FUNCTIONAL_FLOOR: functional_floor(frozen, batch),
        PEFT: backward(lambda: theirs(**batch), their_leaves),
        "apply + backward": backward(lambda: pf.apply(base, own, batch), pf.leaves(own)),
        "bind + backward": backward(lambda: bound(**batch), bound_leaves),
        "torch.func.grad": functional,
    }


def floor(model: Any, batch: dict[str, Tensor]) -> Step:
    """The step of a frozen base without an adapter."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    return backward(lambda: model(inputs_embeds=embedded, labels=batch["labels"]), [embedded])


def functional_floor(model: Any, batch: dict[str, Tensor]) -> Step:
    """The same through `torch.func.grad`."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()

    def loss(embedded: Tensor) -> tuple[Tensor, Tensor]:
        output = model(inputs_embeds=embedded, labels=batch["labels"])
        return output.loss, output.logits

    def step() -> tuple[Tensor, list[Tensor]]:
        gradient, logits = torch.func.grad(loss, has_aux=True)(embedded)
        return logits, [gradient]

    return step


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
        (logits, grads), (their_logits, their_grads) = _seeded(case), bare if name in BESIDE else expected
        for ours, reference in zip([logits, *grads], [their_logits, *their_grads], strict=True):
            apart = float((ours - reference).abs().max() / reference.abs().max())
            if not apart <= TOLERANCE[logits.dtype]:
                raise SystemExit(f"{name} is not what peft computes: {apart:.1e} of the largest value apart")


def _seeded(step: Step) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)  # the same dropout for everyone
    logits, grads = step()
    return logits.clone(), [grad.clone() for grad in grads]


def group_of(dtype: torch.dtype, dropout: float) -> str:
    """What a training step of these is called in every table."""
    return f"{NAMES[dtype]}, dropout {dropout:g}"


def main() -> None:
    run = begin("Time a training step, and a forward of one token.", repeats=15)  # an excess is 6 % of a step
    sizes = QUICK if run.quick else FULL
    rows: list[Row] = []
    for dtype, dropout in itertools.product(NAMES, (0.0, 0.1)):
        made = build(sizes, dropout, training=True, dtype=dtype, device=run.device)
        cases = steps(made)
        check(cases, floor(made.theirs, made.batch), made.theirs)
        rows += timed(run, f"training step, {group_of(dtype, dropout)}", cases, sizes._asdict())
    made = build(DEEP, 0.0, training=False, device=run.device)
    cases = forwards(made)
    check(cases, cases[PEFT], made.theirs)
    rows += timed(run, "forward of one token", cases, DEEP._asdict(), repeats=2 * run.repeats, calls=5)
    keep(run, "training_step", rows)


if __name__ == "__main__":
    main()
