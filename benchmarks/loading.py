"""Time from an adapter's files to the first adapted output of a base that is loaded, beside peft's; 224 sites.

Both start from the same folder and the same fresh copy of the base, one token; the outputs are compared first.
CPU time, in turns: `python benchmarks/loading.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import peft
import torch
from lib import harness
from lib.records import RESULTS, quartiles, save
from lib.setting import LINEAR
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf


def base(layers: int, hidden: int) -> LlamaForCausalLM:
    """A Llama with seven sites in each layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=256,
    )
    return LlamaForCausalLM(config).eval()


def timed(run: Callable[[Any], Any], model: Any) -> tuple[float, torch.Tensor]:
    """CPU seconds, and the logits."""
    fresh = copy.deepcopy(model)
    start = time.process_time()
    with torch.no_grad():
        logits = run(fresh)
    return time.process_time() - start, logits


def main() -> None:
    """Compare, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="once: to see that it runs")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model, tokens = base(32, 256), torch.tensor([[1]])
    config = pf.LoraConfig(r=16, target_modules=list(LINEAR), init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = pf.init(model, config)
    with tempfile.TemporaryDirectory() as folder:
        pf.save(adapter, folder)
        cases: dict[str, Callable[[Any], torch.Tensor]] = {
            "peftfn": lambda fresh: pf.apply(fresh, pf.load(folder), {"input_ids": tokens}).logits,
            "peft": lambda fresh: peft.PeftModel.from_pretrained(fresh, folder)(input_ids=tokens).logits,
        }
        found = {name: timed(run, model)[1] for name, run in cases.items()}
        torch.testing.assert_close(found["peftfn"], found["peft"], atol=1e-4, rtol=1e-4)
        repeats = 1 if chosen.quick else chosen.repeats
        rounds = [{name: timed(run, model)[0] for name, run in cases.items()} for _ in range(repeats)]
    rows = [
        {
            "group": f"files to first output, {len(adapter.params)} sites",
            "what": name,
            "ms": quartiles([1000 * one[name] for one in rounds]),
            "to_peft": quartiles([one[name] / one["peft"] for one in rounds]),
            "repeats": repeats,
        }
        for name in cases
    ]
    for row in rows:
        print(f"{row['group']}: {row['what']} {row['ms'].median:.1f} ms, to peft {row['to_peft'].median:.3f}")
    if not chosen.quick:
        about = {"machine": harness.machine(1), "versions": harness.versions("torch", "transformers", "peft")}
        save(rows, RESULTS / "loading.json", **about)


if __name__ == "__main__":
    main()
