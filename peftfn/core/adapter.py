"""An adapter: a frozen pytree of tensors, for `torch.func` and for optree alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import optree
import torch.utils._pytree as torch_pytree
from torch import Tensor

from peftfn.core.config import PeftConfig
from peftfn.core.config_values import FrozenDict
from peftfn.core.row_runs import Runs
from peftfn.core.transforms import OPTREE_GLOBAL

Leaf = dict[str, Tensor]
"""The tensors of one adapter at one site, by name."""

Tree = dict[str, Leaf]
"""Leaves by the path of their site."""

SHARED = "*"
"""The path of tensors that all sites of an adapter have in common; below it (`*.name`) are those of some sites."""


PRESENT = "present_in_stack"
"""The buffer of a stack that says who acts at a site: (K,), or (K, outputs) where some act on a part of a layer.

It is there where what fills an adapter up to the others' sites would else be trained.
"""


class SiteInfo(NamedTuple):
    """What an adapter knows of one of its sites beside the tensors there.

    Attributes:
        kind: the kind of layer that it was made for, of those in `peftfn.models.layers`; "" where that is not known.
        rows: the output rows that it acts on, where they are a part of a fused projection
            (`peftfn.models.fused_projections`).
        outputs: how many output rows that projection has; 0 where `rows` is `None`.
        input_side: whether it acts on what goes in there, of a method that could act on either side.
        tied: other layers that were found to hold the same table, for files, which have a copy of the tensors for each.
        shares: the path of the leaf that it has in common with other sites, `SHARED` or one below it; "" for none.
    """

    kind: str = ""
    rows: Runs | None = None
    outputs: int = 0
    input_side: bool = False
    tied: tuple[str, ...] = ()
    shares: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What a file's note says of it; the rest follows from the config and the keys."""
        part = {} if self.rows is None else {"rows": self.rows, "outputs": self.outputs}
        shares = {} if self.shares in ("", SHARED) else {"shares": self.shares}
        return {"kind": self.kind, **part, **shares}

    @classmethod
    def from_dict(cls, noted: Mapping[str, Any]) -> SiteInfo:
        """The inverse of `to_dict`."""
        rows = tuple((start, end) for start, end in noted["rows"]) if "rows" in noted else None
        outputs, shares = int(noted.get("outputs", 0)), str(noted.get("shares", ""))
        return cls(noted.get("kind", ""), rows, outputs, shares=shares)


Sites = Mapping[str, SiteInfo]
"""What is known of sites, by path."""

UNKNOWN = SiteInfo()
NO_SITES: Sites = FrozenDict({})


