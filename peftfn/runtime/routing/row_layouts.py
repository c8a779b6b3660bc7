"""Where the rows of a batch are inside a model: found out by what changes with what, not guessed from sizes.

Layers are given (tokens, rows, features), windows of pictures, the tokens that chose an expert: that an axis is as long
as the batch, or a multiple of it, says nothing. So the bare base runs a few times, in evaluation and without gradients,
with the values of some of the rows changed, then with those of the others: the first axis of what a layer is given is
that of the rows if exactly their places on it changed, both times. Where inputs have two axes they may be tokens that
were chosen by value, and the base runs with three more batches, for which they have to be as many.

What was found holds for every batch with the same arguments, and is remembered with the model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from peftfn.core import transforms
from peftfn.core.adapter import Adapter
from peftfn.models import changed_rows, layers, surgery, twins
from peftfn.models import transformers_caches as caches
from peftfn.runtime import site_adapters
from peftfn.runtime.routing.row_index import Rows

Notes = Mapping[str, Sequence[Tensor]]
"""Of each module that ran, a signature of what it was given, for each time."""


class Layouts(NamedTuple):
    """Where rows are.

    Attributes:
        sites: the modules that ran -> whether the first axis of what they are given is that of the rows, in order and
            with as many places for each.
        outputs: of each leaf of the model's output, the axis of the rows; `None` where it has none.
    """

    sites: Mapping[str, bool]
    outputs: Sequence[int | None]


class Call(NamedTuple):
    """A call of the base: the model, parameters given by name, and the arguments."""

    model: nn.Module
    params: Mapping[str, Tensor] | None
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Layouts]] = weakref.WeakKeyDictionary()


def sites(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """The paths inside the model where a stack acts."""
    stacks = [one for one in adapters if one.members is not None]
    return tuple(path for one in stacks for tree in (one.params, one.buffers) for path in tree if path)


def of(call: Call, adapters: Sequence[Adapter], which: Rows) -> Layouts | None:
    """Where the rows of a call are in what modules are given; `None` where it cannot be found out.

    That is so while values cannot be looked at (`torch.vmap`, `torch.compile`, the meta device), where an argument is
    an object that the base would write to (a cache), and where the base does not run on changed rows.

    Args:
        call: what is to be run.
        adapters: what acts, with a stack among it.
        which: the adapter of each row.
    """
    rows = which.size if which.tokens is None else which.tokens[0]
    if rows < 2 or not _can_be_run(call):
        return None
    known = _KNOWN.setdefault(call.model, {})
    key = _structure(call, sites(adapters), rows)
    if key in known:
        return known[key]
    paths = _modules(call.model, [path for path, here in _acting(call, adapters, which) if here])
    found = _found(call, paths, rows, int(any(_axis_of_rows(call.model.get_submodule(path)) for path in paths)))
    if found is not None and any(axis is not None for axis in found.outputs):
        known[key] = found
    return found


def _acting(call: Call, adapters: Sequence[Adapter], which: Rows) -> Iterable[tuple[str, bool]]:
    found = site_adapters.with_ties(site_adapters.of(adapters, which), call.model)
    return [(path, any(part.rows is not None for part in here)) for path, here in found.items()]


def _modules(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The modules at these sites, and those around that read their tensors themselves."""
    every = dict(layers.named_modules(model, remove_duplicate=False))
    found: dict[str, None] = {}
    for path in filter(None, paths):
        owner, _, name = path.rpartition(".")
        if isinstance(every.get(owner), nn.MultiheadAttention) or (
            path not in every and owner in every and name in every[owner]._parameters
        ):
            found.setdefault(owner)
        if path in every:
            found.setdefault(path)
    return list(found)


def _can_be_run(call: Call) -> bool:
    if torch.compiler.is_compiling() or transforms.is_mapping():
        return False
    given = [*call.arguments, *call.keywords.values()]
    tensors = [*(call.params or {}).values(), *changed_rows.tensors(call.keywords, call.arguments)]
    if any(transforms.is_wrapped(one) or one.is_meta for one in tensors):
        return False
    plain = (Tensor, bool, int, float, str, type(None))
    return all(isinstance(leaf, plain) for leaf in torch_pytree.tree_leaves(given))


def _structure(call: Call, paths: Sequence[str], rows: int) -> Hashable:
    """What a layout is taken to depend on: classes of modules, names and kinds of arguments, and what is routed."""
    named = {**dict(enumerate(call.arguments)), **call.keywords}
    shapes = [
        (name, one.dim(), one.dtype, rows in one.shape[:1]) if isinstance(one, Tensor) else (name, _said(one))
        for name, one in named.items()
    ]
    return tuple(paths), tuple(shapes), tuple(type(one) for one in call.model.modules())


def _said(value: Any) -> Hashable:
    return value if isinstance(value, (bool, int, str)) else cast("type[object]", type(value))


