"""What a method acts on, and what it does there: weights, whole attention modules, or the call of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from peftfn.core.row_runs import Runs
from peftfn.models.layers import Site
from peftfn.models.layouts import WeightShape

Merge = Callable[[Any, Mapping[str, Tensor], WeightShape, Mapping[str, Tensor]], Mapping[str, Tensor]]


def one_by_one(kind: str, rows: Runs | None) -> bool:
    """`False`, the default of `takes_rows`: the method's forward takes one leaf at a time."""
    return False


class OnWeights(NamedTuple):
    """A method that changes weights, and so can be merged. `peftfn.methods.builders` makes one of one or two functions.

    Attributes:
        kinds: the kinds of layer that it acts on; it is refused on others.
        forward: `(config, leaf, site, x, ...) -> y`, what the layer then computes; `leaf` has params and buffers.
        merge: `(config, leaf, shape, tensors) -> tensors`: of the layer's dense `weight` and its `bias`, if it has one
            and `reads` names it, those that change. A tensor that the base reads itself comes alone, as the `weight`.
        reads: those of the layer's tensors that `merge` is given; the others stay as they are.
        takes_rows: `(kind, rows of the site) -> whether forward takes a leaf of which each tensor has an axis for the
            rows of x before the others`; where it does not, `torch.vmap` gives it one row at a time.
        takes_parts: whether it acts on a part of a fused projection, some output rows of a layer.
        by_rows: whether some rows of a matrix can be merged alone, with those rows of the leaf.
        of_tables: whether it is about a table of rows, which it changes alike whatever kind of layer has it: one in an
            embedding also where another layer holds the same (a tied output layer).
    """

    kinds: Sequence[str]
    forward: Callable[..., Any]
    merge: Merge
    reads: Sequence[str] = ("weight", "bias")
    takes_rows: Callable[[str, Runs | None], bool] = one_by_one
    takes_parts: bool = False
    by_rows: bool = False
    of_tables: bool = False


class OnAttention(NamedTuple):
    """A method that acts on whole attention modules. They have no weight, so there is nothing to merge.

    Attributes:
        forward: `(config, leaf, site, *args, **kwargs) -> what the module returns`; where each row has a leaf of its
            own, the tensors have an axis for the rows before the others.
        check: `(leaf, site) -> what is wrong with the leaf's names or shapes`, or `None`.
        disabled: `(leaf of each row, keep) -> leaf` that does nothing where `keep` is false.
    """

    forward: Callable[..., Any]
    check: Callable[[Mapping[str, Tensor], Site], str | None]
    disabled: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]


def _itself(model: nn.Module) -> Sequence[str]:
    return ("",)


class OnCall(NamedTuple):
    """A method that changes what the model is given, such as a prompt.

    Attributes:
        forward: `(config, leaf, site, call) -> call`, on a `peftfn.methods.prompt.model_call.Call`; the site's layer is
            the model.
        check: as of `OnAttention`.
        disabled: as of `OnAttention`.
        call_sites: `(model) -> paths` of the modules whose call is changed.
        encoded: of a method with a network that makes its prompts, `(config, leaf, site) -> leaf` with the prompt that
            it makes: this runs once for each adapter, whatever the number of its rows.
        arguments: names of arguments of the model's call that are for the method alone: the model is not given them.
    """

    forward: Callable[..., Any]
    check: Callable[[Mapping[str, Tensor], Site], str | None]
    disabled: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]
    call_sites: Callable[[nn.Module], Sequence[str]] = _itself
    encoded: Callable[[Any, Mapping[str, Tensor], Site], Mapping[str, Tensor]] | None = None
    arguments: Sequence[str] = ()
