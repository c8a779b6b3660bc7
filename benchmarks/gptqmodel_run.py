"""One run with GPTQModel: it quantizes the first layers of SmolLM2-135M on real text, and peftfn goes on from there.

Outputs and gradients are held against peft on another copy of the quantized model, merged weights against the layers'
own. `make gptqmodel` writes benchmarks/results/gptqmodel.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it asks for two of its own, and makes one on two cores
os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # it compiles how each of its layers is unpacked, for minutes on a CPU

import peft
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from smollm2 import batches, load, measure
from torch import Tensor
from tqdm import tqdm

import peftfn as pf

FILE = Path(__file__).parent / "results" / "gptqmodel.md"
SETTINGS: dict[str, Any] = {"bits": 4, "group_size": 64, "desc_act": True, "sym": False}
CALIBRATION = 64
TARGETS = ["q_proj", "v_proj", "down_proj"]
VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("gptqmodel", "torch", "transformers", "peft"))
LOADS = {"its own choice": BACKEND.AUTO, "BACKEND.GPTQ_TORCH": BACKEND.GPTQ_TORCH}


def start(layers: int, folder: Path) -> tuple[Any, Any]:
    """The first layers of the model, written to a folder, and its tokenizer."""
    whole, tokenizer = load()
    config = type(whole.config)(**{**whole.config.to_dict(), "num_hidden_layers": layers, "quantization_config": None})
    del config.quantization_config  # of the file that it came in
    model = type(whole)(config).eval()
    model.load_state_dict(whole.state_dict(), strict=False)  # without the other layers
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def quantize(source: Path, folder: Path, text: list[dict[str, Tensor]]) -> None:
    rows = [row.tolist() for batch in text for row in batch["input_ids"]]
    model = GPTQModel.load(str(source), QuantizeConfig(**SETTINGS), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
    model.save(str(folder))


def described(base: Any) -> str:
    layer = base.model.layers[0].self_attn.q_proj
    try:
        shape = tuple(pf.init(base, pf.LoraConfig(target_modules=TARGETS)).params["model.layers.0.self_attn.q_proj"])
    except ValueError as error:
        return f"`{type(layer).__name__}`: refused: {error}"
    return f"`{type(layer).__name__}`: read, {len(shape)} tensors a site"


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def against_peft(base: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    """How far outputs and gradients are from peft's, of the largest value."""
    config = pf.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    adapter = pf.init(base, config)
    noise = torch.Generator().manual_seed(0)
    for leaf in adapter.params.values():
        leaf["lora_B"].normal_(0, 0.02, generator=noise)
    with tempfile.TemporaryDirectory() as folder:
        pf.save(adapter, folder)
        theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()
    pf.leaves(adapter)
    ours, expected = pf.apply(base, adapter, batch), theirs(**batch)
    leaves = {(path, name): one for path, leaf in adapter.params.items() for name, one in leaf.items()}
    grads = torch.autograd.grad(ours.loss, list(leaves.values()))
    names = [theirs.get_parameter(f"base_model.model.{path}.{name}.default.weight") for path, name in leaves]
    others = torch.autograd.grad(expected.loss, names)
    most = max(float(one.abs().max()) for one in others)
    apart = max(float((one - other).abs().max()) for one, other in zip(grads, others, strict=True))
    return {"outputs": distance(ours.logits, expected.logits), "gradients": apart / most}


def merged(base: Any) -> dict[str, str]:
    """How far merged weights are from the layers' own, and whether they come back when they are packed again."""
    adapter = pf.init(base, pf.LoraConfig(r=8, target_modules=TARGETS))  # that changes nothing yet
    state = base.state_dict()
    dense = pf.merge(state, adapter, model=base)
    again = pf.merge(state, adapter, model=base, requantize=True)
    own = {path: base.get_submodule(path).dequantize_weight().T for path in adapter.params}
    far = max(distance(dense[f"{path}.weight"], own[path]) for path in own)
    changed = sum(not again[name].equal(state[name]) for name in state)
    return {
        "merged weights, apart from the layers' own": f"{far:.1e}",
        "merged without a change and packed again": f"{changed} of {len(state)} entries are other ones",
    }


def trained(base: Any, text: list[dict[str, Tensor]]) -> pf.Adapter:
    adapter = pf.init(base, pf.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(pf.leaves(adapter), lr=2e-3)
    for batch in tqdm(text, desc="training", leave=False):
        pf.apply(base, adapter, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # GPTQModel writes its log where it runs
        plain, tokenizer = start(given.layers, Path(place, "plain"))
        text, held_out = batches(tokenizer, given.steps + CALIBRATION // 2)
        quantize(Path(place, "plain"), Path(place, "packed"), text[given.steps :])
        loaded = {
            name: GPTQModel.load(f"{place}/packed", device="cpu", backend=one).model.eval()
            for name, one in LOADS.items()
        }
        os.chdir(FILE.parent.parent)
    base = loaded["BACKEND.GPTQ_TORCH"]
    facts = {f"loaded with {name}": described(one) for name, one in loaded.items()}
    facts |= measured(base, plain, text[: given.steps], held_out)
    about = (
        f"GPTQModel quantizes the first {given.layers} layers of SmolLM2-135M on a CPU, on {CALIBRATION} rows of "
        f"Python's documentation topics: {SETTINGS}. Versions: {VERSIONS}. `make gptqmodel` writes this file."
    )
    lines = [about, "", "| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items())]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def measured(base: Any, plain: Any, text: list[dict[str, Tensor]], held_out: dict[str, Tensor]) -> dict[str, str]:
    own, nothing = base(**held_out), pf.init(plain, pf.LoraConfig(target_modules=TARGETS))
    same = pf.apply(base, (), held_out).logits.equal(own.logits)
    facts = {
        "dtype": str(own.logits.dtype).removeprefix("torch."),
        "`apply(base, (), batch)` is the model's own output": "bit for bit" if same else "NOT bit for bit",
    }
    facts |= {f"{name}, apart from peft's": f"{far:.1e}" for name, far in against_peft(base, held_out).items()}
    facts |= merged(base)
    return facts | {
        "loss on other rows, before quantization": f"{measure(plain, nothing, held_out):.3f}",
        "quantized": f"{float(own.loss):.3f}",
        f"after {len(text)} steps of LoRA": f"{measure(base, trained(base, text), held_out):.3f}",
    }


if __name__ == "__main__":
    main()
