"""What a merged folder will hold: which tensors are copied, which are made and from what, and in which file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn.checkpoints.merge_folder import shards
from peftfn.checkpoints.merge_folder.shards import Item, Shard
from peftfn.checkpoints.merge_folder.tensor_names import Group, Names, Tensors
from peftfn.core.adapter import Adapter, site_paths
from peftfn.core.safetensors_file import CODES, Entry
from peftfn.methods import companions
from peftfn.ops import tied_tables
from peftfn.ops.merge import Change, change, changed, of_rows


class Unit(NamedTuple):
    """Tensors that are made together.

    Attributes:
        keys: the tensors of the files that are read for it.
        make: `(tensors, rows) -> tensors`, the new ones by their keys; given rows, from those of the old one the same
            of the new one.
        by_rows: whether it may be given rows: then it makes one tensor from one of the same shape.
    """

    keys: tuple[str, ...]
    make: Callable[[Tensors, slice | None], dict[str, Tensor]]
    by_rows: bool


class Plan(NamedTuple):
    """A merged folder.

    Attributes:
        files: the new files' tensors, by file name; those without a source are made.
        units: what makes a tensor, by its key.
        apart: whether names that the class ties have values of their own.
        resized: the embeddings and heads that have another number of rows than in the folder, with that number.
    """

    files: dict[str, list[Item]]
    units: dict[str, Unit]
    apart: bool
    resized: dict[str, int]


class Known(NamedTuple):
    """What is known before a tensor is read.

    Attributes:
        names: of the model and of the files.
        entries: the tensors of the files, by key.
        source: the key that each parameter is read from: its own, or that of a name that it is tied to.
        shapes: tensors on the meta device by the parameters' names, those that only the adapters have too.
        dtype: of the new files' floating-point tensors, or `None` for what each one has.
    """

    names: Names
    entries: Mapping[str, Entry]
    source: Mapping[str, str]
    shapes: Tensors
    dtype: torch.dtype | None


class _Part(NamedTuple):
    names: set[str]
    changes: list[Change]


def make(folder: Sequence[Shard], adapters: Sequence[Adapter], names: Names, dtype: torch.dtype | None) -> Plan:
    """The plan of a folder with the adapters merged in.

    Raises:
        KeyError: the folder lacks what an adapter changes.
        ValueError: shapes do not fit, or do not tell how a weight is stored.
    """
    known = _known(folder, adapters, names, dtype)
    changes = [
        change(known.shapes, one, path, names.model)
        for one in [piece for adapter in adapters for piece in companions.pieces(adapter)]
        for path in site_paths(one)
    ]
    changes, apart = _ties(known, changes)
    units: dict[str, Unit] = {}
    made: dict[str, Item] = {}
    for part in _distinct(_parts(known, changes).values()):
        unit, items = _unit(known, part, apart)
        units.update({item.name: unit for item in items})
        made.update({item.name: item for item in items})
    copies = {name: known.source[name] for name in apart if name not in made}
    replaced = {name: tensor for one in changes for name, tensor in one.replaced.items() if name in known.source}
    resized = {name: one.shape[0] for name, one in replaced.items() if one.shape != known.shapes[name].shape}
    return Plan(_files(known, folder, made, copies, units), units, bool(apart), resized)


def meta(entry: Entry) -> Tensor:
    """A tensor on the meta device, of the entry's shape and, where torch has it, dtype."""
    return torch.empty(entry.shape, dtype=CODES.get(entry.code, torch.uint8), device="meta")


def _known(folder: Sequence[Shard], adapters: Sequence[Adapter], names: Names, dtype: torch.dtype | None) -> Known:
    entries = {key: entry for shard in folder for key, entry in shard.entries.items()}
    source = dict(names.keys)
    for tied in names.tied:
        own = next((source[name] for name in tied if name in source), None)
        source.update({name: own for name in tied if name not in source and own is not None})
    shapes = {name: meta(entries[key]) for name, key in source.items()}
    for group in _distinct(names.groups.values()):
        shapes.update(group.to_model({key: meta(entries[key]) for key in group.keys}))
    for one in adapters:  # what the model has and the folder lacks: a new head
        brought = {f"{path}.{name}": tensor for path, leaf in one.params.items() for name, tensor in leaf.items()}
        shapes.update({name: tensor.to("meta") for name, tensor in brought.items() if name in set(names.missing)})
    return Known(names, entries, source, shapes, dtype)


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({id(one): one for one in values}.values())


