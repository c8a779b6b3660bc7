"""The tensors of a leaf, each declared once: what the library does with leaves follows from this table.

From its slots come a method's names and keys in files, the check of a leaf against a layer, the kinds of layer that it
fits, padding and trimming in a stack, what a row on the bare base uses, and which part of a leaf makes some rows of a
weight. A method that declares them well writes no function for any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn.core.adapter import Leaf
from peftfn.models.layouts import WeightShape

Shape = tuple[int, ...]


def _scalar(config: Any, weight: WeightShape, rank: int) -> Shape:
    return ()


def _none(config: Any, weight: WeightShape, rank: int) -> None:
    return None


def _never(config: Any) -> bool:
    return False


def always(config: Any) -> bool:
    """Of a constant that is in PEFT's files whatever the config says."""
    return True


class Slot(NamedTuple):
    """One tensor of a leaf.

    Attributes:
        shape: `(config, weight, rank) -> shape`, or `None` where this config has no such tensor on such a weight, also
            because the weight's sizes do not divide.
        key: the ending of its key in PEFT's files; by default its name.
        trained: whether it is a parameter. A constant is made anew from the config when a file is read, unless it is
            `stored`.
        stored: `(config) -> whether` a constant is in PEFT's files; `init` makes it with the trained tensors.
        rank: the axis that has the rank. Adapters of a stack may differ there, and are filled up with zeros.
        off: the value at which the method does nothing, whatever the other tensors hold.
        outputs: the axis along the weight's outputs.
        inputs: the axis along the weight's inputs.
        column_major: whether a stack holds the columns of this matrix in one piece each (see `core.stack_slices`).
        also: another shape that a file of PEFT's may have.
        shared: whether several sites have it in common (`traits.Sharing` makes it). The shape is what one of them
            needs: it may be longer along `outputs`, `inputs` and `longer`.
        longer: further axes along which a shared one may be longer than a site needs.
        at_sites: whether PEFT's files have a copy of a shared one at each site, beside that of the model.
    """

    shape: Callable[[Any, WeightShape, int], Shape | None] = _scalar
    key: str | None = None
    trained: bool = True
    stored: Callable[[Any], bool] = _never
    rank: int | None = None
    off: float | None = None
    outputs: int | None = None
    inputs: int | None = None
    column_major: bool = False
    also: Callable[[Any, WeightShape, int], Shape | None] = _none
    shared: bool = False
    longer: tuple[int, ...] = ()
    at_sites: bool = False

    def fits(self, shape: Shape, needed: Shape) -> bool:
        """Whether a tensor of this shape will do where that one is needed."""
        if not self.shared or len(shape) != len(needed):
            return shape == needed
        axes = enumerate(zip(shape, needed, strict=True))
        longer = (self.outputs, self.inputs, *self.longer)
        return all(has >= wants if axis in longer else has == wants for axis, (has, wants) in axes)


def among_shapes(shapes: Callable[..., Mapping[str, Shape]], name: str) -> Callable[..., Shape | None]:
    """A `Slot.shape` of a method that says all of its shapes at once: `shapes(config, weight, rank)`, by name."""

    def shape(config: Any, weight: WeightShape, rank: int) -> Shape | None:
        return shapes(config, weight, rank).get(name)

    return shape


Slots = Mapping[str, Slot]


def shapes(slots: Slots, config: Any, weight: WeightShape, rank: int) -> dict[str, Shape]:
    """The shapes of the trained tensors that a site has for itself, by name."""
    return _shapes({name: one for name, one in slots.items() if one.trained and not one.shared}, config, weight, rank)


def _shapes(slots: Slots, config: Any, weight: WeightShape, rank: int) -> dict[str, Shape]:
    found = {name: slot.shape(config, weight, rank) for name, slot in slots.items()}
    return {name: shape for name, shape in found.items() if shape is not None}


