"""SmolLM2-135M, dense and in bitsandbytes' formats: the same training steps on real text, and what they take.

LoRA on all linear layers, on the text of smollm2.py. Each kind has a process of its own, whose peak is looked at from
the first step on: loading the model takes more than training it. Saved is what autograd keeps between a step's forward
and backward, as in quantized.py. `make smollm2-quantized` writes benchmarks/results/smollm2-quantized.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lib.setting import LINEAR
from lib.timing import peak
from quantized import pack, saved
from smollm2 import HELD_OUT, RESULTS, ROWS, TOKENS, batches, load, measure
from torch import Tensor
from tqdm import tqdm

import peftfn as pf

FILE = RESULTS.with_name("smollm2-quantized.md")
KINDS = ("dense", "nf4", "8-bit")
RATE = 2e-3
MB = 2**20


def parts(model: Any) -> int:
    """Bytes of the model's tensors, with the scales that its packed weights are read by."""
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        for one in (tensor, *(getattr(state, name, None) for name in ("absmax",)), getattr(tensor, "SCB", None)):
            if isinstance(one, Tensor):
                seen[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(seen.values())


def forget_the_peak() -> int:
    """What the process has in memory, once it has given back what was freed: Linux counts its peak from there on."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def run(kind: str, steps: int) -> dict[str, Any]:
    """Losses and bytes of one kind."""
    model, tokenizer = load()
    if kind != "dense":
        model = pack(model, kind, torch.float32)
    text, held_out = batches(tokenizer, steps)
    adapter = pf.init(model, pf.LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEAR), task_type="CAUSAL_LM"))
    before = measure(model.eval(), adapter, held_out)
    leaves = pf.leaves(adapter)
    optimizer = torch.optim.AdamW(leaves, lr=RATE)
    losses: list[float] = []
    model.train()
    start = forget_the_peak()
    for batch in tqdm(text, desc=kind, leave=False):
        loss = pf.apply(model, adapter, batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    most = peak()
    kept = saved(lambda: (pf.apply(model, adapter, text[0]).loss, []), model, leaves)
    after = measure(model.eval(), adapter, held_out)
    return {
        "before": before,
        "first": statistics.mean(losses[:5]),
        "last": statistics.mean(losses[-5:]),
        "after": after,
        "model": parts(model),
        "start": start,
        "peak": most,
        "saved": kept,
    }


def apart(kind: str, steps: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--kind", kind, "--steps", str(steps)]
    # What is freed goes back at once: glibc's heap would keep the holes that unpacked weights leave, 300 MiB of them.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)  # noqa: S603  # this file
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict[str, dict[str, Any]], steps: int) -> str:
    where = f"torch {torch.__version__.split('+')[0]}, {torch.get_num_threads()} threads, {platform.machine()}"
    about = (
        f"SmolLM2-135M in float32, its linear layers dense, in nf4 and in 8 bits; LoRA of rank 8 on all of them; "
        f"{steps} steps of {ROWS}×{TOKENS} tokens of Python's documentation topics, the same for each: the loss of the "
        f"first and the last five, and that on {HELD_OUT} other rows; {where}. In memory is the whole process, with "
        "Python and the libraries, and with MALLOC_MMAP_THRESHOLD_=65536, without which glibc keeps up to 300 MiB of "
        "holes: before the first step, and at most while it trains. Saved is what autograd keeps between forward and "
        "backward, without the base's own tensors. No times: see benchmarks/quantized.py. `make smollm2-quantized` "
        "writes this file."
    )
    lines = [
        about,
        "",
        "| base | loss before | first 5 | last 5 | loss after | model, MiB | before, MiB | peak, MiB | saved, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, one in found.items():
        losses = " | ".join(f"{one[name]:.3f}" for name in ("before", "first", "last", "after"))
        sizes = " | ".join(f"{one[name] / MB:.0f}" for name in ("model", "start", "peak", "saved"))
        lines.append(f"| {kind} | {losses} | {sizes} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kind", choices=KINDS, help="one kind, in this process; writes no file")
    given = parser.parse_args()
    if given.kind:
        print(json.dumps(run(given.kind, given.steps)))
        return
    found = {kind: apart(kind, given.steps) for kind in KINDS}
    text = report(found, given.steps)
    print(text)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text, encoding="utf-8")
    if not all(one["after"] < one["before"] for one in found.values()):
        raise SystemExit("a loss did not fall")


if __name__ == "__main__":
    main()