def _ties(known: Known, changes: list[Change]) -> tuple[list[Change], set[str]]:
    """The changes of tied names put in order, and the names that get a tensor of their own in the files.

    A vocabulary that has grown, or a change of an embedding's table that the others follow, is one change of all of
    them; any other one makes them come apart.
    """
    apart: set[str] = set()
    for tied in known.names.tied:
        present = [name for name in tied if name in known.names.keys]
        hits = [one for one in changes if any(name in tied for name in (*one.replaced, *_reads(one)))]
        if not present or not hits:
            continue
        grown = [tensor for one in hits for name, tensor in one.replaced.items() if name in tied]
        rows = {tensor.shape[0] for tensor in grown} - {known.shapes[present[0]].shape[0]}
        if rows and all(torch.equal(grown[0], other) for other in grown) and not any(map(_reads, hits)):
            changes = [one._replace(replaced=_without(one, tied)) for one in changes]
            changes.append(hits[0]._replace(replaced={present[0]: grown[0]}, place=None))
        elif any(tied_tables.is_followed(one.table) for one in hits):
            _refuse_apart(tied, hits)
            kept = [one for one in changes if not any(one is hit for hit in hits)]
            changes = [*kept, *(one for hit in hits for one in _at(hit, present))]
        else:
            apart |= set(tied) - set(present)
    return changes, apart


def _refuse_apart(tied: Sequence[str], hits: Sequence[Change]) -> None:
    """Refuse a table that others go along with, and that something else changes under another of its names."""
    is_alone = len({name for one in hits for name in _reads(one)}) == 1 and not any(one.replaced for one in hits)
    if not is_alone or not all(tied_tables.is_followed(one.table) for one in hits):
        raise ValueError(
            f"{', '.join(tied)} are one table, of which the adapters change {', '.join(one.path for one in hits)} by "
            "themselves: from file to file they do not come apart. Merge in memory: peftfn.merge(model.state_dict(), "
            "adapter, model=model)."
        )


def _at(one: Change, names: Sequence[str]) -> list[Change]:
    """The change of a table under each of these names in place of its own."""
    assert one.place is not None, "a change of a table has one"
    homes = [name.rpartition(".") for name in names]
    return [one._replace(place=one.place._replace(owner=owner, weight=weight)) for owner, _, weight in homes]


def _reads(one: Change) -> list[str]:
    return list(one.names.values())


def _without(one: Change, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in one.replaced.items() if name not in names}


def _parts(known: Known, changes: Sequence[Change]) -> dict[str, _Part]:
    """Which changes go together, by the names that they touch: one reads what another made, or they share a group."""
    found: dict[str, _Part] = {}
    siblings: dict[int, set[str]] = {}
    for name, group in known.names.groups.items():
        siblings.setdefault(id(group), set()).add(name)
    for one in changes:
        touched = {name for name in _reads(one) if name in known.shapes} | (one.replaced.keys() & known.shapes.keys())
        for name in list(touched):
            touched |= siblings.get(id(known.names.groups.get(name)), set())
        part = _Part(set(touched), [])
        for other in _distinct(found[name] for name in touched if name in found):
            part.names.update(other.names)
            part.changes.extend(other.changes)
        part.changes.append(one)
        found.update(dict.fromkeys(part.names, part))
    return found


