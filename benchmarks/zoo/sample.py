"""A sample of the zoo for every change: one class for each family and mechanism, held against the kept table."""

from __future__ import annotations

from typing import Any

from zoo import table
from zoo.verdicts import CRASH, NOT_APPLICABLE, REFUSED, RIGHT, WRONG

SAMPLE = {
    "LlamaForCausalLM": "a decoder with grouped keys",
    "GPT2LMHeadModel": "transposed layers, fused projections",
    "OPTForCausalLM": "positions from the mask",
    "MixtralForCausalLM": "experts in bare parameters",
    "GptOssForCausalLM": "experts with biases, stored the other way",
    "DeepseekV3ForCausalLM": "latent attention",
    "MambaForCausalLM": "weights read past a layer's forward, a state instead of a cache",
    "JambaForCausalLM": "a hybrid",
    "Gemma2ForCausalLM": "sliding windows, scaled embeddings",
    "RobertaForCausalLM": "positions from the tokens",
    "T5ForConditionalGeneration": "an encoder and a decoder with relative positions",
    "BartForConditionalGeneration": "an encoder and a decoder that count positions",
    "LlamaForSequenceClassification": "a classifier of the last token",
    "BertForSequenceClassification": "an encoder",
    "AlbertForSequenceClassification": "one layer used many times",
    "XLNetForSequenceClassification": "tokens before rows",
    "ViTForImageClassification": "pictures",
    "SwinForImageClassification": "windows",
    "ResNetForImageClassification": "convolutions alone",
    "Wav2Vec2ForSequenceClassification": "sound",
    "WavLMForCTC": "projections read past their layers",
    "WhisperForConditionalGeneration": "sound to text",
    "LlavaForConditionalGeneration": "a picture among words",
    "Qwen2VLForConditionalGeneration": "a picture as its patches",
    "DetrForObjectDetection": "queries",
    "SegformerForSemanticSegmentation": "a picture out",
}
RANK = {RIGHT: 0, NOT_APPLICABLE: 1, REFUSED: 2, CRASH: 3, WRONG: 4}


def worse(found: table.Found, version: str) -> int:
    """1 where a verdict is worse than the kept one, else 0; both ways are printed."""
    against = version if version in table.versions() else table.versions()[0]
    kept = table.read(against)
    changes: dict[str, list[str]] = {"worse": [], "better": []}
    for name, checks in found.items():
        for check, one in checks.items():
            before = kept.get(name, {}).get(check)
            if before is not None and one["verdict"] != before["verdict"]:
                is_worse = RANK[one["verdict"]] > RANK[before["verdict"]]
                changes["worse" if is_worse else "better"].append(_line(name, check, before, one))
    count = sum(len(checks) for checks in found.values())
    print(f"{count} checks on {len(found)} classes, against the table of transformers {against}:")
    for title, lines in changes.items():
        print(f"  {len(lines)} {title}", *lines, sep="\n    ")
    if changes["better"]:
        print("  keep what is better: make zoo ARGS='--only ...'")
    return int(bool(changes["worse"]))


def _line(name: str, check: str, before: Any, now: Any) -> str:
    return f"{name} {check}: {before['verdict']} -> {now['verdict']} {now['reason'][:200]} {now['numbers'] or ''}"
