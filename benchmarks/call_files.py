"""How many files of peftfn a call runs through: a warm `apply` with its backward pass, and `load` with the model.

    python benchmarks/call_files.py [--functions]

A reader who follows a call opens as many files. Python's profiler (`sys.setprofile`) notes each function that runs.
"""

from __future__ import annotations

import argparse
import collections
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

ROOT = Path(pf.__file__).parent
MOST = {"apply and backward": 14, "load with the model": 15}


def files_of(call: Callable[[], Any]) -> dict[str, collections.Counter[str]]:
    """The files of peftfn that a call runs through, in order, with how often each of their functions was called."""
    found: dict[str, collections.Counter[str]] = {}

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and ROOT in path.parents:
            found.setdefault(path.relative_to(ROOT).as_posix(), collections.Counter())[frame.f_code.co_qualname] += 1

    call()  # once before: what is remembered is remembered then
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def step(model: torch.nn.Module, adapter: pf.Adapter, batch: dict[str, torch.Tensor]) -> None:
    """One `apply` and its backward pass."""
    pf.apply(model, adapter, batch).loss.backward()


def main() -> None:
    """Print the counts beside the goals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", action="store_true", help="show which functions of each file")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)).eval()
    adapter = pf.init(model, pf.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    pf.leaves(adapter)
    ids = torch.randint(0, 64, (2, 8))
    with tempfile.TemporaryDirectory() as folder:
        pf.save(adapter, folder)
        calls: dict[str, Callable[[], Any]] = {
            "apply and backward": functools.partial(step, model, adapter, {"input_ids": ids, "labels": ids}),
            "load with the model": functools.partial(pf.load, folder, model),
        }
        for name, call in calls.items():
            found = files_of(call)
            print(f"{name}: {len(found)} files (goal: at most {MOST[name]})")
            for path, functions in found.items():
                print(f"    {path}", *([dict(functions)] if given.functions else []))


if __name__ == "__main__":
    main()