def _unit(known: Known, part: _Part, apart: set[str]) -> tuple[Unit, list[Item]]:
    names, written = known.names, known.names.written
    groups: list[Group] = _distinct(names.groups[name] for name in part.names if name in names.groups)
    needed = {name for one in part.changes for name in _reads(one)}
    replaced = {name: tensor for one in part.changes for name, tensor in one.replaced.items()}
    source = {name: known.source[name] for name in part.names & known.source.keys() if name in needed - set(replaced)}
    homes = {name: _home(name, known, apart) for name in sorted(part.names) if name not in names.groups}
    keys = tuple(dict.fromkeys([*source.values(), *(key for group in groups for key in group.keys)]))

    def run(tensors: Tensors, rows: slice | None) -> dict[str, Tensor]:
        params = {name: tensors[key] for name, key in source.items()}
        for group in groups:
            params.update(group.to_model({key: tensors[key] for key in group.keys}))
        params = {name: _cast(tensor, known.dtype) for name, tensor in params.items()}
        for one in part.changes if rows is None else _of_rows(part.changes, rows):
            params.update(changed(one, params))
        found = {home: params[name] for name, home in homes.items() if home}
        for group in groups:
            own = {name: params[name] for name, other in names.groups.items() if other is group}
            found.update({written.get(key, key): tensor for key, tensor in group.to_files(own).items()})
        return found

    items = [_item(home, replaced.get(name, known.shapes[name]), known.dtype) for name, home in homes.items() if home]
    items += [_item(written.get(key, key), meta(known.entries[key]), known.dtype) for one in groups for key in one.keys]
    is_alone = not groups and len(keys) == len(items) == 1 and items[0].shape == known.entries[keys[0]].shape
    by_rows = is_alone and len(_of_rows(part.changes, slice(0, 1))) == len(part.changes)
    return Unit(keys, run, by_rows), items


def _of_rows(changes: Iterable[Change], rows: slice) -> list[Change]:
    return [found for one in changes if (found := of_rows(one, rows)) is not None]


def _home(name: str, known: Known, apart: set[str]) -> str | None:
    """The key that a parameter has in the new files; `None` where it stays tied to another one."""
    if name in known.names.keys:
        key = known.names.keys[name]
        return known.names.written.get(key, key)
    return name if name in apart or name not in known.source else None


def _recast(name: str, key: str, dtype: torch.dtype) -> Callable[[Tensors, slice | None], dict[str, Tensor]]:
    return lambda tensors, _: {name: tensors[key].to(dtype)}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not _is_floating(tensor.dtype) else tensor.to(dtype)


def _is_floating(dtype: torch.dtype) -> bool:
    return dtype in shards.NAMES and shards.is_floating(shards.NAMES[dtype])


def _item(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Item:
    kept = dtype if dtype is not None and _is_floating(tensor.dtype) else tensor.dtype
    return Item(name, shards.NAMES[kept], tuple(tensor.shape), None)


def _files(
    known: Known,
    folder: Sequence[Shard],
    made: Mapping[str, Item],
    copies: Mapping[str, str],
    units: dict[str, Unit],
) -> dict[str, list[Item]]:
    """The tensors of each new file: those of the old one, in its order; what is new goes into the last."""
    found: dict[str, list[Item]] = {}
    left = dict(made)
    for shard in folder:
        items = found.setdefault(shard.path.name, [])
        for key, entry in sorted(shard.entries.items(), key=lambda pair: pair[1].start):
            name = known.names.written.get(key, key)
            items.append(left.pop(name, None) or _kept(known, name, key, entry, units))
    last = found[folder[-1].path.name]
    last += [_kept(known, name, key, known.entries[key], units) for name, key in copies.items()]
    last += left.values()
    return found


def _kept(known: Known, name: str, key: str, entry: Entry, units: dict[str, Unit]) -> Item:
    """An item for a tensor that no adapter touches: its bytes, or, in another dtype, a unit of its own."""
    if known.dtype is None or not shards.is_floating(entry.code) or CODES[entry.code] == known.dtype:
        return Item(name, entry.code, entry.shape, entry)
    units[name] = Unit((key,), _recast(name, key, known.dtype), by_rows=len(entry.shape) > 0)
    return Item(name, shards.NAMES[known.dtype], entry.shape, None)
