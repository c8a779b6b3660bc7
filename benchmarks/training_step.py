"""A training step, and a forward of one token: peftfn, peft and the frozen base, in one process.

The base is a Llama of random weights with LoRA on all its linear layers. "base alone" is the floor of any method that
leaves the base's weights alone: the frozen base, forward and backward down to the embedding's output, with no adapter
in it. Before a case is timed its output and its gradients are held against peft's, on the same adapter and with the
same dropout.

    python benchmarks/training_step.py --quick
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import peft
import torch
from harness import FLOOR, PEFT, Row, draw, machine, measure, pin, table, versions, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

Step = Callable[[], tuple[Tensor, list[Tensor]]]
"""Runs once and returns the logits and the gradients (of the adapter; of the embedding's output for the floor)."""

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 2048  # small: the layers are what adapters act on
TOLERANCE = 1e-4  # of the largest value: float32 sums in another order
RESULTS = Path(__file__).parent / "results"


class Sizes(NamedTuple):
    """A model and a batch."""

    layers: int
    hidden: int
    intermediate: int
    rows: int
    tokens: int
    r: int = 16


FULL = Sizes(layers=4, hidden=640, intermediate=1708, rows=8, tokens=128)
QUICK = Sizes(layers=4, hidden=384, intermediate=1024, rows=4, tokens=64)
DEEP = Sizes(layers=16, hidden=384, intermediate=1024, rows=1, tokens=1)  # 112 sites


class Setting(NamedTuple):
    """One adapter on one base, in both libraries."""

    base: Any
    theirs: Any
    adapter: pf.Adapter
    batch: dict[str, Tensor]


def llama(sizes: Sizes) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def setting(sizes: Sizes, dropout: float, *, training: bool) -> Setting:
    """A base in training or evaluation mode, and an adapter as it is after some training: no tensor is zero."""
    base = llama(sizes).train(training)
    adapter = pf.init(
        base, pf.LoraConfig(r=sizes.r, target_modules=LINEAR, lora_dropout=dropout, task_type="CAUSAL_LM")
    )
    noise = torch.Generator().manual_seed(1)
    for leaf in adapter.params.values():
        leaf["lora_B"].normal_(0, 0.02, generator=noise)
    with tempfile.TemporaryDirectory() as folder:
        pf.save(adapter, folder)
        theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
    ids = torch.randint(0, VOCABULARY, (sizes.rows, sizes.tokens), generator=noise)
    return Setting(base, theirs.train(training), adapter, {"input_ids": ids, "labels": ids})


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
        "apply": of(lambda **arguments: pf.apply(base, adapter, arguments)),
    }


def check(cases: dict[str, Step], plain: Step, theirs: Any) -> None:
    """Stop if a case does not compute what peft does; `plain` is what the floor does, run in peft's model."""
    expected = _seeded(cases[PEFT])
    with theirs.disable_adapter():
        bare = _seeded(plain)
    for name, case in cases.items():
        (logits, grads), (their_logits, their_grads) = _seeded(case), bare if name == FLOOR else expected
        for ours, reference in zip([logits, *grads], [their_logits, *their_grads], strict=True):
            apart = float((ours - reference).abs().max() / reference.abs().max())
            if not apart <= TOLERANCE:
                raise SystemExit(f"{name} is not what peft computes: {apart:.1e} of the largest value apart")


def _seeded(step: Step) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)  # the same dropout for everyone
    logits, grads = step()
    return logits.clone(), [grad.clone() for grad in grads]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a training step of peftfn, of peft, and of the base alone.")
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model; written nowhere unless --output is given"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads (1); with one, CPU time is measured")
    parser.add_argument("--repeats", type=int, help="samples of each case (15, or 9 with --quick)")
    parser.add_argument(
        "--output", type=Path, help=f"folder for the JSON and the picture ({RESULTS.name}/ beside this file)"
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    clock = pin(given.threads)
    sizes = QUICK if given.quick else FULL
    repeats = given.repeats or (9 if given.quick else 15)
    rows: list[Row] = []
    for dropout in (0.0, 0.1):
        made = setting(sizes, dropout, training=True)
        cases = steps(made)
        check(cases, floor(made.theirs, made.batch), made.theirs)
        rows += measure(f"training step, dropout {dropout:g}", cases, clock, repeats=repeats)
    made = setting(DEEP, 0.0, training=False)
    cases = forwards(made)
    check(cases, cases[PEFT], made.theirs)
    rows += measure("forward of one token", cases, clock, repeats=3 * repeats, calls=5)
    print(table(rows))
    report(rows, given, sizes)


def report(rows: Sequence[Row], given: argparse.Namespace, sizes: Sizes) -> None:
    """Write the JSON and the picture."""
    folder = given.output or (None if given.quick else RESULTS)
    if folder is None:
        return
    place = machine(given.threads)
    used = versions("torch", "transformers", "peft", "peftfn")
    shapes = {"training step": sizes._asdict(), "forward of one token": DEEP._asdict()}
    write(rows, folder / "training_step.json", machine=place, versions=used, sizes=shapes)
    title = f"{place['cpu']}, {given.threads} thread(s), torch {used['torch']}, peft {used['peft']}"
    draw(rows, folder / "training_step.png", title)
    print(f"\nwritten to {folder}")


if __name__ == "__main__":
    main()
