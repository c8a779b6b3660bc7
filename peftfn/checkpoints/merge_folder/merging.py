"""`merge_folder`: a model's folder with adapters merged in, file by file, without the model in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftfn.checkpoints import checkpoint, load_with_model
from peftfn.checkpoints.merge_folder import other_files, planning, shards, tensor_names, unfinished, writing
from peftfn.checkpoints.merge_folder.planning import Plan
from peftfn.checkpoints.merge_folder.shards import Shard
from peftfn.checkpoints.merge_folder.tensor_names import Names
from peftfn.core import files, reading
from peftfn.core.adapter import Adapter, as_tuple
from peftfn.models import matching
from peftfn.ops.validate import refuse_not_finite


def merge_folder(
    folder: str | Path,
    adapter: Adapter | str | Path | Iterable[Adapter | str | Path],
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    safe: bool = False,
    overwrite: bool = False,
    model: nn.Module | None = None,
    tokenizer: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """The folder `output`, which `from_pretrained` loads as the base of `folder` with the adapters merged in.

    The weights go from file to file: a few blocks of rows are in memory at a time, or about three tensors where a
    method has nothing for rows alone or tensors change together; what no adapter touches is copied by the kernel. The
    values are those of `merge`: for LoRA W + s·B·A (https://arxiv.org/abs/2106.09685), rounded once to the dtype of W.
    Files, their order and their keys stay as they are, and so do the tokenizer and whatever else lies beside them, but
    for weights of other formats and the model card. The config is changed only where the adapters change what it says:
    a head, a vocabulary that has grown, embeddings that are no longer tied, a dtype.

    The output is whole or not there. Killed at any moment and called again with the same arguments, it goes on: what
    was written is not computed again. Until then the work lies in `.<output>.unfinished` beside it.

    Args:
        folder: of the base: safetensors weights, in one file or several, and a config.json.
        adapter: one adapter or several, merged in order; or their folders or hub ids, of which those that `peftfn
            train` has written also say what the labels are called.
        output: a new or an empty folder.
        dtype: of the weights; then they are merged as if the base had been loaded in it. By default, each its own.
        safe: whether to refuse weights that NaN or infinity has got into.
        overwrite: whether to replace a folder that is there, once the new one is whole.
        model: the base, on the meta device or not, where names do not settle what the adapter acts on; only its
            structure and its config are read. By default it is made from config.json, when it is needed.
        tokenizer: a folder whose tokenizer takes the place of the base's.
        progress: whether to show a bar.

    Raises:
        FileNotFoundError: the base has no safetensors weights, or an adapter is not there.
        FileExistsError: the output is there already, or is being made by another process.
        NotADirectoryError: the output is a file.
        KeyError: neither the files nor the model have what an adapter changes.
        ValueError: a file is not whole, something does not fit, or a weight would be NaN or infinite.
        TypeError: an adapter is a stack, or something else than an adapter or a path.
        OSError: the disk is full; called again, it goes on.

    Example:
        >>> import tempfile, torch, transformers, peftfn as pf
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> folder = tempfile.mkdtemp()
        >>> model = transformers.LlamaForCausalLM(config)
        >>> model.save_pretrained(folder)
        >>> adapter = pf.init(model, pf.LoraConfig(r=2, target_modules=["q_proj"]))
        >>> output = pf.merge_folder(folder, adapter, folder + "-merged", progress=False)
        >>> type(transformers.AutoModelForCausalLM.from_pretrained(output)).__name__
        'LlamaForCausalLM'
    """
    folder, output = Path(folder), Path(output)
    adapters, labels = _loaded(adapter)
    labels = labels or _labels_of(model)
    _check(folder, adapters)
    found = shards.find(folder)
    names, plan = _plan(folder, found, adapters, dtype, model)
    others = other_files.writes(
        folder, adapters, names, plan, dtype, Path(tokenizer) if tokenizer else None, labels=labels
    )
    layouts = {shard.path.name: shards.layout(plan.files[shard.path.name], shard.metadata) for shard in found}
    what = _digest(found, adapters, layouts, f"{dtype} {labels}")
    with unfinished.making(output, what, overwrite) as work:
        if work is not None:
            jobs = [writing.Job(work.folder / name, *layout) for name, layout in layouts.items()]
            entries = {key: entry for shard in found for key, entry in shard.entries.items()}
            with _bar(sum(job.size for job in jobs), progress) as bar:
                for job in jobs:
                    writing.write(job, plan.units, entries, safe, bar)
            for name, write in others.items():
                files.write_atomic(work.folder / name, write)
    return output


def _loaded(given: Adapter | str | Path | Iterable[Adapter | str | Path]) -> tuple[tuple[Adapter, ...], list[str]]:
    """The adapters, and the names of the labels that the last of their folders knows."""
    several: Any = [given] if isinstance(given, (Adapter, str, Path)) else given
    if not isinstance(several, (list, tuple)):
        return as_tuple(several), []  # it refuses them, and says what was expected
    several = cast("Sequence[Adapter | str | Path]", several)
    origins = [reading.Origin(str(one)) for one in several if isinstance(one, (str, Path))]
    pinned = [reading.pinned(origin, reading.find(origin, files.CONFIG)) for origin in origins]
    known = [names for names in map(load_with_model.trained_labels, pinned) if names]
    read = [checkpoint.load(one, mmap=True) if isinstance(one, (str, Path)) else one for one in several]
    return as_tuple(read), known[-1] if known else []


def _labels_of(model: Any) -> list[str]:
    """The names of the labels in a model's config, if somebody gave them."""
    names: dict[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
    return list(names.values()) if any(name != f"LABEL_{number}" for number, name in names.items()) else []


def can_stream(folder: Path) -> bool:
    """Whether the folder's weights are safetensors that are what the model computes with, not packed ones."""
    there = (folder / shards.SINGLE).is_file() or (folder / shards.INDEX).is_file()
    return there and "quantization_config" not in other_files.read(folder)


def _check(folder: Path, adapters: Sequence[Adapter]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected the folder of a model, with its safetensors weights.")
    for one in adapters:
        if not isinstance(one, Adapter):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"merge_folder was given a {type(one).__name__}; expected a peftfn.Adapter (peftfn.load).")
        if one.members is not None:
            raise TypeError("merge_folder was given a stack; give its adapters one by one (peftfn.unstack).")
        refuse_not_finite(one)


def _plan(
    folder: Path, found: Sequence[Shard], adapters: Sequence[Adapter], dtype: torch.dtype | None, model: Any
) -> tuple[Names, Plan]:
    """By the files' own names where they settle everything, else by those of the model."""
    shapes = {key: planning.meta(entry) for shard in found for key, entry in shard.entries.items()}
    config = other_files.read(folder)
    if "quantization_config" in config:
        raise ValueError(
            f"{folder} holds quantized weights, and its files are not what the model computes with. Load it, and merge "
            "in memory: peftfn.bind(model, adapter).save_pretrained(output)."
        )
    if model is None:
        names = tensor_names.plain(shapes)
        try:
            plan = planning.make(found, adapters, names, dtype)
            sizes = other_files.vocabularies(config)
            has_head = any(one.config.task_type in matching.HEADS for one in adapters)  # which the folder may lack
            if not config or not (has_head or plan.resized or _touches_vocabulary(plan, shapes, sizes)):
                return names, plan
        except (KeyError, ValueError):
            if not config:
                raise
        model = tensor_names.model_of(str(folder), adapters)
    names = tensor_names.of_model(model, shapes)
    plan = planning.make(found, adapters, names, dtype)
    brought = {f"{path}.{name}" for one in adapters for path, leaf in one.params.items() for name in leaf}
    if lost := [name for name in names.missing if name not in brought]:
        raise ValueError(
            f"{', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}: neither the base nor the adapter has these "
            f"weights, which {type(model).__name__} needs; give the folder that the adapter was trained on."
        )
    return names, plan


def _touches_vocabulary(plan: Plan, shapes: Mapping[str, Tensor], sizes: set[int]) -> bool:
    """Whether something is made that the class may tie: only the model knows that."""
    return any(sizes & set(shapes[key].shape) for key in plan.units if key in shapes and shapes[key].dim())


def _digest(found: Sequence[Shard], adapters: Sequence[Adapter], layouts: Mapping[str, Any], dtype: str) -> str:
    """A digest of the work: equal where the arguments and the base's files are."""
    made = hashlib.sha256(repr((layouts, dtype)).encode())
    for shard in found:
        state = shard.path.stat()
        made.update(repr((shard.path.name, state.st_size, state.st_mtime_ns)).encode())
    for one in adapters:
        made.update(repr(one.config).encode())
        for tree in (one.params, one.buffers):
            for path, leaf in tree.items():
                for name, tensor in leaf.items():
                    made.update(f"{path}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    made.update(shards.as_bytes(tensor))
    return made.hexdigest()


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm  # comes with transformers

    return tqdm(total=total, unit="B", unit_scale=True, desc="merging", dynamic_ncols=True, disable=not progress)
