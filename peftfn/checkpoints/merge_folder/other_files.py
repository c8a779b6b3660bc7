"""The files beside a merged folder's weights: the config, where the adapters change what it says; the rest, copied."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from peftfn.checkpoints import load_with_model, save_merged
from peftfn.checkpoints.merge_folder import shards
from peftfn.checkpoints.merge_folder.planning import Plan
from peftfn.checkpoints.merge_folder.tensor_names import Names
from peftfn.core import files, reading
from peftfn.core.adapter import Adapter
from peftfn.core.files import Write

NAME = "config.json"
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot"),
    ".index.json",
)
_NOT_COPIED = frozenset((NAME, files.CARD, files.CONFIG))
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
)


def read(folder: Path) -> dict[str, Any]:
    """The folder's config; empty where it has none."""
    return reading.read_json(folder / NAME) if (folder / NAME).is_file() else {}


def vocabularies(config: Any) -> set[int]:
    """The vocabulary sizes that a config names, for itself and for the models inside it."""
    if not isinstance(config, dict):
        return set()
    items = cast("dict[str, Any]", config).items()
    own = {value for name, value in items if "vocab" in name and isinstance(value, int)}
    return own.union(*(vocabularies(value) for _, value in items))


def writes(
    folder: Path,
    adapters: Sequence[Adapter],
    names: Names,
    plan: Plan,
    dtype: torch.dtype | None,
    tokenizer: Path | None,
    *,
    labels: Sequence[str] = (),
) -> dict[str, Write]:
    """What writes each of the files beside the weights, by name.

    Raises:
        ValueError: the class ties weights that have come apart, and cannot load them so.
    """
    found: dict[str, Write] = {}
    replaced = {name for name in _TOKENIZER if tokenizer is not None and (tokenizer / name).is_file()}
    for path in _beside(folder):
        name = path.relative_to(folder).as_posix()
        if not (replaced and name in _TOKENIZER):
            found[name] = _copy(path)
    found |= {name: _copy(cast("Path", tokenizer) / name) for name in replaced}
    text = _config(folder, adapters, names, plan, dtype, labels)
    if text is not None:
        found[NAME] = lambda path: path.write_text(text, encoding="utf-8")
    if (folder / shards.INDEX).is_file() and not (folder / shards.SINGLE).is_file():
        index = _index(folder, plan)
        found[shards.INDEX] = lambda path: path.write_text(index, encoding="utf-8")
    return found


def _beside(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in below.parts)
        if path.is_file() and not is_hidden and not path.name.endswith(_WEIGHTS) and str(below) not in _NOT_COPIED:
            yield path


def _copy(source: Path) -> Write:
    return lambda path: shutil.copyfile(source, path)


def _config(
    folder: Path,
    adapters: Sequence[Adapter],
    names: Names,
    plan: Plan,
    dtype: torch.dtype | None,
    labels: Sequence[str],
) -> str | None:
    config = read(folder)
    if not config:
        return None
    brought = {f"{path}.{name}" for one in adapters for path, leaf in one.params.items() for name in leaf}
    if names.model is not None and (plan.apart or plan.resized or brought & set(names.missing)):
        config = _of_model(names.model, plan)
    has_head = any(load_with_model.LABELS.search(f".{name}") for name in brought)  # else the head is the base's own
    named = _named(config, labels) if labels and has_head else config
    if named == read(folder) and dtype is None:
        return (folder / NAME).read_text(encoding="utf-8")
    config = named
    return json.dumps(_with_dtype(config, dtype) if dtype is not None else config, indent=2, sort_keys=True) + "\n"


def _named(config: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """The config with these names of the labels, by id."""
    ids = {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {n: i for i, n in enumerate(labels)},
    }
    return {key: value for key, value in config.items() if key != "num_labels"} | ids


def _of_model(model: Any, plan: Plan) -> dict[str, Any]:
    """The config as the class itself would write it, of a model that has changed."""
    changed = copy.copy(model)
    changed.__dict__["config"] = copy.deepcopy(model.config)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    inputs = next((f"{path}.weight" for path, module in model.named_modules() if module is embedding), None)
    if inputs in plan.resized:
        changed.config.get_text_config().vocab_size = plan.resized[inputs]
    if plan.apart:
        save_merged.untie(changed)
    changed.config.architectures = [type(model).__name__]
    return json.loads(changed.config.to_json_string(use_diff=True))


def _with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """The config with another dtype, for itself and for the models inside it."""
    if not isinstance(config, dict):
        return config
    name = str(dtype).removeprefix("torch.")
    items = cast("dict[str, Any]", config).items()
    made = {key: name if key in ("dtype", "torch_dtype") else _with_dtype(value, dtype) for key, value in items}
    top = "model_type" in made or "architectures" in made
    return made if not top or {"dtype", "torch_dtype"} & made.keys() else {**made, "dtype": name}


def _index(folder: Path, plan: Plan) -> str:
    index = reading.read_json(folder / shards.INDEX)
    where = {item.name: name for name, items in plan.files.items() for item in items}
    total = sum(item.size for items in plan.files.values() for item in items)
    metadata = {**index.get("metadata", {}), "total_size": total}
    return json.dumps({**index, "metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"
