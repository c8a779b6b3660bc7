"""Parts of a fused projection, by name: `c_attn.q` is the rows of `c_attn` that make the queries.

A part is a selection of output rows. The layouts are those of the models that fuse: three equal blocks, blocks of given
sizes (grouped-query attention), or query, key and value side by side for each head.

PEFT knows no parts: in its files B is whole, with zero rows outside the part, and `target_modules` names the layer. A
note in the weights file says what was what, for this library.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn import layers, matching
from peftfn.adapter import Adapter, Leaf, Tree
from peftfn.config import PeftConfig

QKV = ("q", "k", "v")
Parts = dict[str, Tensor]


def parts(model: nn.Module, path: str) -> Parts:
    """The output rows of each part of the layer at `path`, `name -> (rows,)` indices; empty where none is known."""
    module = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(module, nn.MultiheadAttention):
        shared: Tensor | None = module._parameters["in_proj_weight"]
        return {} if shared is None else _blocks(shared.shape[0], [1, 1, 1], QKV)
    kind = layers.kind_of(module)
    if kind not in (layers.LINEAR, layers.TRANSPOSED):
        return {}
    outputs = layers.shape_of(module, "weight")[1 if kind == layers.TRANSPOSED else 0]
    layout = _LAYOUTS.get(path.rpartition(".")[2])
    return layout(parent, outputs) if layout else {}


def places(model: nn.Module, is_named: Callable[[str], bool]) -> dict[str, layers.Place]:
    """The fused layers of which `is_named(path.part)` names a part, by path, with the rows of all named parts."""
    found: dict[str, layers.Place] = {}
    for path, _ in layers.named_modules(model):
        rows = [rows for name, rows in parts(model, path).items() if is_named(f"{path}.{name}")] if path else []
        if rows:
            found[path] = layers.places(model, path)[path]._replace(rows=torch.cat(rows))
    return found


def whole_config(adapter: Adapter) -> PeftConfig:
    """The adapter's config with each fused layer named whole, as PEFT can read it."""
    config: Any = adapter.config
    sites = [path for path, leaf in adapter.buffers.items() if "rows" in leaf]
    if not sites:
        return adapter.config
    names = config.target_modules
    if isinstance(names, str):
        return dataclasses.replace(config, target_modules=tuple(adapter.params))
    kept = (name if name.rpartition(".")[2] not in matching.PARTS else _without_part(name, sites) for name in names)
    return dataclasses.replace(config, target_modules=tuple(dict.fromkeys(kept)))


def _without_part(name: str, sites: Sequence[str]) -> str:
    layer = name.rpartition(".")[0]
    return layer if layer and any(site == layer or site.endswith(f".{layer}") for site in sites) else name


def note(adapter: Adapter) -> str:
    """What PEFT's layout does not hold, as JSON: parts, how square weights are stored; empty if nothing."""
    sites: dict[str, dict[str, Any]] = {}
    for path, leaf in adapter.buffers.items():
        if "rows" in leaf:
            sites.setdefault(path, {}).update(rows=_runs(leaf["rows"]), outputs=int(leaf["outputs"]))
        if "transposed" in leaf:
            sites.setdefault(path, {}).update(transposed=bool(leaf["transposed"]))
    return json.dumps({"sites": sites, "named": cast("Any", adapter.config).target_modules}) if sites else ""


def _runs(rows: Tensor) -> list[list[int]]:
    """Indices as [start, end] runs."""
    cuts = cast("list[int]", (torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1).tolist())
    return [[int(run[0]), int(run[-1]) + 1] for run in rows.tensor_split(cuts)]


def noted(text: str, device: torch.device) -> Tree:
    """The buffers that a note holds, by site, on a device."""
    sites: Mapping[str, Any] = json.loads(text)["sites"] if text else {}
    found: Tree = {}
    for path, one in sites.items():
        there = [name for name in ("outputs", "transposed") if name in one]
        found[path] = {name: torch.tensor(one[name], device=device) for name in there}
        if "rows" in one:
            found[path]["rows"] = torch.cat([torch.arange(*run, device=device) for run in one["rows"]])
    return found


def named_config(adapter: Adapter, text: str) -> PeftConfig:
    """The inverse of `whole_config`, if the config beside the note is the one that was written with it."""
    named = json.loads(text)["named"]
    back = dataclasses.replace(cast("Any", adapter.config), target_modules=named)
    return back if whole_config(adapter.replace(config=back)) == adapter.config else adapter.config


def to_whole(leaf: Mapping[str, Tensor], name: str) -> Leaf:
    """The leaf with the tensor `name` of all output rows, zero outside the part."""
    whole = leaf[name].new_zeros(int(leaf["outputs"]), *leaf[name].shape[1:])
    return {**leaf, name: whole.index_copy(0, leaf["rows"], leaf[name])}


def _blocks(outputs: int, sizes: Sequence[int], names: Sequence[str]) -> Parts:
    """Blocks one after the other, with lengths in proportion to `sizes`."""
    unit, rest = divmod(outputs, sum(sizes))
    if rest:
        return {}
    rows = torch.split(torch.arange(outputs, device="cpu"), [size * unit for size in sizes])
    return dict(zip(names, rows, strict=True))


def _by_head(heads: int, outputs: int) -> Parts:
    """For each head its query, key and value: (heads, 3, head dimension)."""
    if not heads or outputs % (3 * heads):
        return {}
    rows = torch.arange(outputs, device="cpu").view(heads, 3, -1)
    return {name: rows[:, number].reshape(-1) for number, name in enumerate(QKV)}


def _heads(attention: Any) -> tuple[int, int]:
    config = getattr(attention, "config", None)
    found = [
        next((getattr(owner, name) for owner in (attention, config) for name in names if hasattr(owner, name)), 0)
        for names in (("num_heads", "num_attention_heads"), ("num_key_value_heads",))
    ]
    return found[0], found[1] or found[0]


def _c_attn(attention: nn.Module, outputs: int) -> Parts:
    return {} if getattr(attention, "is_cross_attention", False) else _blocks(outputs, [1, 1, 1], QKV)


def _qkv_proj(attention: nn.Module, outputs: int) -> Parts:
    heads, shared = _heads(attention)
    return _blocks(outputs, [heads, shared, shared], QKV) if heads else {}


def _query_key_value(attention: nn.Module, outputs: int) -> Parts:
    if getattr(attention, "multi_query", False) or getattr(attention, "new_decoder_architecture", False):
        return {}
    return _by_head(_heads(attention)[0], outputs)


def _thirds(attention: nn.Module, outputs: int) -> Parts:
    del attention
    return _blocks(outputs, [1, 1, 1], QKV)


def _gate_up(block: nn.Module, outputs: int) -> Parts:
    del block
    return _blocks(outputs, [1, 1], ("gate", "up"))


_LAYOUTS: dict[str, Callable[[nn.Module, int], Parts]] = {
    "c_attn": _c_attn,  # GPT-2
    "qkv_proj": _qkv_proj,  # Phi-3
    "gate_up_proj": _gate_up,  # Phi-3
    "query_key_value": _query_key_value,  # GPT-NeoX, Bloom, Falcon
    "qkv": _thirds,  # vision transformers
    "Wqkv": _thirds,  # MPT
}
