"""A weight that a model holds under several names, in what `merge` is given and in what it returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from peftfn.core.transforms import is_traced
from peftfn.models import layers, tied_weights


def every(params: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The parameters, and what the model ties to one of them under its other names."""
    found = dict(params)
    for names in tied_weights.names(model):
        own = next((params[name] for name in names if name in params), None)
        found.update({name: own for name in names if name not in params and own is not None})
    return found


def settle(merged: dict[str, Tensor], params: Mapping[str, Tensor], given: Collection[str], model: nn.Module) -> None:
    """Give a module at several paths one weight under all of its names, and drop names that nobody needs.

    Args:
        merged: what is changed.
        params: `every` of what was given.
        given: the names that were given: another one stays where its weight has come apart from that of these.
        model: the base.
    """
    first: dict[int, str] = {}
    for path, module in layers.named_modules(model, remove_duplicate=False):
        home = first.setdefault(id(module), path)
        for name in (*module._parameters, *module._buffers) if home != path else ():
            here, there = (f"{at}.{name}" if at else name for at in (path, home))
            if here in merged and there in merged and merged[there] is not params[there]:
                merged[here] = merged[there]
    for names in tied_weights.names(model):
        present = [name for name in names if name in merged]
        if len({id(merged[name]) for name in present}) == 1:
            for name in present:
                if name not in given:
                    del merged[name]


def refuse_apart(merged: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Refuse names of one tensor that have come apart: nothing says how the model is to have them.

    Raises:
        ValueError: an adapter changes one of them alone, or each in another way.
    """
    for name in [name for name, tensor in params.items() if merged.get(name) is not tensor]:
        for other in tied_weights.aliases(params, name):
            if other in merged and name in merged and not _is_equal(merged[name], merged[other]):
                what = "by itself" if merged[other] is params[other] else f"otherwise than {other!r}"
                raise ValueError(
                    f"params has one tensor under {name!r} and {other!r}, and the adapter changes {name!r} {what}: "
                    "load_state_dict of the result into a model that ties them would keep one of the two for both. "
                    "Pass model=model, and run the result with peftfn.apply(model, (), batch, params=merged) or "
                    "functional_call(..., tie_weights=False); or write a model that does not tie them: "
                    "peftfn.bind(model, adapter).save_pretrained(folder, merge=True), or peftfn.merge_folder."
                )


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one is other or one.is_meta or is_traced(one, other):
        return one is other
    return one.shape == other.shape and torch.equal(one, other)
