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
        "peftfn: peft reads the file's target modules as experts (FAULTS: moe_all_linear)",
        check="save",
        said="missing adapter keys.*experts",
    ),
    Rule("peft's: (IA)³ acts on no such layer there either", check="ia3", said="in peft neither"),
    Rule(
        "refused with its reason: rows of unlike length, on a model that counts or reads masked places",
        check="prompt_rows|prefix_rows",
        said="places that a row does not use are masked|the mask that .* makes of its pictures",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: layers that keep a state, or something else than keys and values, have no place for "
        "a prefix",
        check="prefix.*",
        said="keep something else than keys and values|has no argument for a cache of keys and values",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: PEFT's format has one head of keys for each of the configuration's, of one width, "
        "and the model keeps others (latent attention, shared keys)",
        check="prefix.*",
        said="layers of .* keep keys of",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: the model goes on from a cache a token at a time, or by lengths of its own",
        check="prefix.*",
        said="goes on from a cache a token at a time",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: a prompt's tokens have no ids, which inner layers or the embedding read",
        check="prompt.*",
        said="reads token ids beside|embeds a token by more than its row|gives a tuple; expected a tensor",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: the model has an embedding for each of its codebooks",
        check="prompt.*|prefix.*",
        said="input embeddings, one for each of its vocabularies",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: positions in space, of pictures, where a prompt or a prefix has none",
        check="prompt.*|prefix.*",
        said="counts positions in space|have no place in another form",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: the model goes by token types only while its cache is empty, and a prefix is in it",
        check="prefix.*",
        said="by which .* lets tokens see what comes after",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: the model's own generate() calls a part inside, past the forward that is changed",
        check="prompt_generate|prefix_generate",
        said="ran a part of the model past the model's forward",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: the decoder cannot be told of an encoder's longer output",
        check="prompt.*",
        said="by which a decoder is told of a prompt",
        verdict="refused",
    ),
    Rule(
        "the model's own: it does not say which its input embedding is",
        check="prompt.*",
        said=r"has no get_input_embeddings\(\) that gives a module",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: the model keeps two caches, of layers at both of its ends",
        check="prefix.*",
        said="has a cache of two halves",
        verdict="refused",
    ),
    Rule(
        "refused with its reason: nn.MultiheadAttention reads out_proj's weight itself, (IA)³ has no output to scale",
        check="ia3",
        said=r"out_proj: IA3 cannot act on a weight that the base reads itself",
        verdict="refused",
    ),
    Rule(
        "peftfn: a linear layer whose class has a forward of its own: it works in groups, or returns a pair "
        "(FAULTS: subclass_forward)",
        check=LAYERS,
        classes="DeepseekV4.*|Llama4.*|Phimoe.*",
        verdict="crash",
    ),
    Rule(
        "peftfn: peft reads the experts' router by another name (FAULTS: moe_all_linear)",
        check="load",
        said=r"target_parameters names 'gate\.weight'",
        verdict="refused",
    ),
    Rule(
        "peftfn: a module at two paths is saved under one of them, and peft asks for both",
        check="save",
        said="missing adapter keys",
        classes="Inkling2.*|MaskFormer.*|UnlimitedOcr.*",
        verdict="wrong",
    ),
    Rule(
        "peftfn: the first axis of a layer's input is not the rows, and their number fits by chance "
        "(FAULTS: rows_sequence_first, rows_experts)",
        check="rows",
        classes="NllbMoe.*|Mask2Former.*",
        verdict="wrong",
    ),
    Rule(
        "the model's own: none of its linear layers is torch's but those of its head",
        check=LAYERS,
        said="matched only modules that exclude_modules or modules_to_save takes away",
        classes="IBert.*",
        verdict="refused",
    ),
    Rule(
        "the model's own: its reversible layers ask their input for a gradient, which a frozen embedding does not have",
        check="grad",
        said="does not require grad",
        classes="Reformer.*",
        verdict="crash",
    ),
    Rule(
        "torch's own: under vmap the model writes what differs by adapter into a tensor that no adapter changes",
        check="vmap",
        said="vmap: (index_put_|inplace arithmetic).* is not possible",
        verdict="crash",
    ),
    Rule(
        "the model's own: a norm in training mode of one row of one place has no variance",
        check="rows",
        said="more than 1 value per channel when training",
        verdict="crash",
    ),
    Rule(
        "the model's own: it takes pictures only beside token ids",
        check="prompt.*",
        said="cannot specify both pixel_values and inputs_embeds",
        verdict="crash",
    ),
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
