"""A tiny configuration of any model class, by the rules of sizes.py and the exceptions of overrides.py."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import transformers
from transformers import PreTrainedConfig

from zoo import sizes
from zoo.overrides import OVERRIDES

KEPT = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"pad_token_id", "bos_token_id", "eos_token_id"}
KINDS = 4  # of layers, at most
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "cls": 1, "sep": 2}


class Tokens:
    """Names of special tokens to numbers in the tiny vocabulary; one name has one number in all sub-configs."""

    def __init__(self) -> None:
        self.given = dict(SPECIAL)

    def number(self, name: str) -> int:
        """The number that this name has."""
        base = re.sub(r"_(token_?)?(id|index)$|_token$", "", name)
        if base not in self.given:
            self.given[base] = sizes.VOCABULARY - 1 - (len(self.given) - len(SPECIAL))
        return self.given[base]


def is_token(name: str) -> bool:
    return (
        bool(re.search(r"_token(_id|_index|_idx)?$|^(pad|bos|eos|unk|mask|eod|eoi|boi)_index$", name))
        and "num" not in name
    )


def shrunk(name: str, value: Any, tokens: Tokens) -> Any:
    """One field's tiny value."""
    if isinstance(value, PreTrainedConfig):
        return tiny(value, tokens)
    is_list = isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value)
    if not is_list and type(value) is not int:
        return value
    if is_token(name):
        return value if type(value) is int and value < 0 else tokens.number(name)
    return type(value)(sizes.numbers(name, list(value))) if is_list else sizes.integer(name, value)


def rotary(values: dict[str, Any]) -> None:
    """Rotary sections add up to half of a tiny head."""
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict):
        for one in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
            if "mrope_section" in one:
                one["mrope_section"] = [2, 1, 1]


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What was given to make it; fields that its class computes from others are left for it to compute again."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name, None)
        computed = field.default in (None, "auto") and not isinstance(value, PreTrainedConfig)
        if field.name == "head_dim" and value is None:
            given[field.name] = sizes.HEAD
        elif field.name not in KEPT and value is not None and not (computed and not is_token(field.name)):
            given[field.name] = value
    return given


def layers_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The number of layers and the lists with an entry for each, cut to one layer of each kind, and two at least."""
    for counted in ("num_hidden_layers", "num_layers", "n_layer"):
        count = getattr(config, counted, None)
        if isinstance(count, int) and count > 1:
            break
    else:
        return {}
    lists = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(config) if f.name not in KEPT}
    lists = {n: list(v) for n, v in lists.items() if isinstance(v, (list, tuple)) and len(v) == count}
    lists = {n: v for n, v in lists.items() if len({repr(one) for one in v}) <= KINDS}
    if not lists:
        return {}
    kinds = [repr([values[layer] for values in lists.values()]) for layer in range(count)]
    last = count - 1
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind != kinds[last]]
    chosen = [*firsts[: KINDS - 1], last] if firsts else [0, last]
    return {counted: len(chosen)} | {n: [values[layer] for layer in chosen] for n, values in lists.items()}


def tiny(config: PreTrainedConfig, tokens: Tokens) -> PreTrainedConfig:
    """The same kind of configuration, tiny."""
    if hasattr(type(config), "allow_global_per_layer_attribute_access"):
        config.allow_global_per_layer_attribute_access = True
    values = {name: shrunk(name, value, tokens) for name, value in fields_of(config).items()} | layers_of(config)
    for group, heads in (
        ("num_key_value_heads", "num_attention_heads"),
        ("linear_num_key_heads", "linear_num_value_heads"),
    ):
        if group in values and values[group] and getattr(config, group) == getattr(config, heads, None):
            values[group] = values.get(heads, sizes.HEADS)  # no groups: multi-head latent attention is built so
    if "pad_token_id" in {field.name for field in dataclasses.fields(config)}:
        values.setdefault("pad_token_id", 0)
    if config.is_encoder_decoder:
        values.setdefault("decoder_start_token_id", 1)
    if hasattr(config, "depths") and getattr(config, "_out_features", None):
        values["out_features"] = list(config.out_features)  # a backbone's stages, of which none is dropped
    rotary(values)
    override = OVERRIDES.get(config.model_type, {})
    values |= override(config) if callable(override) else override
    return type(config)(**values)


def tiny_config(model_class: type[transformers.PreTrainedModel]) -> PreTrainedConfig:
    """A tiny configuration for this class."""
    override = OVERRIDES.get(model_class.__name__)
    if callable(override):
        return override()
    made = tiny(model_class.config_class(**(override or {})), Tokens())
    writes = re.search("ForCausalLM|LMHead|GenerationDecoder", model_class.__name__)
    if writes and getattr(made, "is_decoder", None) is False:
        made.is_decoder = not made.is_encoder_decoder  # else a text generator sees what comes after a token
    return made
