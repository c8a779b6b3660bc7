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

from torch import Tensor

from peftfn import methods
from peftfn.core import reading
from peftfn.core.adapter import Adapter, SiteInfo
from peftfn.core.config import PeftConfig, TargetedConfig
from peftfn.core.config_values import freeze
from peftfn.models import fused_projections, layers


def written(adapter: Adapter) -> str:
    """The note on an adapter; empty where there is nothing to say."""
    if methods.of(adapter.config).on_weights is None:
        return ""
    sites = {path: site.to_dict() for path, site in adapter.sites.items() if path in adapter.params and site.kind}
    config: Any = adapter.config
    return json.dumps({"sites": sites, "named": config.target_modules}) if sites else ""


_KINDS = (
    *("", layers.LINEAR, layers.TRANSPOSED, layers.EMBEDDING, layers.CONVOLUTION, layers.PARAMETER),
    *(layers.EXPERTS_TRANSPOSED, layers.MODULE, layers.ATTENTION, layers.MODEL),
)


def read(text: str, source: str) -> tuple[dict[str, SiteInfo], Any]:
    """What a note says of sites, and how it names them; nothing, where there is none.

    Raises:
        ValueError: it is not a note as `written` makes them.
    """
    note = reading.parse_json(text, f"the note on sites in {source}") if text else {}
    sites: Any = note.get("sites", {})
    if not isinstance(sites, dict):
        raise _wrong(source, f"sites is {str(sites)[:40]}")
    found = {str(path): _info(source, path, one) for path, one in cast("dict[Any, Any]", sites).items()}
    named = freeze(note.get("named"))
    if named is not None and not isinstance(named, str) and not _are(named, str):
        raise _wrong(source, f"named is {str(named)[:40]}")
    return found, named


def names(text: str, source: str) -> frozenset[str]:
    """The names in a list of a file's metadata."""
    try:
        found: Any = freeze(json.loads(text or "[]"))
    except (ValueError, RecursionError) as error:
        raise _wrong(source, f"the list of buffers is no JSON ({error})") from error
    if not _are(found, str):
        raise _wrong(source, f"the list of buffers is {str(found)[:40]}")
    return frozenset(cast("tuple[str, ...]", found))


def _info(source: str, path: Any, given: Any) -> SiteInfo:
    if not isinstance(given, dict):
        raise _wrong(source, f"{path!r} is {str(given)[:40]}")
    one = cast("dict[str, Any]", given)
    if "transposed" in one:  # as earlier versions wrote it
        one = {**one, "kind": layers.TRANSPOSED if one["transposed"] else layers.LINEAR}
    kind, rows = one.get("kind", ""), freeze(one.get("rows"))
    outputs: Any = one.get("outputs", 0)
    is_right = kind in _KINDS and type(outputs) is int and outputs >= 0
    if not is_right or (rows is not None and not _are_runs(rows, outputs)):
        raise _wrong(source, f"{path!r} is {str(one)[:80]}")
    return SiteInfo.from_dict({key: value for key, value in one.items() if key in ("kind", "rows", "outputs")})


def _are_runs(rows: Any, outputs: int) -> bool:
    """Whether these are runs of rows, in order, of a layer with so many."""
    if not _are(rows, tuple) or not all(len(run) == 2 and _are(run, int) for run in rows) or not rows:
        return False
    ends = [0, *(end for run in rows for end in run)]
    return ends == sorted(ends) and all(start < end for start, end in rows) and ends[-1] <= outputs


def _are(found: Any, kind: type) -> bool:
    return isinstance(found, tuple) and all(type(one) is kind for one in cast("tuple[Any, ...]", found))


def fitting(info: SiteInfo, leaf: Mapping[str, Tensor], path: str, source: str) -> SiteInfo:
    """The same, if it is not about rows of a layer of another size than that of the tensors here.

    Raises:
        ValueError: it is.
    """
    if info.rows is not None and not any(info.outputs in tensor.shape for tensor in leaf.values()):
        raise _wrong(source, f"{path!r} has {info.outputs:,} outputs, which none of its tensors has")
    return info


def _wrong(source: str, what: str) -> ValueError:
    return ValueError(
        f"{source} has a note on its sites that does not fit it: {what}. It is corrupt, or somebody has changed it: "
        "fetch it again, or write the tensors into a file without metadata."
    )


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