def wrong(slots: Slots, config: Any, weight: WeightShape, rank: int, leaf: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a leaf for a weight, or `None`; `rank` is the config's, which a padded leaf need not have."""
    checked = {name: slot for name, slot in slots.items() if slot.trained or slot.shared or slot.stored is not _never}
    found = {name: tuple(leaf[name].shape) for name in checked if name in leaf}
    expected: dict[str, Shape] = {}
    for one in (*_ranks_in(slots, weight, leaf), rank):
        expected = _shapes(checked, config, weight, one)
        # Not `shape in (one, other)`: Dynamo does not compare sizes that are dynamic there.
        if found.keys() == expected.keys() and all(
            slots[name].fits(shape, expected[name]) or shape == slots[name].also(config, weight, one)
            for name, shape in found.items()
        ):
            return None
    if found.keys() != expected.keys():
        has, wanted = (" and ".join(names) or "nothing" for names in (found, expected))
        return f"has {has}, expected {wanted} for a {weight.kind}"
    return f"has {_shown(found)}, expected {_shown(expected)}"


def _ranks_in(slots: Slots, weight: WeightShape, leaf: Mapping[str, Tensor]) -> list[int]:
    """What the rank of a leaf may be, by the axes that have it: LoRA has it once for each group, or expert."""
    axes = [(leaf[name], slot.rank) for name, slot in slots.items() if slot.rank is not None and name in leaf]
    found = [one.shape[axis] for one, axis in axes if axis < one.dim()]
    return [*(count * weight.groups // weight.experts for count in found), *(found if weight.groups > 1 else ())]


def _shown(shapes: Mapping[str, Shape]) -> str:
    return " and ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


def resized(slots: Slots, leaf: Leaf, rank: int) -> Leaf:
    """The leaf with another rank: cut, or filled up with zeros."""
    axes = {name: slots[name].rank for name in leaf if name in slots}
    return {name: sized(tensor, axes.get(name), rank) for name, tensor in leaf.items()}


def sized(tensor: Tensor, axis: int | None, count: int) -> Tensor:
    """The tensor with this size along an axis: cut, or filled up with zeros."""
    if axis is None or tensor.shape[axis] == count:
        return tensor
    kept = tensor.narrow(axis, 0, min(count, tensor.shape[axis]))
    missing = [*tensor.shape[:axis], count - kept.shape[axis], *tensor.shape[axis + 1 :]]
    return torch.cat([kept, tensor.new_zeros(missing)], axis) if missing[axis] else kept


def neutral(slots: Slots, like: Leaf) -> Leaf:
    """A leaf of these shapes that does nothing: zeros, or the slot's `off`."""
    return {
        name: torch.full_like(tensor, slots[name].off or 0, requires_grad=False) if name in slots else tensor
        for name, tensor in like.items()
    }


def disabled(slots: Slots, leaf: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The leaf, or one for each row, that does nothing where `keep` is false: nothing trained is left there.

    So no number of an adapter, and no NaN, gets to a row that is not its own, and no gradient from there to it.
    """
    keep = keep.bool()

    def one(name: str, tensor: Tensor) -> Tensor:
        off = slots[name].off if name in slots else None
        if off is None and (name not in slots or not slots[name].trained):
            return tensor
        off = off or 0
        return torch.where(keep.view((*keep.shape, *(1 for _ in tensor.shape[keep.dim() :]))), tensor, off)

    return {name: one(name, tensor) for name, tensor in leaf.items()}


def on_outputs(slots: Slots, leaf: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The leaf that makes those outputs alone where `keep`, (outputs,) or one for each of a stack, is not 0."""
    before, keep = keep.dim() - 1, keep.bool()

    def one(name: str, tensor: Tensor) -> Tensor:
        axis = slots[name].outputs
        if axis is None:
            return tensor
        ones = (1,) * (tensor.dim() - before - axis - 1)
        return torch.where(keep.view(*keep.shape[:before], *(1,) * axis, keep.shape[-1], *ones), tensor, 0)

    return {name: one(name, tensor) for name, tensor in leaf.items()}


def of_rows(slots: Slots, leaf: Leaf, rows: slice | Tensor, *, outputs: bool) -> Leaf:
    """The part of a leaf that makes some outputs of a matrix, or that reads some of its inputs."""
    axes = {name: slot.outputs if outputs else slot.inputs for name, slot in slots.items()}
    return {name: _rows(tensor, axes.get(name), rows) for name, tensor in leaf.items()}


def _rows(tensor: Tensor, axis: int | None, rows: slice | Tensor) -> Tensor:
    return tensor if axis is None else tensor[(*(slice(None) for _ in range(axis)), rows)]


def among(slots: Slots, leaf: Leaf, rows: Tensor, count: int) -> Leaf:
    """The leaf for `count` outputs that makes these `rows` of them, and is zero for the others."""
    axes = {name: slots[name].outputs for name in leaf if name in slots}
    return {name: _among(tensor, axes.get(name), rows, count) for name, tensor in leaf.items()}


def _among(tensor: Tensor, axis: int | None, rows: Tensor, count: int) -> Tensor:
    if axis is None:
        return tensor
    shape = (*tensor.shape[:axis], count, *tensor.shape[axis + 1 :])
    return tensor.new_zeros(shape).index_copy(axis, rows, tensor)


def same_sites(path: str, leaves: Sequence[Leaf | None]) -> list[Leaf]:
    """The leaves of a stack, each of which has to have this site."""
    found = [leaf for leaf in leaves if leaf is not None]
    if len(found) < len(leaves):
        raise ValueError(f"stack: only some of the adapters have the site {path}, and this method cannot fill it in.")
    return found