class Members(NamedTuple):
    """What a stack knows of its adapters.

    Attributes:
        configs: their configs, in order.
        paths: each one's own site paths; elsewhere its slice of the stack does nothing.
        sites: what each one knows of its sites.
        axes: how many axes the first parameter of the stack has; under `torch.vmap` it has one less.
        buffer_axes: the same of the first buffer.
    """

    configs: Sequence[PeftConfig]
    paths: Sequence[Sequence[str]]
    sites: Sequence[Sites]
    axes: int
    buffer_axes: int


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
        config: the frozen config; of a stack, one that says what holds for all of its adapters.
        sites: what is known of each site beside its tensors: kind of layer, part of a fused projection.
        members: of a stack, what it knows of its adapters; `None` of a single adapter.

    It is a pytree for `torch.func` and for optree: the tensors in `params` and `buffers` are its leaves, the other
    three are static. Both are kept sorted, so that the order of torch (insertion) and of optree (sorted keys) agree.

    Example:
        >>> import torch, peftfn as pf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
        >>> adapter
        Adapter(LoraConfig, 1 sites)
          0: lora_A 2×4, lora_B 3×2
        >>> adapter.buffers["0"]["scaling"], adapter.sites["0"].kind
        (tensor(4.), 'linear')
    """

    params: Tree
    buffers: Tree
    config: PeftConfig
    sites: Sites = NO_SITES
    members: Members | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sites, FrozenDict):
            object.__setattr__(self, "sites", FrozenDict(self.sites))

    def replace(self, **changes: Any) -> Adapter:
        """A copy with other `params`, `buffers`, `config`, `sites` or `members`; the adapter itself stays as it is.

        Args:
            **changes: new values of attributes, by name.

        Raises:
            TypeError: a name is none of the attributes.

        Example:
            >>> import torch, peftfn as pf
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
            >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["0"]))
            >>> params = {"0": {name: tensor + 1 for name, tensor in adapter.params["0"].items()}}
            >>> adapter.replace(params=params).params["0"]["lora_B"][0]
            tensor([1., 1.])
        """
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        """Method, and the shapes at each site: the numbers themselves are in `params` and `buffers`."""
        params: Any = self.params  # a function mapped over an adapter may have put anything there
        if not isinstance(params, dict):
            return f"Adapter({type(self.config).__name__}, params={params!r})"
        sites = cast("Mapping[str, Any]", params)
        count = f", {len(self.members.configs)} adapters" if self.members else ""
        rows = [f"  {site or '(the model)'}: {_shapes(leaf)}" for site, leaf in list(sites.items())[:_SHOWN]]
        more = [f"  and {len(sites) - _SHOWN:,} more"] if len(sites) > _SHOWN else []
        return "\n".join([f"Adapter({type(self.config).__name__}, {len(sites):,} sites{count})", *rows, *more])


def _shapes(leaf: Any) -> str:
    if not isinstance(leaf, dict):
        return type(leaf).__name__
    items = cast("Mapping[str, Any]", leaf).items()
    return ", ".join(
        f"{n} {'×'.join(map(str, t.shape)) or '1' if isinstance(t, Tensor) else repr(t)}" for n, t in items
    )


def sorted_tree(tree: Mapping[str, Mapping[str, Tensor]]) -> Tree:
    """The same tree with sites and names in sorted order, and without empty leaves."""
    return {path: dict(sorted(tree[path].items())) for path in sorted(tree) if tree[path]}


def is_shared(path: str) -> bool:
    """Whether a path is not a site's, but that of tensors which several sites have in common."""
    return path.startswith(SHARED)


def site_paths(adapter: Adapter) -> list[str]:
    """The paths of an adapter's sites, and of modules that it replaces, sorted."""
    return sorted(path for path in {**adapter.params, **adapter.buffers} if not is_shared(path))


def leaf_of(adapter: Adapter, path: str) -> Leaf:
    """An adapter's tensors at one site: params and buffers, the site's own and those that it shares."""
    home = adapter.sites.get(path, UNKNOWN).shares
    shared = {**adapter.params.get(home, {}), **adapter.buffers.get(home, {})} if home else {}
    return {**shared, **adapter.params.get(path, {}), **adapter.buffers.get(path, {})}


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

    Args:
        adapter: one adapter or several; their tensors come in order.

    Raises:
        TypeError: something else was given.

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


Static = tuple[PeftConfig, Sites, Members | None]


def _flatten(adapter: Adapter) -> tuple[tuple[Tree, Tree], Static]:
    return (adapter.params, adapter.buffers), (adapter.config, adapter.sites, adapter.members)


def _unflatten(children: Iterable[Any], static: Static) -> Adapter:
    params, buffers = children
    return Adapter(params, buffers, *static)


def _flatten_for_optree(adapter: Adapter) -> tuple[tuple[Tree, Tree], Static, tuple[str, str]]:
    return *_flatten(adapter), ("params", "buffers")


def _unflatten_for_optree(static: Static, children: Iterable[Any]) -> Adapter:
    return _unflatten(children, static)


def _flatten_with_keys(adapter: Adapter) -> tuple[list[tuple[Any, Any]], Static]:
    (params, buffers), static = _flatten(adapter)
    return [(torch_pytree.GetAttrKey("params"), params), (torch_pytree.GetAttrKey("buffers"), buffers)], static


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
