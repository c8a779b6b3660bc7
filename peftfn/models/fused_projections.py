"""Parts of a fused projection, by name: `c_attn.q` is the rows of `c_attn` that make the queries.

A part is a selection of output rows. The layouts are those of the models that fuse: three equal blocks, blocks of given
sizes (grouped-query attention), or query, key and value side by side for each head.

PEFT knows no parts: in its files B is whole, with zero rows outside the part, and `target_modules` names the layer. A
note in the weights file tells this library which part a site is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from peftfn.core import row_runs
from peftfn.core.adapter import Adapter
from peftfn.core.config import PeftConfig
from peftfn.core.row_runs import Runs
from peftfn.models import layers, matching

QKV = ("q", "k", "v")
Parts = dict[str, Runs]


def parts(model: nn.Module, path: str) -> Parts:
    """The output rows of each part of the layer at `path`, `name -> runs`; empty where none is known."""
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
        own = parts(model, path) if path else {}
        rows = [run for name, part in own.items() if is_named(f"{path}.{name}") for run in part]
        if rows:
            found[path] = layers.places(model, path)[path]._replace(rows=row_runs.union(rows))
    return found


def whole_config(adapter: Adapter) -> PeftConfig:
    """The adapter's config with each fused layer named whole, as PEFT can read it."""
    config: Any = adapter.config
    sites = [path for path, site in adapter.sites.items() if site.rows is not None]
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


def _blocks(outputs: int, sizes: Sequence[int], names: Sequence[str]) -> Parts:
    """Blocks one after the other, with lengths in proportion to `sizes`."""
    unit, rest = divmod(outputs, sum(sizes))
    if rest:
        return {}
    ends = itertools.accumulate((size * unit for size in sizes), initial=0)
    return {name: (run,) for name, run in zip(names, itertools.pairwise(ends), strict=True)}


def _by_head(heads: int, outputs: int) -> Parts:
    """For each head its query, key and value: (heads, 3, head dimension)."""
    if not heads or outputs % (3 * heads):
        return {}
    size = outputs // (3 * heads)
    starts = [range(number * size, outputs, 3 * size) for number in range(3)]
    return {name: tuple((at, at + size) for at in own) for name, own in zip(QKV, starts, strict=True)}


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
