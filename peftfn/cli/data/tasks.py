"""The two tasks, as tuples of functions in one table: text to examples, examples to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.cli.data import labels, tables
from peftfn.cli.data.columns import Columns
from peftfn.cli.errors import UserError
from peftfn.cli.settings import DataSettings
from peftfn.models import signatures

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""


class Reading(NamedTuple):
    """What became of a table's rows.

    Attributes:
        rows: how many there are.
        without_text: the numbers, from 0, of those left out because they have no text, or no completion.
        lengths: tokens of each text that was read, before any cut.
        cut: how many of them lost tokens.
        too_short: how many were left out because no token of them is predicted.
    """

    rows: int
    without_text: Sequence[int]
    lengths: Sequence[int]
    cut: int = 0
    too_short: int = 0


class Examples(NamedTuple):
    """Encoded rows.

    Attributes:
        ids: token ids.
        labels: for classification one label id each; for a language model none.
        starts: how many of the tokens are a prompt, which is not learnt; none where all tokens are.
        reading: what became of the rows that they come from.
    """

    ids: list[list[int]]
    labels: list[int]
    starts: Sequence[int] = ()
    reading: Reading = Reading(0, (), ())

    def digest(self) -> str:
        """A hash of every id and label: equal for the same examples in the same order."""
        digest = hashlib.sha256(repr(self.labels).encode())
        for ids in self.ids:
            digest.update(repr(ids).encode())
        if self.starts:
            digest.update(repr(list(self.starts)).encode())
        return digest.hexdigest()


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
    names = labels.labels_of(table, columns.label, [number for number, _ in found])
    known = {name: i for i, name in enumerate(columns.labels)}
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"{table.name}: labels {', '.join(unknown[:5])} are not among the trained: {', '.join(known)}")
    texts = [text for _, text in found]
    encoded: list[list[int]] = tokenizer(texts)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    too_long = [number for number, length in enumerate(lengths) if length > settings.max_length]
    if too_long:  # again, by the tokenizer's own rule: its closing token is kept
        several = [texts[number] for number in too_long]
        shorter = tokenizer(several, truncation=True, max_length=settings.max_length)["input_ids"]
        for number, ids in zip(too_long, shorter, strict=True):
            encoded[number] = ids
    reading = Reading(len(table.rows), _others(table, found), lengths, cut=len(too_long))
    return Examples(encoded, [known[name] for name in names], reading=reading)


def _others(table: tables.Table, found: Sequence[tuple[int, str]]) -> list[int]:
    """The numbers of the rows that are not among those found."""
    numbers = {number for number, _ in found}
    return [number for number in range(len(table.rows)) if number not in numbers]


def _labelled_batch(examples: Examples, chosen: Sequence[int], pad: int) -> dict[str, Tensor]:
    return {**_inputs(examples, chosen, pad), "labels": torch.tensor([examples.labels[i] for i in chosen])}


def _rows(batch: dict[str, Tensor]) -> int:
    return len(batch["labels"])


def _encode_text(table: tables.Table, columns: Columns, tokenizer: Any, settings: DataSettings) -> Examples:
    if columns.completion is not None:
        return _encode_completions(table, columns, columns.completion, tokenizer, settings)
    found = tables.texts_of(table, columns.text)
    length = settings.max_length
    closed = _closed([text for _, text in found], tokenizer)
    lengths, cut, too_short = [len(ids) for ids in closed], 0, 0
    if settings.long_text == "truncate":
        pieces = [ids[:length] for ids in closed]
        cut, too_short = sum(one > length for one in lengths), sum(len(ids) < 2 for ids in pieces)
    else:
        stream = [token for ids in closed for token in ids]
        pieces = [stream[start : start + length] for start in range(0, len(stream), length)]
    pieces = [ids for ids in pieces if len(ids) > 1]  # one token predicts nothing
    if not pieces:
        raise UserError(f"{table.name}: column {columns.text} has no text of two tokens or more")
    return Examples(pieces, [], reading=Reading(len(table.rows), _others(table, found), lengths, cut, too_short))


def _closed(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The tokens of each text and the token that ends it, if the tokenizer has one."""
    encoded: list[list[int]] = tokenizer(list(texts))["input_ids"]
    end = tokenizer.eos_token_id
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]


def _encode_completions(
    table: tables.Table, columns: Columns, completion: str, tokenizer: Any, settings: DataSettings
) -> Examples:
    """Prompt and completion as one text each, of which the loss is over the tokens that are not the prompt's alone.

    So a token that reaches from the prompt into the completion is learnt too. Rows are never joined.
    """
    after = dict(tables.texts_of(table, completion))
    found = [
        (number, prompt, after[number]) for number, prompt in tables.texts_of(table, columns.text) if number in after
    ]
    if not found:
        raise UserError(f"{table.name}: no row has both a {columns.text} and a {completion}")
    whole = _closed([prompt + ending for _, prompt, ending in found], tokenizer)
    prompts: list[list[int]] = tokenizer([prompt for _, prompt, _ in found])["input_ids"]
    starts = [_shared(ids, own) for ids, own in zip(whole, prompts, strict=True)]
    length = settings.max_length
    kept = [number for number, start in enumerate(starts) if max(start, 1) < min(len(whole[number]), length)]
    if not kept:
        raise UserError(
            f"{table.name}: in all rows the prompt alone has --max-length {length} tokens; give a larger one"
        )
    cut = sum(len(whole[number]) > length for number in kept)
    others = _others(table, [(number, prompt) for number, prompt, _ in found])
    reading = Reading(len(table.rows), others, [len(ids) for ids in whole], cut, len(found) - len(kept))
    return Examples([whole[n][:length] for n in kept], [], [starts[n] for n in kept], reading)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _text_batch(examples: Examples, chosen: Sequence[int], pad: int) -> dict[str, Tensor]:
    inputs = _inputs(examples, chosen, pad)
    counted = inputs["attention_mask"] != 0
    if examples.starts:
        starts = torch.tensor([examples.starts[i] for i in chosen])
        counted &= torch.arange(counted.shape[1]) >= starts[:, None]  # (rows, longest)
    return {**inputs, "labels": inputs["input_ids"].where(counted, IGNORED)}


def _targets(batch: dict[str, Tensor]) -> int:
    # the model shifts the labels by one: no loss is of a row's first token
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
    starts = [start for part in parts.values() for start in part.starts]
    several = [part.reading for part in parts.values()]
    reading = Reading(
        sum(one.rows for one in several),
        [number for one in several for number in one.without_text],
        [length for one in several for length in one.lengths],
        sum(one.cut for one in several),
        sum(one.too_short for one in several),
    )
    return Examples(ids, [label for part in parts.values() for label in part.labels], starts, reading), index
