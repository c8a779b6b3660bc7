"""The two tasks, as tuples of functions in one table: text to examples, examples to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn import signatures
from peftfn.cli import tables
from peftfn.cli.errors import UserError
from peftfn.cli.settings import DataSettings

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""


class Examples(NamedTuple):
    """Encoded rows: token ids, and for classification one label id each (for a language model: none)."""

    ids: list[list[int]]
    labels: list[int]

    def digest(self) -> str:
        """A hash of every id and label: equal for the same examples in the same order."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for ids in self.ids:
            digest.update(repr(ids).encode())
        return digest.hexdigest()


class Columns(NamedTuple):
    """Which columns are read, and the names of the labels by id (empty for a language model)."""

    text: str
    label: str | None
    labels: list[str]


class Task(NamedTuple):
    """How one task encodes rows and counts what a batch is worth."""

    auto_class: str  # the transformers class that loads the base
    unit: str  # what throughput is counted in
    encode: Callable[[tables.Table, Columns, Any, DataSettings], Examples]
    batch: Callable[[Examples, Sequence[int], int], dict[str, Tensor]]
    weight: Callable[[dict[str, Tensor]], int]  # over how many terms the model's loss is a mean


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])  # (rows, longest)


def _inputs(examples: Examples, chosen: Sequence[int], pad: int) -> dict[str, Tensor]:
    rows = [examples.ids[i] for i in chosen]
    return {"input_ids": _pad(rows, pad), "attention_mask": _pad([[1] * len(row) for row in rows], 0)}


def _encode_labelled(table: tables.Table, columns: Columns, tokenizer: Any, settings: DataSettings) -> Examples:
    found = tables.texts_of(table, columns.text)
    assert columns.label is not None
    names = tables.labels_of(table, columns.label, [number for number, _ in found])
    known = {name: i for i, name in enumerate(columns.labels)}
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"{table.name}: labels {', '.join(unknown[:5])} are not among the trained: {', '.join(known)}")
    texts = [text for _, text in found]
    encoded = tokenizer(texts, truncation=True, max_length=settings.max_length)["input_ids"]
    return Examples(encoded, [known[name] for name in names])


def _labelled_batch(examples: Examples, chosen: Sequence[int], pad: int) -> dict[str, Tensor]:
    return {**_inputs(examples, chosen, pad), "labels": torch.tensor([examples.labels[i] for i in chosen])}


def _rows(batch: dict[str, Tensor]) -> int:
    return len(batch["labels"])


def _encode_text(table: tables.Table, columns: Columns, tokenizer: Any, settings: DataSettings) -> Examples:
    texts = [text for _, text in tables.texts_of(table, columns.text)]
    length = settings.max_length
    encoded: list[list[int]] = tokenizer(texts)["input_ids"]
    end = tokenizer.eos_token_id
    closed = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]
    if settings.long_text == "truncate":
        pieces = [ids[:length] for ids in closed]
    else:
        stream = [token for ids in closed for token in ids]
        pieces = [stream[start : start + length] for start in range(0, len(stream), length)]
    pieces = [ids for ids in pieces if len(ids) > 1]  # one token predicts nothing
    if not pieces:
        raise UserError(f"{table.name}: column {columns.text} has no text of two tokens or more")
    return Examples(pieces, [])


def _text_batch(examples: Examples, chosen: Sequence[int], pad: int) -> dict[str, Tensor]:
    inputs = _inputs(examples, chosen, pad)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)}


def _targets(batch: dict[str, Tensor]) -> int:
    # the model shifts the labels by one: the first token of a row is nobody's target
    return int((batch["labels"][:, 1:] != IGNORED).sum())


TASKS = {
    "seq_cls": Task(
        "AutoModelForSequenceClassification",
        "samples",
        _encode_labelled,
        _labelled_batch,
        _rows,
    ),
    "causal_lm": Task("AutoModelForCausalLM", "tokens", _encode_text, _text_batch, _targets),
}


def suited(batch: dict[str, Tensor], model: nn.Module, adapter: pf.Adapter | None) -> dict[str, Tensor]:
    """The batch, padded on the left where a decoder classifies a row by its last token and the adapter embeds it.

    Such a model finds a row's last token by its id, and is given none where a prompt is put before the embeddings:
    then it takes the last position. Position ids count a row's own tokens, as with padding on the right.
    """
    config: Any = getattr(adapter, "config", None)
    config = next(iter(getattr(config, "configs", ())), config)  # of a stack, any of its adapters'
    embeds = isinstance(config, (pf.PromptTuningConfig, pf.PromptEncoderConfig))
    if not embeds or not hasattr(model, "score"):
        return batch
    mask = batch["attention_mask"]
    order = torch.sort(mask, dim=1, stable=True).indices  # padding first, the rest as it was
    moved = {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    if "position_ids" in signatures.argument_names(type(model)):
        moved["position_ids"] = (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**batch, **moved}


def joined(parts: Mapping[int, Examples]) -> tuple[Examples, list[int]]:
    """The examples of several parts as one, and the part's number of each."""
    index = [number for number, part in parts.items() for _ in part.ids]
    ids = [one for part in parts.values() for one in part.ids]
    return Examples(ids, [label for part in parts.values() for label in part.labels]), index


def choose(table: tables.Table, settings: DataSettings) -> tuple[str, Columns]:
    """The name of the task and the columns that it reads, found from the table where they are not given."""
    label = tables.label_column(table, settings.label_column) if settings.task != "causal_lm" else None
    if label is None and settings.task == "seq_cls":
        raise UserError(
            f"no column of {table.name} looks like the label; give --label-column: {', '.join(table.columns)}"
        )
    text = tables.text_column(table, settings.text_column, label)
    if label is None:
        return "causal_lm", Columns(text, None, [])
    rows = [number for number, _ in tables.texts_of(table, text)]
    return "seq_cls", Columns(text, label, tables.label_names(tables.labels_of(table, label, rows)))
