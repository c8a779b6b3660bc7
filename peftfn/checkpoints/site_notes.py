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
from peftfn.core.adapter import Adapter, SiteInfo, Sites
from peftfn.core.config import PeftConfig
from peftfn.models import fused_projections, layers


def written(adapter: Adapter) -> str:
    """The note on an adapter; empty where there is nothing to say."""
    if methods.of(adapter.config).on_weights is None:
        return ""
    sites = {path: _written(site) for path, site in adapter.sites.items() if path in adapter.params and site.kind}
    config: Any = adapter.config
    return json.dumps({"sites": sites, "named": config.target_modules}) if sites else ""


def _written(site: SiteInfo) -> dict[str, Any]:
    part = {} if site.rows is None else {"rows": site.rows, "outputs": site.outputs}
    return {"kind": site.kind, **part}


def read(text: str) -> Sites:
    """The sites that a note tells of."""
    sites: Mapping[str, Any] = json.loads(text)["sites"] if text else {}
    return {path: _read(one) for path, one in sites.items()}


def _read(one: Mapping[str, Any]) -> SiteInfo:
    kind = one.get("kind", "")
    if "transposed" in one:
        kind = layers.TRANSPOSED if one["transposed"] else layers.LINEAR
    rows = tuple((start, end) for start, end in one["rows"]) if "rows" in one else None
    return SiteInfo(kind, rows, int(one.get("outputs", 0)))


def named_config(adapter: Adapter, text: str) -> PeftConfig:
    """The config with parts by their names, if the one beside the note is the one that was written with it."""
    back = dataclasses.replace(cast("Any", adapter.config), target_modules=json.loads(text)["named"])
    return back if fused_projections.whole_config(adapter.replace(config=back)) == adapter.config else adapter.config
