"""A batch whose rows have adapters of their own: one pass where each site is given the rows, else one for each adapter.

Of each pass over the whole batch the rows of its adapter are kept. That is what routing means, so it is right whatever
the model does with its rows: axes in another order, tokens that choose experts, kernels that cannot be mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from peftfn.core.adapter import Adapter
from peftfn.core.unlike_rows import UnlikeRowsError
from peftfn.models import transformers_caches as caches
from peftfn.models import transformers_names as hf
from peftfn.ops import stacking
from peftfn.runtime.routing import row_index, row_layouts
from peftfn.runtime.routing.row_index import Rows
from peftfn.runtime.routing.row_layouts import Call, Layouts

Once = Callable[[Sequence[Adapter], Mapping[str, Any], Rows | None], Any]
"""`(adapters, keyword arguments, which adapter each row uses) -> output` of one pass."""


def run(once: Once, call: Call, adapters: Sequence[Adapter], which: Rows) -> Any:
    """What `once` computes with each row's own adapter of the one stack among these.

    Raises:
        ValueError: rows cannot be computed in one pass, and not apart either.
    """
    found = row_layouts.of(call, adapters, which) if row_layouts.sites(adapters) else None
    strange = [path for path, is_first in found.sites.items() if not is_first] if found is not None else []
    mixing = [type(one).__name__ for one in call.model.modules() if _mixes(one)]
    if not strange and not mixing:
        told = which if found is None else which._replace(known=frozenset((*found.sites, row_index.MODEL, "")))
        try:
            return once(adapters, call.keywords, told)
        except UnlikeRowsError as error:
            why = error
    elif mixing:
        why = UnlikeRowsError(
            f"a {mixing[0]} in training takes means over all rows, so that no row has an adapter of its own. Hold it "
            "(eval()), or apply the adapters one at a time."
        )
    else:
        why = UnlikeRowsError(
            f"{strange[0]}: the rows of the batch are not on the first axis of what it is given, so that each row "
            "cannot have its own adapter there."
        )
    found = row_layouts.of(call, adapters, which)
    asks = call.keywords.get(hf.USE_CACHE)  # a cache for each pass is of no use; where nobody asked, it is left out
    if found is None or which.tokens is not None or not which.values or asks:
        raise why
    return _apart(once, call, adapters, which, found, why)


def _mixes(layer: nn.Module) -> bool:
    """Whether a layer makes one row of the others: a BatchNorm in training."""
    return layer.training and bool(getattr(layer, "track_running_stats", False))


def _apart(
    once: Once, call: Call, adapters: Sequence[Adapter], which: Rows, found: Layouts, why: UnlikeRowsError
) -> Any:
    numbers = which.values
    stack = next(one for one in adapters if one.members is not None)
    own = {-1: None, **dict(enumerate(stacking.unstack(stack)))}
    outputs: list[list[Any]] = []
    spec: Any = None
    used = sorted(set(numbers))
    for number in used:
        alone = [own[number] if one is stack else one for one in adapters]
        output = caches.without_caches(once([one for one in alone if one is not None], call.keywords, None))
        leaves, spec = torch_pytree.tree_flatten(output)
        outputs.append(leaves)
    if len({_shapes(leaves) for leaves in outputs}) > 1 or len(outputs[0]) != len(found.outputs):
        raise why  # as prompts of unlike length make longer rows of some outputs
    places = [used.index(one) for one in numbers]
    made = [
        _picked(list(leaves), axis, places, number)
        for number, (axis, *leaves) in enumerate(zip(found.outputs, *outputs, strict=True))
    ]
    return torch_pytree.tree_unflatten(made, spec)


def _shapes(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(one.shape if isinstance(one, Tensor) else None for one in leaves)


def _picked(leaves: list[Any], axis: int | None, places: Sequence[int], number: int) -> Any:
    """Each row of the output in which its adapter acted."""
    first = leaves[0]
    if axis is None:
        is_one = all(
            torch.equal(one, first) if isinstance(first, Tensor) and isinstance(one, Tensor) else one is first
            for one in leaves
        )
        if not is_one:
            said = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else f"type {type(first).__name__}"
            raise UnlikeRowsError(
                "rows cannot be computed in one pass in this model, so that it ran once for each adapter; and part "
                f"{number} of its output ({said}) is not made of rows, as a loss of all is not. Leave it out "
                "(labels, use_cache=False) and compute it of the others, or apply the adapters one at a time."
            )
        return first
    rows = len(places)
    split: list[Tensor] = [one.movedim(axis, 0).unflatten(0, (rows, -1)) for one in leaves]
    return torch.stack([split[place][row] for row, place in enumerate(places)]).flatten(0, 1).movedim(0, axis)
