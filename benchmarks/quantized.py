"""A training step on a base in bitsandbytes' formats: its time, and what it saves for the backward pass.

The same Llama of random weights as in training_step.py, its linear layers packed, LoRA on all of them. Saved is every
tensor that autograd keeps and that is not the base's own, each storage once, as `saved_tensors_hooks` show it;
bitsandbytes keeps the inputs of its 8-bit layers where no hook sees them, so only its 4-bit ones are compared.

    python benchmarks/quantized.py --quick
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import bitsandbytes
import peft
import torch
from lib.harness import FLOOR, PEFT, Row, begin, keep, timed
from lib.setting import FULL, LINEAR, QUICK, Setting, Sizes, llama, our_dropout, trained
from saved import Kept, compared, saved
from torch import Tensor, nn
from training_step import Step, backward, floor

import peftfn as pf

# Gradients of a bfloat16 base are sums of rounded numbers, taken in another order in each library; measured: 0.02.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}
KINDS = {"nf4": (torch.bfloat16, torch.float32), "8-bit": (torch.float32,)}


def pack(model: Any, kind: str, dtype: torch.dtype) -> Any:
    """The model with its linear layers packed, in place."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.endswith(LINEAR):
            sizes = (layer.in_features, layer.out_features, False)
            made: Any = (
                bitsandbytes.nn.LinearNF4(*sizes, compute_dtype=dtype)
                if kind == "nf4"
                else bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            )
            made.load_state_dict(layer.state_dict())
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, made.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "8-bit"  # peft asks
    return model.to(dtype).train()


def build(sizes: Sizes, kind: str, dtype: torch.dtype, dropout: float) -> Setting:
    """A packed base for each library, and an adapter."""
    base, other = (pack(llama(sizes), kind, dtype) for _ in range(2))
    config = pf.LoraConfig(r=sizes.r, target_modules=LINEAR, lora_dropout=dropout, task_type="CAUSAL_LM")
    noise = torch.Generator().manual_seed(1)
    adapter = trained(base, config, noise)
    with tempfile.TemporaryDirectory() as folder:
        pf.save(adapter, folder)
        theirs: Any = peft.PeftModel.from_pretrained(other, folder, is_trainable=True)
    ids = torch.randint(0, base.config.vocab_size, (sizes.rows, sizes.tokens), generator=noise)
    return Setting(base, theirs.train(), adapter, {"input_ids": ids, "labels": ids})


def steps(given: Setting, bare: Any) -> dict[str, Step]:
    """A training step of each kind; `bare` is another copy of the base."""
    base, theirs, adapter, batch = given
    paths = [(path, name) for path, leaf in adapter.params.items() for name in leaf]
    leaves = [theirs.get_parameter(f"base_model.model.{path}.{name}.default.weight") for path, name in paths]

    def functional() -> tuple[Tensor, list[Tensor]]:
        def loss(params: Any) -> tuple[Tensor, Tensor]:
            output = pf.apply(base, adapter.replace(params=params), batch)
            return output.loss, output.logits

        grads, logits = torch.func.grad(loss, has_aux=True)(adapter.params)
        return logits, [grads[path][name] for path, name in paths]

    own = adapter.replace(
        params={path: {n: t.clone() for n, t in leaf.items()} for path, leaf in adapter.params.items()}
    )
    return {
        FLOOR: floor(bare, batch),
        PEFT: backward(lambda: theirs(**batch), leaves),
        "apply + backward": backward(lambda: pf.apply(base, own, batch), pf.leaves(own)),
        "torch.func.grad": functional,
    }


def check(cases: dict[str, Step], theirs: Any, tolerance: float) -> None:
    """Stop if a case does not compute what peft does."""
    torch.manual_seed(0)
    with our_dropout(theirs):
        logits, grads = cases[PEFT]()
    expected = [logits.clone(), *(grad.clone() for grad in grads)]
    for name in cases.keys() - {FLOOR, PEFT}:
        torch.manual_seed(0)  # the same dropout
        logits, grads = cases[name]()
        for ours, reference in zip([logits, *grads], expected, strict=True):
            apart = float((ours - reference).abs().max() / reference.abs().max())
            if not apart <= tolerance:
                raise SystemExit(f"{name} is not what peft computes: {apart:.1e} of the largest value apart")


def main() -> None:
    run = begin("Time a training step on packed bases, and count what it saves.", devices=("cpu",))
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    sizes = QUICK if run.quick else FULL
    rows: list[Row] = []
    kept: list[Kept] = []
    rates = (0.1,) if run.quick else (0.0, 0.1)
    for kind, dtype, dropout in [(k, d, p) for k, types in KINDS.items() for d in types for p in rates]:
        made = build(sizes, kind, dtype, dropout)
        bare = pack(llama(sizes), kind, dtype).requires_grad_(False)
        cases = steps(made, bare)
        check(cases, made.theirs, TOLERANCE[dtype])
        group = f"{kind}, {str(dtype).removeprefix('torch.')}, dropout {dropout:g}"
        rows += timed(run, f"training step, {group}", cases, sizes._asdict())
        if kind == "nf4":
            leaves = pf.leaves(made.adapter)
            step = backward(lambda: pf.apply(made.base, made.adapter, made.batch), leaves)  # noqa: B023  # called at once
            counts = saved(step, made.base, leaves), saved(cases[PEFT], made.theirs, []), saved(cases[FLOOR], bare, [])
            kept += compared(f"kept, {group}", *counts, sizes)
    keep(run, "quantized", rows, ("peftfn", "bitsandbytes"))
    keep(run, "quantized_saved", kept, ("peftfn", "bitsandbytes"), unit="× what the base alone keeps")


if __name__ == "__main__":
    main()
