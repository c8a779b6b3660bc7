"""An adapter: a frozen pytree of tensors, for `torch.func` and for optree alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import optree
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from peftfn.transforms import OPTREE_GLOBAL

if TYPE_CHECKING:
    from peftfn.config import PeftConfig

Leaf = dict[str, Tensor]
"""The tensors of one adapter at one site, by name."""

Tree = dict[str, Leaf]
"""Leaves by the path of their site."""


_SHOWN = 12
"""Sites that an adapter's repr names."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Tensors that change what a frozen base computes, and the config that says how.

    Attributes:
        params: what is trained, `site path -> {name -> tensor}`; for LoRA on a linear layer
            `{"encoder.layer.0.query": {"lora_A": (r, in), "lora_B": (out, r)}}`. A name that is a parameter of
            the base's module (`weight`, `bias`) replaces that parameter: this is how `modules_to_save` and
            trained biases are held.
        buffers: what is not trained, nested the same way (LoRA: `scaling`, a 0-d tensor).
        config: the frozen config; static for every transform. A stack has a `peftfn.stacking.Stacked` here.

    Both mappings are kept sorted, so that `torch.func` (insertion order) and optree (sorted keys) agree.
    """

    params: Tree
    buffers: Tree
    config: PeftConfig

    def replace(self, **changes: Any) -> Adapter:
        """This adapter with other `params`, `buffers` or `config`: `adapter.replace(params=new)`."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        """Method, and the shapes at each site: the numbers themselves are in `params` and `buffers`."""
        params: Any = self.params  # a function mapped over an adapter may have put anything there
        if not isinstance(params, dict):
            return f"Adapter({type(self.config).__name__}, params={params!r})"
        sites = cast("Mapping[str, Any]", params)
        rows = [f"  {site or '(the model)'}: {_shapes(leaf)}" for site, leaf in list(sites.items())[:_SHOWN]]
        more = [f"  and {len(sites) - _SHOWN:,} more"] if len(sites) > _SHOWN else []
        return "\n".join([f"Adapter({type(self.config).__name__}, {len(sites):,} sites)", *rows, *more])


def _shapes(leaf: Any) -> str:
    if not isinstance(leaf, dict):
        return type(leaf).__name__
    items = cast("Mapping[str, Any]", leaf).items()
    return ", ".join(
        f"{n} {'×'.join(map(str, t.shape)) or '1' if isinstance(t, Tensor) else repr(t)}" for n, t in items
    )


class Count(NamedTuple):
    """How many numbers are trained, and how many there are in all."""

    trained: int
    total: int

    @property
    def share(self) -> float:
        """Trained over total, between 0 and 1."""
        return self.trained / max(self.total, 1)

    def __str__(self) -> str:
        return f"trained {self.trained:,} of {self.total:,} parameters ({self.share:.2%})"


def sorted_tree(tree: Mapping[str, Mapping[str, Tensor]]) -> Tree:
    """The same tree with sites and names in sorted order, and without empty leaves."""
    return {path: dict(sorted(tree[path].items())) for path in sorted(tree) if tree[path]}


def as_tuple(adapters: Adapter | Iterable[Adapter]) -> tuple[Adapter, ...]:
    """One adapter or several as a tuple; anything else is a `TypeError` that names what it was."""
    found: Any = (adapters,) if isinstance(adapters, Adapter) else adapters
    given = type(adapters).__name__
    if isinstance(found, (tuple, list)):
        several = cast("Sequence[Any]", found)
        if all(isinstance(one, Adapter) for one in several):
            return tuple(several)
        given += " of " + ", ".join(sorted({type(one).__name__ for one in several}))
    raise TypeError(
        f"adapter is a {given}; expected a peftfn.Adapter or a tuple of them, as peftfn.init and peftfn.load "
        "return it (an empty tuple is the bare base)."
    )


def leaves(adapter: Adapter | Iterable[Adapter]) -> list[Tensor]:
    """The trained tensors, in the form a `torch.optim` optimizer takes.

    They are the adapter's own tensors, and from now on they require grad: an optimizer changes them in place.
    Functional training (`torch.func.grad` on `adapter.params`) has no need of this function.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> [tuple(t.shape) for t in pf.leaves(adapter)]
        [(2, 4), (4, 2)]
    """
    return [
        tensor.requires_grad_(True)
        for one in as_tuple(adapter)
        for leaf in one.params.values()
        for tensor in leaf.values()
    ]


def count(adapter: Adapter | Iterable[Adapter], model: nn.Module | None = None) -> Count:
    """How many numbers the adapter trains, of how many in all.

    Args:
        adapter: one adapter or several.
        model: the base. With it the total is the base's parameters and the adapter's together, as PEFT's
            `print_trainable_parameters` counts; without it, the adapter's tensors alone.
    """
    adapters = as_tuple(adapter)
    trained = sum(t.numel() for one in adapters for leaf in one.params.values() for t in leaf.values())
    if model is None:
        rest = sum(t.numel() for one in adapters for leaf in one.buffers.values() for t in leaf.values())
    else:
        rest = sum(parameter.numel() for parameter in model.parameters())
    return Count(trained, trained + rest)


def _flatten(adapter: Adapter) -> tuple[tuple[Tree, Tree], PeftConfig]:
    return (adapter.params, adapter.buffers), adapter.config


def _unflatten(children: Iterable[Any], config: PeftConfig) -> Adapter:
    params, buffers = children
    return Adapter(params, buffers, config)


def _flatten_for_optree(adapter: Adapter) -> tuple[tuple[Tree, Tree], PeftConfig, tuple[str, str]]:
    return (adapter.params, adapter.buffers), adapter.config, ("params", "buffers")


def _unflatten_for_optree(config: PeftConfig, children: Iterable[Any]) -> Adapter:
    return _unflatten(children, config)


def _flatten_with_keys(adapter: Adapter) -> tuple[list[tuple[Any, Any]], PeftConfig]:
    names = (torch_pytree.GetAttrKey("params"), torch_pytree.GetAttrKey("buffers"))
    return [(names[0], adapter.params), (names[1], adapter.buffers)], adapter.config


torch_pytree.register_pytree_node(
    Adapter,
    cast("Any", _flatten),
    cast("Any", _unflatten),
    flatten_with_keys_fn=cast("Any", _flatten_with_keys),
    serialized_type_name="peftfn.Adapter",
)
optree.register_pytree_node(
    cast("Any", Adapter), cast("Any", _flatten_for_optree), cast("Any", _unflatten_for_optree), namespace=OPTREE_GLOBAL
)
