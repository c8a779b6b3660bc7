"""Which runs a sweep has: every combination of the values, or one after the other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peftfn.cli.errors import UserError
from peftfn.cli.settings import SweepSettings
from peftfn.core.config import PeftConfig

OF_RUN = ("lr", "weight_decay", "warmup", "max_grad_norm", "seed")
"""Options of the run, beside every number of the adapter's config, that may have several values."""


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: of its folder: its number and what it differs in.
        settings: as `peftfn train` would have them.
        config: of its adapter.
        changed: the values that are its own, by option.
    """

    name: str
    settings: SweepSettings
    config: PeftConfig
    changed: dict[str, Any]


def members(settings: SweepSettings, config: PeftConfig, values: Mapping[str, Sequence[Any]]) -> list[Member]:
    """The runs of a sweep over the options that have more than one value.

    Raises:
        UserError: no option has several values; or, for `zip`, they have unlike numbers of them.
    """
    varied = {name: list(some) for name, some in values.items() if len(some) > 1}
    if not varied:
        raise UserError(
            "a sweep needs an option with several values, such as --lr 1e-3,3e-3 or --r 4,8 or --seed 0,1,2"
        )
    chosen = _combined(settings.combine, varied)
    width = len(str(len(chosen) - 1))
    return [
        _member(f"{number:0{width}}", settings, config, dict(zip(varied, one, strict=True)))
        for number, one in enumerate(chosen)
    ]


def _combined(how: str, varied: Mapping[str, Sequence[Any]]) -> list[tuple[Any, ...]]:
    if how == "grid":
        return list(itertools.product(*varied.values()))
    if len({len(some) for some in varied.values()}) > 1:
        counts = ", ".join(f"--{name.replace('_', '-')} {len(some)}" for name, some in varied.items())
        raise UserError(f"--combine zip needs as many values of each option; given: {counts}")
    return list(zip(*varied.values(), strict=True))


def _member(number: str, settings: SweepSettings, config: PeftConfig, changed: dict[str, Any]) -> Member:
    of_run = {name: value for name, value in changed.items() if name in OF_RUN}
    of_config = {name: value for name, value in changed.items() if name not in OF_RUN}
    name = "-".join([number, *(f"{option}={shown(value)}" for option, value in changed.items())])
    return Member(name, dataclasses.replace(settings, **of_run), dataclasses.replace(config, **of_config), changed)


def shown(value: Any) -> str:
    """A value as short text, for names and tables."""
    return f"{value:g}" if isinstance(value, float) else str(value)
