"""The model card of an adapter."""

from __future__ import annotations

import re
from typing import Any

from peftfn.core.adapter import Adapter


def card(adapter: Adapter) -> str:
    """A model card: what the adapter is, what it goes with, and how to use it."""
    config: Any = adapter.config
    base = config.base_model_name_or_path
    hub_id = base if base and re.fullmatch(r"[\w.\-]+/[\w.\-]+", base) else None
    head = ["---", "library_name: peft", *([f"base_model: {hub_id}"] if hub_id else []), "tags:", "- peftfn", "---"]
    trained = sum(tensor.numel() for leaf in adapter.params.values() for tensor in leaf.values())
    facts = [f"Method: {config.peft_type}", f"sites: {len(adapter.params)}", f"trained parameters: {trained:,}"]
    if base:
        facts.append(f"base: `{base}`")
    use = [
        "```python",
        "import peftfn as pf",
        "",
        'adapter = pf.load("path/or/hub-id")',
        "output = pf.apply(model, adapter, batch)",
        "```",
        "",
        "It is in PEFT's format: `peft.PeftModel.from_pretrained(model, ...)` reads it too.",
    ]
    return "\n".join([*head, "", "# Adapter", "", "; ".join(facts) + ".", "", *use, ""])
