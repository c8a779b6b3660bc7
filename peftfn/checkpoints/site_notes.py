"""What PEFT's files do not hold of an adapter, as a note in the metadata of the weights file.

    {"sites": {path: {"kind": "transposed linear", "rows": [[0, 16]], "outputs": 48}}, "named": ["c_attn.q"]}

`kind` is how the layer stores its weight, so that merging needs no model; `rows` and `outputs` say which part of a
fused projection the site is (PEFT's file has B whole, with zero rows outside of it), and `named` is `target_modules`
with the names of the parts. Earlier files have `transposed`, of square weights alone, in place of `kind`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

from peftfn import methods
from peftfn.core.adapter import Adapter
from peftfn.core.config import PeftConfig, TargetedConfig
from peftfn.models import fused_projections, layers


def written(adapter: Adapter) -> str:
    """The note on an adapter; empty where there is nothing to say."""
    if methods.of(adapter.config).on_weights is None:
        return ""
    sites = {path: site.to_dict() for path, site in adapter.sites.items() if path in adapter.params and site.kind}
    config: Any = adapter.config
    return json.dumps({"sites": sites, "named": config.target_modules}) if sites else ""


def in_present_form(note: Mapping[str, Any]) -> dict[str, Any]:
    """A note of an earlier version as it is written now."""
    return {**note, "sites": {path: _with_kind(one) for path, one in note["sites"].items()}}


def _with_kind(one: Mapping[str, Any]) -> Mapping[str, Any]:
    if "transposed" not in one:
        return one
    return {**one, "kind": layers.TRANSPOSED if one["transposed"] else layers.LINEAR}


def named_config(adapter: Adapter, named: Any) -> PeftConfig:
    """The config with parts by their names, if the one beside the note is the one that was written with it."""
    back = dataclasses.replace(cast("Any", adapter.config), target_modules=named)
    return back if fused_projections.whole_config(adapter.replace(config=back)) == adapter.config else adapter.config


def with_targets(adapter: Adapter) -> Adapter:
    """The adapter with its sites named in a config that names none: PEFT's defaults named them, or its writer did.

    Of methods that act on layers and train tensors of their own there.
    """
    config, method = adapter.config, methods.of(adapter.config)
    is_named = any(getattr(config, name, None) for name in ("target_modules", "target_parameters"))
    if is_named or not isinstance(config, TargetedConfig) or method.on_weights is None or method.of_tables:
        return adapter
    paths = tuple(path for path, leaf in adapter.params.items() if not all(map(method.replaces, leaf)))
    return adapter.replace(config=dataclasses.replace(config, target_modules=paths)) if paths else adapter
