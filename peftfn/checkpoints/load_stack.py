"""`load_stack`: adapters from several folders, as one stack."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn

from peftfn.checkpoints.checkpoint import load
from peftfn.core.adapter import Adapter
from peftfn.ops.stacking import stack


def load_stack(
    folders: Iterable[str | Path], model: nn.Module | None = None, *, device: str | torch.device = "cpu"
) -> Adapter:
    """The adapters in these folders (or hub repositories) as one stack, in this order.

    The files are mapped into memory and copied once, into the stack; `peftfn.stack` says what may differ between them.
    A stack is a value: adapters are added and dropped by making another one. Where there are more adapters than a batch
    uses, keep them mapped in a dictionary of your own, and stack those that it needs:
    `registry[name] = pf.load(folder, mmap=True)`, then `pf.stack([registry[name] for name in names])`.

    Args:
        folders: what `load` takes.
        model: the base, to hold each adapter against.
        device: where the stack goes.

    Raises:
        ValueError: there is no folder, or what is in them cannot be stacked.
        TypeError: one path was given in place of several; or as `load`.
        FileNotFoundError, KeyError: as `load`.

    Example:
        >>> import tempfile, torch, peftfn as pf
        >>> model, root = torch.nn.Sequential(torch.nn.Linear(4, 2)), tempfile.mkdtemp()
        >>> for name, r in (("a", 2), ("b", 3)):
        ...     _ = pf.save(pf.init(model, pf.LoraConfig(r=r, target_modules=["0"])), f"{root}/{name}")
        >>> stacked = pf.load_stack([f"{root}/a", f"{root}/b"], model)
        >>> pf.apply(model, stacked, torch.ones(3, 4), index=[1, -1, 0]).shape
        torch.Size([3, 2])
    """
    if isinstance(folders, (str, Path)):
        raise TypeError(f"load_stack was given one path, {str(folders)!r}; expected several. One adapter: peftfn.load.")
    stacked = stack([load(folder, model, mmap=True) for folder in folders])
    if torch.device(device).type == "cpu":
        return stacked

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return torch_pytree.tree_map(moved, stacked)