def _found(call: Call, paths: Sequence[str], rows: int, axis: int) -> Layouts | None:
    """What the base shows where the rows are on this axis of the batch."""
    some = changed_rows.half_of(rows)
    parts = (some, ~some)
    states = _random_states(call)
    try:
        with torch.no_grad():
            before, out = _run(call, paths, states)
            runs = [_run(_changed(call, which, axis, 1), paths, states) for which in parts]
            others: list[Notes] = []
            if any(one.shape[2] == 1 for noted in before.values() for one in noted):
                every = torch.ones_like(some)
                others = [_run(_changed(call, every, axis, step), paths, states)[0] for step in (2, 3, 4)]
            sites = {
                path: all(_same_shapes(noted, one[path]) for one in others)
                and all(_is_first(noted, run[path], which) for (run, _), which in zip(runs, parts, strict=True))
                for path, noted in before.items()
                if noted
            }
            axes = [_axis(one, [run[number] for _, run in runs], parts) for number, one in enumerate(out)]
            return Layouts(sites, axes)
    except Exception:  # noqa: BLE001  # whatever a model says of such a batch; of the real one it says it by itself
        return None


def _random_states(call: Call) -> dict[torch.device, Tensor]:
    """The states from which the base draws on the batch's devices: each run has the same, and leaves it so."""
    given = {one.device for one in changed_rows.tensors(call.keywords, call.arguments) if one.is_cuda}
    return {torch.device("cpu"): torch.get_rng_state(), **{one: torch.cuda.get_rng_state(one) for one in given}}


def _draw_again(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        now = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        if torch.equal(now, state):
            continue  # the most models draw nothing in evaluation, and other threads may draw meanwhile
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _changed(call: Call, which: Tensor, axis: int, step: int) -> Call:
    special = changed_rows.special_tokens(getattr(call.model, "config", None))
    arguments = tuple(changed_rows.changed(None, one, which, axis, step, special) for one in call.arguments)
    keywords = {
        name: changed_rows.changed(name, one, which, axis, step, special) for name, one in call.keywords.items()
    }
    return call._replace(arguments=arguments, keywords=keywords)


def _run(call: Call, paths: Sequence[str], states: Mapping[torch.device, Tensor]) -> tuple[Notes, list[Tensor | None]]:
    """What modules of the bare base are given, and the leaves of what it returns, as signatures."""
    made = twins.Twins(call.model, call.params)
    surgery.run_packed(made.by_path.values(), apart=True)
    for table in made.tables:
        surgery.keep_norms(table)
    for twin in made.by_path.values():
        twin.__dict__["training"] = False
    noted: dict[str, list[Tensor]] = {path: [] for path in paths}
    for path, notes in noted.items():
        twin = made.by_path[path]
        run = surgery.base_forward(surgery.second(twin))
        twin.__dict__["forward"] = functools.partial(_noting, run, notes, _axis_of_rows(twin))
    try:
        output = made.root(*call.arguments, **call.keywords)
    finally:
        _draw_again(states)
    parts = torch_pytree.tree_leaves(caches.without_caches(output))
    leaves = [_signature(one) if isinstance(one, Tensor) else None for one in parts]
    return noted, leaves


def _axis_of_rows(twin: nn.Module) -> int:
    """The axis on which a module says that it has the rows."""
    return 1 if isinstance(twin, nn.MultiheadAttention) and not twin.batch_first else 0


def _noting(run: Callable[..., Any], notes: list[Tensor], axis: int, *args: Any, **kwargs: Any) -> Any:
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    if given and given[0].dim():
        x = given[0]
        notes.append(_signature(x.movedim(axis, 0) if x.dim() > 2 else x))
    return run(*args, **kwargs)


# --- signatures -------------------------------------------------------------------------------------------------------


def _signature(x: Tensor) -> Tensor:
    """(2, first axis, second axis or 1): sums over the features with weights of their own, and how large they are."""
    wide = torch.nan_to_num(x.detach().to(torch.promote_types(x.dtype, torch.float32))) if x.dim() else x.new_zeros(1)
    is_table = x.dim() == 2 and not x.is_floating_point()  # token ids, which have no features
    first, second = wide.shape[0], wide.shape[1] if x.dim() > 2 or is_table else 1
    flat = wide.reshape(first, second, -1 if wide.numel() else 1)
    weights = 1.5 + torch.cos(torch.arange(flat.shape[-1], device=x.device) * 12.9898)
    weights = weights.to(flat.dtype)
    rounding = 0.03 if x.dtype in (torch.float16, torch.bfloat16) else 1e-4  # sums in another order, not other values
    return torch.stack([flat @ weights, rounding * (flat.abs() @ weights)]).cpu()


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """(first axis, second axis): whether a place changed by more than rounding."""
    return (before[0] - after[0]).abs() > torch.maximum(before[1], after[1])


def _same_shapes(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return [one.shape for one in before] == [one.shape for one in after]


def _is_first(before: Sequence[Tensor], after: Sequence[Tensor], which: Tensor) -> bool:
    return _same_shapes(before, after) and all(
        _has_rows(_moved(one, other), which) for one, other in zip(before, after, strict=True)
    )


def _has_rows(moved: Tensor, which: Tensor) -> bool:
    """Whether exactly these rows' places on the first axis changed."""
    rows = which.shape[0]
    if not moved.shape[0] or moved.shape[0] % rows:
        return False
    return torch.equal(moved.reshape(rows, -1).any(1), which)


def _axis(before: Tensor | None, after: Sequence[Tensor | None], parts: Sequence[Tensor]) -> int | None:
    """The axis of an output that has the rows."""
    if before is None or any(one is None or one.shape != before.shape for one in after):
        return None
    moved = [_moved(before, cast("Tensor", one)) for one in after]
    for axis in (0, 1):
        if all(_has_rows(one.movedim(axis, 0), which) for one, which in zip(moved, parts, strict=True)):
            return axis
    return None
