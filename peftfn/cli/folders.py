"""Adapter folders: what is in one, one in another layout, one merged into its base."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import peftfn as pf
from peftfn import methods
from peftfn.checkpoints.merge_folder import merging
from peftfn.cli.bases import from_pretrained, load_model, quiet
from peftfn.cli.errors import UserError
from peftfn.cli.train import state
from peftfn.core import files, hub

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The transformers class that loads the base of an adapter, by PEFT's task type."""


DTYPES = ("auto", "float32", "bfloat16", "float16")


def base_name(adapter: pf.Adapter, given: str | None) -> str:
    """The base's folder or hub id: given, or as the adapter's config has it."""
    name = given or adapter.config.base_model_name_or_path
    if not name:
        raise UserError("the adapter's config does not name its base; give --model")
    return name


def head_labels(adapter: pf.Adapter, folder: str) -> list[str]:
    """The label names of an adapter with a head of its own: from its training, or as many as the head has rows."""
    if labels := state.read_run(Path(folder)).get("columns", {}).get("labels"):
        return list(labels)
    for site, leaf in adapter.params.items():
        # a saved head is a replacement weight; of a head of several layers the last one decides
        if site.split(".")[0] in ("classifier", "score") and "weight" in leaf and not site.endswith(".dense"):
            return [f"LABEL_{i}" for i in range(leaf["weight"].shape[0])]
    return []


def class_name(adapter: pf.Adapter, name: str) -> str:
    """The transformers class of the adapter's base: by task, else as the adapter or the base itself names it."""
    if adapter.config.task_type is not None:
        return AUTO_CLASSES[adapter.config.task_type]
    config = from_pretrained("AutoConfig", name, revision=adapter.config.revision)
    named = ((adapter.config.auto_mapping or {}).get("base_model_class"), *(config.architectures or ()))
    return next((str(one) for one in named if one and hasattr(transformers, str(one))), "AutoModel")


def load_base_of(
    adapter: pf.Adapter, folder: str, model: str | None, dtype: str, device: torch.device
) -> tuple[Any, list[str]]:
    """The base that the adapter was made for, and the modules of it that its folder lacks."""
    name, config = base_name(adapter, model), adapter.config
    labels = head_labels(adapter, folder)
    if labels[:1] == ["LABEL_0"] and len(labels) == from_pretrained("AutoConfig", name).num_labels:
        labels = []  # the base has that many, with names
    seed = state.read_run(Path(folder)).get("settings", {}).get("seed", 0)
    kind = class_name(adapter, name)
    return load_model(name, kind, labels, revision=config.revision, dtype=dtype, device=device, seed=seed)


def untrained(new: Sequence[str], adapter: pf.Adapter) -> list[str]:
    """Those new modules of a base that the adapter does not replace: their weights are random."""
    sites = [site + "." for site in adapter.params]
    return [one for one in new if not any(s.startswith(one + ".") or (one + ".").startswith(s) for s in sites)]


def merge(
    source: str, output: str, model: str | None, dtype: str, device: torch.device, *, safe: bool, overwrite: bool
) -> Path:
    """Write a plain model folder whose weights are base and adapter together; its path.

    From file to file (`peftfn.merge_folder`), or through the model where the files are not what it computes with.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: give one of {', '.join(DTYPES)}")
    adapter = pf.load(source, mmap=True)
    if methods.of(adapter.config).on_weights is None:
        raise UserError(
            f"{source} is a {adapter.config.peft_type} adapter, which changes what the model is given and none of its "
            "weights, so there is nothing to merge; run it with peftfn.apply or peftfn.bind"
        )
    target = Path(output)
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output} is there already; give a folder that is new or empty, or --overwrite")
    quiet()
    folder = hub.fetch(base_name(adapter, model), adapter.config.revision)
    with files.naming_what_has_no_room(target):
        if not merging.can_stream(folder):
            return _merge_in_memory(adapter, source, target, model, dtype, device)
        return pf.merge_folder(
            folder,
            source,
            target,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            safe=safe,
            overwrite=overwrite,
            tokenizer=source if (Path(source) / "tokenizer_config.json").is_file() else None,
            progress=sys.stderr.isatty(),
        )


def _merge_in_memory(
    adapter: pf.Adapter, source: str, target: Path, model: str | None, dtype: str, device: torch.device
) -> Path:
    base, new = load_base_of(adapter, source, model, dtype, device)
    if left := untrained(new, adapter):
        raise UserError(f"{', '.join(left)}: neither the base nor the adapter has these weights; give another --model")
    temporary = target.absolute().with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        bound: Any = pf.bind(base, adapter)
        bound.save_pretrained(temporary, merge=True)
        with contextlib.suppress(UserError):  # a model of images has none
            from_pretrained("AutoTokenizer", base_name(adapter, model)).save_pretrained(temporary)
        if target.exists():
            shutil.rmtree(target)  # empty, or to be replaced
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def convert(source: str, output: str, subfolder: str | None = None, adapter_name: str | None = None) -> pf.Adapter:
    """Write the adapter in `source`, whatever PEFT's layout, as `output` in today's; the adapter."""
    adapter = pf.load(source, subfolder=subfolder, adapter_name=adapter_name)
    pf.save(adapter, output)
    return adapter


def _total(adapter: pf.Adapter, folder: str, model: str | None) -> int | None:
    """Parameters of base and adapter: from the training's record, or counted in an empty copy of `model`."""
    if model is None:
        return state.read_run(Path(folder)).get("parameters")
    config = from_pretrained("AutoConfig", model)
    labels = head_labels(adapter, folder)
    if labels:
        config.num_labels = len(labels)
    kind: Any = getattr(transformers, class_name(adapter, model))
    make: Any = kind.from_config if hasattr(kind, "from_config") else kind
    with torch.device("meta"):
        return pf.count(adapter, make(config)).total


def changed_fields(config: Any) -> dict[str, Any]:
    """The config's fields that differ from their default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = getattr(config, field.name)
        if value != default and value not in (None, (), {}, []):
            found[field.name] = value
    return found


def _rows(adapter: pf.Adapter) -> list[tuple[str, str, str, str]]:
    return [
        (
            (site or "(the model)") if first else "",
            name,
            "×".join(map(str, tensor.shape)) or "1",
            str(tensor.dtype).removeprefix("torch."),
        )
        for site, leaf in adapter.params.items()
        for first, (name, tensor) in zip([True, *[False] * len(leaf)], leaf.items(), strict=False)
    ]


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as text, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def inspect(folder: str, model: str | None = None, subfolder: str | None = None) -> str:
    """What the adapter in `folder` is, as text. The base is not loaded, nor needed."""
    adapter = pf.load(folder, subfolder=subfolder)
    config = adapter.config
    trained = pf.count(adapter).trained
    total = _total(adapter, folder, model)
    share = f"{trained / total:.2%} of {total:,} with the base" if total else "give --model for their share"
    fields = [(f"  {name}", str(value)) for name, value in changed_fields(config).items()]
    return "\n".join(
        [
            f"method   {config.peft_type} ({type(config).__name__})",
            f"base     {config.base_model_name_or_path or 'not named in the config'}",
            f"sites    {len(adapter.params)}",
            f"trained  {trained:,} parameters, {share}",
            "",
            "config, where it differs from the default" + ("" if fields else ": nowhere"),
            *([table(fields)] if fields else []),
            "",
            table([("site", "tensor", "shape", "type"), *_rows(adapter)]),
        ]
    )
