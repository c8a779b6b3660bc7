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
    Rule(
        "peftfn: a size is asked of the configuration under names that this one does not have",
        check="prompt.*|prefix.*",
        said="has no config that says it",
    ),
    Rule(
        "peftfn: a convolution whose class has a forward of its own (FAULTS: subclass_forward)",
        check="convolutions",
        verdict="crash|wrong",
    ),
    Rule(
        "peftfn: the model changes what a layer put out in place (FAULTS: inplace_relu)",
        said="is being modified inplace|modified by an inplace operation",
    ),
    Rule(
        "peftfn: a tied weight has one name in named_parameters(), and an adapter of its other end finds none "
        "(FAULTS: tied_merge)",
        check="merge",
        said="params has no",
    ),
    Rule(
        "peftfn: in generate the prompt goes in again at every step, where the cache's argument is not called "
        "past_key_values (FAULTS: newest_prompt_generate)",
        check="prompt_generate",
        verdict="wrong",
    ),
    Rule(
        "peftfn: peft reads the file's target modules as experts (FAULTS: moe_all_linear)",
        check="save",
        said="missing adapter keys.*experts",
    ),
    Rule(
        "peftfn: rows of unlike length are made with masked places, which this model counts or reads "
        "(FAULTS: rows_own_positions)",
        check="prompt_rows|prefix_rows",
        said="does not ignore masked places",
        verdict="wrong",
    ),
    Rule(
        "refused with its reason: rows of unlike length, on a model that counts positions in a way of its own",
        check="prompt_rows|prefix_rows",
        said="counts positions in a way of its own",
    ),
    Rule(
        "peftfn: a prefix's keys have the sizes that the configuration names, the layers' keys others",
        check="prefix.*",
        said="Sizes of tensors must match|size of tensor",
        verdict="crash",
    ),
    Rule(
        "peftfn: a prefix on a decoder that counts positions from its padding token (FAULTS, 3: RoBERTa-like)",
        check="prefix.*",
        classes="(XLMRoberta(XL)?|Roberta(PreLayerNorm)?|Camembert|Data2VecText|Xmod|Longformer)ForCausalLM",
        verdict="wrong",
    ),
    Rule(
        "peftfn: the model has an embedding for each of its codebooks, and a prompt takes them for one",
        said="ModuleList\\] is missing the required",
    ),
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
