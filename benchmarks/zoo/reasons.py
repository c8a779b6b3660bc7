"""Why a case does not hold: by hand, for classes, checks and what was said. The first rule that fits is the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

UNEXPLAINED = "unexplained"


class Rule(NamedTuple):
    """A reason, and of what: expressions for names of checks, classes, verdicts, and for part of what was said."""

    reason: str
    check: str = ".*"
    said: str = ""
    classes: str = ".*"
    verdict: str = "wrong|crash|refused"
    beside: bool = False
    """Whether it may have been said of another check of the class, which then has the same cause."""


LAYERS = "lora|default|ia3|convolutions|experts|bind|merge|load|save|grad|vmap|rows|generate"

RULES: list[Rule] = [
    Rule(
        "peftfn: the base reads an adapted layer's weight itself, its forward does not run (FAULTS: lost_sites)",
        check=LAYERS,
        said="the base reads past",
        verdict="wrong",
        beside=True,
    ),
    Rule(
        "peftfn: peft turns `all-linear` into the experts' bare parameters, peftfn finds other layers or cannot read "
        "the file (FAULTS: moe_all_linear)",
        check="sites|load|default",
        said=r"experts|adapted parameters of",
    ),
    Rule(
        "peftfn: a prefix is put into a cache whose layers hold a state and no keys (FAULTS, 8: hybrids)",
        check="prefix.*",
        said="LinearAttentionLayer|has no attribute 'update'",
    ),
    Rule(
        "peftfn: the forward argument is called `cache` in transformers 5.24 (FAULTS: newest_prefix_init)",
        check="prefix.*",
        said="takes no past_key_values",
        verdict="refused",
    ),
    Rule(
        "peftfn: states are written in place into a cache that nobody asked for (FAULTS: vmap_cache)",
        check="vmap",
        said="runs with use_cache=False",
    ),
    Rule(
        "peftfn: the first axis of a layer's input is not the rows (FAULTS: rows_sequence_first, rows_experts)",
        check="rows",
        said="expected one index for each row",
        verdict="refused",
    ),
    Rule("the model's own: it takes no embedded tokens", check="prompt.*", said="takes no inputs_embeds"),
    Rule(
        "the model's own: it looks its tokens up again, and takes no embedded ones that are none",
        check="prompt.*",
        said="tried to call `forward` from `inputs_embeds` without providing `input_ids`",
    ),
    Rule(
        "peftfn: no rule says what a prompt gets there", check="prompt.*", said="it is not known what a prompt's tokens"
    ),
    Rule(
        "the model's own: its layers have keys of unlike shapes, which one prefix does not fit",
        check="prefix.*",
        said="keys of unlike shapes",
    ),
    Rule("peftfn: a prompt asks for a size that it does not use", check="prompt.*", said="has no config that says it"),
    Rule("peft's: (IA)³ acts on no such layer there either", check="ia3", said="in peft neither"),
]


def explained(name: str, check: str, checks: Mapping[str, Mapping[str, Any]]) -> str:
    """The reason of a finding, or that it has none yet.

    Args:
        name: the class.
        check: what was found not right.
        checks: all findings on the class.
    """
    for rule in RULES:
        said = [one["reason"] for one in checks.values()] if rule.beside else [checks[check]["reason"]]
        if (
            re.fullmatch(rule.classes, name)
            and re.fullmatch(rule.check, check)
            and re.fullmatch(rule.verdict, checks[check]["verdict"])
            and any(re.search(rule.said, one) for one in said)
        ):
            return rule.reason
    return UNEXPLAINED
