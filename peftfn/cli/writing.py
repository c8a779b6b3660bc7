"""`peftfn generate`: what the base writes after each row's text, with the adapter that the row names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

import peftfn as pf
from peftfn.cli.bases import device_of, from_pretrained, load_model, mode, quiet
from peftfn.cli.data import batches, routed, tables
from peftfn.cli.data.columns import completion_column, text_column
from peftfn.cli.errors import UserError
from peftfn.cli.settings import GenerateOptions
from peftfn.cli.train import progress
from peftfn.core import files


def write(options: GenerateOptions) -> list[dict[str, Any]]:
    """The rows of the file with the written text in the column `generated`, in the file's order."""
    table = tables.read_table(options.data, options.split)
    for note in table.notes:
        print(f"{table.name}: {note}", file=sys.stderr)
    column = text_column(table, options.text_column, [completion_column(table, options.text_column, None)])
    found = _chosen(options, table)
    texts = dict(tables.texts_of(table, column))
    if left := [number + 1 for number in range(len(table.rows)) if number not in texts]:
        raise UserError(f"{table.name}: row {left[0]} has no text in column {column}, after which to write")
    quiet()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = routed.base_of(found, options.model) if found else options.model
    if name is None:
        raise UserError("give --model, --adapter, or a file with a column of adapters")
    tokenizer = from_pretrained("AutoTokenizer", name)
    device = device_of(options.device)
    model, _ = load_model(name, "AutoModelForCausalLM", dtype=options.dtype, device=device)
    stacked = routed.stacked(found, model) if found else None
    rows = found.rows if found else [-1] * len(table.rows)
    prompts: list[list[int]] = tokenizer([texts[number] for number in range(len(table.rows))])["input_ids"]
    written: dict[int, str] = {}
    with mode(model, training=False), torch.no_grad(), progress.counting(len(rows), "writing", "rows") as bar:
        for numbers in batches.in_order([len(ids) for ids in prompts], options.batch_size):
            tokens = _generate(model, stacked, [prompts[n] for n in numbers], [rows[n] for n in numbers], options)
            written |= dict(zip(numbers, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True))
            bar.update(len(numbers))
    return [{**row, "generated": written[number]} for number, row in enumerate(table.rows)]


def _chosen(options: GenerateOptions, table: tables.Table) -> routed.Chosen | None:
    """The rows' adapters; one for all of them with --adapter; none for the base alone."""
    has_column = options.adapter_column is not None or options.adapters or routed.COLUMN in table.columns
    if options.adapter is not None:
        if options.adapter_column is not None or options.adapters:
            raise UserError("--adapter is one adapter for all rows; leave it out, or --adapter-column and --adapters")
        return routed.Chosen([options.adapter], [options.adapter], [0] * len(table.rows))
    return routed.chosen(table, options.adapter_column, options.adapters) if has_column else None


def _generate(
    model: Any, stacked: pf.Adapter | None, prompts: list[list[int]], index: list[int], options: GenerateOptions
) -> torch.Tensor:
    """(rows, new tokens), greedy or by beams."""
    pad = _padding(model.generation_config)
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    writer: Any = model if stacked is None else pf.bind(model, stacked, index=index)
    written = writer.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        do_sample=False,
        pad_token_id=pad,
    )
    return written[:, width:]


def _padding(config: Any) -> int:
    """The token that fills up short rows: a mask hides it."""
    ends: Any = config.eos_token_id
    ends = cast("list[int | None]", ends if isinstance(ends, list) else [ends])
    known: list[int | None] = [config.pad_token_id, *ends, 0]
    return next(one for one in known if one is not None)


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Each row as one JSON object."""
    return (json.dumps(row, ensure_ascii=False) for row in rows)


def save(rows: list[dict[str, Any]], path: str) -> None:
    """The rows as a JSONL file."""
    target = Path(path)
    if target.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"--output {path}: give a file that ends in .jsonl")
    text = "".join(f"{line}\n" for line in lines(rows))
    files.write_atomic(target, lambda at: at.write_text(text, encoding="utf-8"))
