"""What a LoRA config says of its variants, and which of them can be asked for at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

_SUB_CONFIGS: dict[str, dict[str, Any]] = {
    "use_bdlora": {"target_modules_bd_a": None, "target_modules_bd_b": None, "nblocks": 1, "match_strict": True},
    "kasa_config": {"beta": 1e-4, "gamma": 1e-3},
    "velora_config": {"num_groups": 64, "scale": 1.0, "init_type": "batch_average"},
}
"""The fields of PEFT's configs inside the config, and their defaults."""

_ONE_OF = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "velora_config",
    "alora_invocation_tokens",
    "lora_bias",
)


def filled(name: str, given: Any) -> Any:
    """What a variant's own config says, with defaults for what it does not; also of one of PEFT's own classes.

    Raises:
        ValueError: it has a field that is not known.
    """
    if given is None:
        return None
    known = _SUB_CONFIGS[name]
    kind = cast("type[object]", type(given))
    said: Any = dataclasses.asdict(given) if dataclasses.is_dataclass(kind) else given
    if not isinstance(said, Mapping):
        return said  # which is refused for its type
    fields = cast("Mapping[str, Any]", said)
    if unknown := sorted(fields.keys() - known.keys()):
        raise ValueError(f"{name} has {unknown[0]!r}, which is none of its fields: {', '.join(known)}.")
    return {**known, **fields}


def check(config: Any) -> None:
    """A `ValueError` if variants exclude each other, or one's own config makes no sense."""
    asked = [name for name in _ONE_OF if getattr(config, name)]
    if len(asked) > 1 and {*asked} - {"use_dora", "alora_invocation_tokens", "lora_bias"}:  # these say so themselves
        raise ValueError(f"LoraConfig asks for {' and '.join(asked)}; expected one of them, as in PEFT.")
    if config.qalora_group_size < 1:
        raise ValueError(f"qalora_group_size={config.qalora_group_size}; expected a positive integer.")
    if config.use_bdlora is not None:
        _check_blocks(config.use_bdlora)
    if config.kasa_config is not None and min(config.kasa_config.values()) < 0:
        raise ValueError(f"kasa_config={dict(config.kasa_config)}; expected no negative weight.")
    if config.velora_config is not None:
        _check_groups(config.velora_config)


def _check_groups(given: Mapping[str, Any]) -> None:
    starts = ("batch_average", "batch_average_once", "random")
    if not isinstance(given["num_groups"], int) or given["num_groups"] < 1 or given["scale"] <= 0:
        raise ValueError(f"velora_config={dict(given)}; expected a positive num_groups and scale.")
    if given["init_type"] not in starts:
        raise ValueError(f"velora_config has init_type={given['init_type']!r}; expected one of {', '.join(starts)}.")


def _check_blocks(given: Mapping[str, Any]) -> None:
    first, second = (given[f"target_modules_bd_{one}"] or () for one in "ab")
    if isinstance(first, str) or isinstance(second, str):
        raise ValueError("use_bdlora: target_modules_bd_a and _bd_b are lists of parts of names.")
    if both := sorted({*first} & {*second}):
        raise ValueError(f"use_bdlora has {both[0]!r} for A and for B; expected one of them.")
    if not isinstance(given["nblocks"], int) or given["nblocks"] < 1:
        raise ValueError(f"use_bdlora has nblocks={given['nblocks']!r}; expected a positive integer.")
