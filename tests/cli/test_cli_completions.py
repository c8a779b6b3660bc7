"""Rows of prompt and completion are learnt by the completion; and what was read of any file is said before a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small
from cli_folders import call

from peftfn.cli.data import data_summary, tables, tasks
from peftfn.cli.data.columns import Columns, choose
from peftfn.cli.errors import UserError
from peftfn.cli.settings import DataSettings

ROWS = [
    {"prompt": "my garden was", "completion": " full of sun"},
    {"prompt": "the day", "completion": " was a cold winter day"},
    {"prompt": "rain and", "completion": " mud"},
]
PLAIN = Columns("prompt", None, [], "completion")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completions")
    small.llama(folder / "llama")
    small.bert(folder / "bert")
    small.write_jsonl(folder / "rows.jsonl", ROWS * 8)
    return folder


def read(place: Path, rows: list[dict[str, Any]], kind: str = "llama", **options: Any) -> tuple[tasks.Examples, str]:
    """The examples of rows, and what is said of them."""
    settings = DataSettings(model="m", data="d", **options)
    table = tables.Table("rows.jsonl", list(rows[0]), rows)
    task, columns = choose(table, settings)
    examples = tasks.TASKS[task].encode(table, columns, tokenizer(place, kind), settings)
    return examples, data_summary.about("data", table, columns, examples, settings)


def tokenizer(place: Path, kind: str = "llama") -> Any:
    return transformers.AutoTokenizer.from_pretrained(place / kind)


def loss(model: Any, adapter: Any, place: Path) -> float:
    """The mean loss over the tokens of the completions and the one that ends each, row by row."""
    words, losses = tokenizer(place), []
    for row in ROWS:
        start = len(words(row["prompt"])["input_ids"])
        ids = torch.tensor([[*words(row["prompt"] + row["completion"])["input_ids"], words.eos_token_id]])
        with torch.no_grad():
            logits = pf.apply(model, adapter, {"input_ids": ids}).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, start - 1 : -1], ids[0, start:], reduction="none"))
    return float(torch.cat(losses).mean())


def test_loss_is_over_the_completions_alone(place: Path, tmp_path: Path) -> None:
    printed = call(
        *("train", "--model", place / "llama", "--data", place / "rows.jsonl", "--output", tmp_path / "out"),
        *("--target-modules", "all-linear", "--lr", "0.02", "--max-steps", 30, "--batch-size", 8, "--threads", 1),
    )
    assert "columns 'prompt' + 'completion', 4 to 8 tokens, median 7; none cut" in printed
    assert "on the tokens of 'completion' alone" in printed
    printed = call("eval", "--adapter", tmp_path / "out", "--data", place / "rows.jsonl", "--threads", 1)
    base, adapted = (float(x) for x in re.findall(r"^(?:base|with adapter) +(\S+)", printed, re.MULTILINE))
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama").eval()
    assert base == pytest.approx(loss(model, (), place), abs=1e-4)  # four decimals are printed
    assert adapted == pytest.approx(loss(model, pf.load(tmp_path / "out"), place), abs=1e-4)
    assert adapted < 0.3 * base


def test_a_token_that_reaches_from_the_prompt_into_the_completion_is_learnt(place: Path) -> None:
    # "gard" is no word of the tokenizer, and "garden" is one
    examples, _ = read(place, [{"prompt": "my gard", "completion": "en"}])
    words = tokenizer(place)
    assert examples.ids == [[*words("my garden")["input_ids"], words.eos_token_id]]
    assert examples.starts == [1]
    labels = tasks.TASKS["causal_lm"].batch(examples, [0], 0)["labels"]
    assert labels.tolist() == [[tasks.IGNORED, *examples.ids[0][1:]]]


def test_a_token_that_closes_the_prompt_alone_is_no_part_of_it(place: Path) -> None:
    examples, _ = read(place, [{"prompt": "the day", "completion": " was cold"}], kind="bert")
    assert examples.starts == [3]  # [CLS] the day, and no [SEP]
    assert len(examples.ids[0]) == 6


def test_rows_that_are_cut_or_left_out_are_counted(place: Path) -> None:
    rows = [*ROWS, {"prompt": "sun " * 9, "completion": "rain"}, {"prompt": "sun", "completion": " "}]
    rows += [{"prompt": "", "completion": "sun"}]
    examples, said = read(place, rows, max_length=6)
    assert len(examples.ids) == 3
    assert [len(ids) for ids in examples.ids] == [6, 6, 4]
    assert "rows.jsonl: 6 rows, 3 read for causal_lm" in said
    assert "; 2 cut to 6" in said
    assert "2 with no prompt or no completion (rows 5, 6)" in said
    assert "1 with a prompt that fills --max-length 6: nothing of them is predicted" in said
    assert "row 1" in said and "'my garden was' + ' full of sun'" in said
    with pytest.raises(UserError, match="in all rows the prompt alone has --max-length 2 tokens"):
        read(place, ROWS, max_length=2)
    with pytest.raises(UserError, match="no row has both a prompt and a completion"):
        read(place, [{"prompt": "a", "completion": ""}, {"prompt": "", "completion": "b"}])


def test_rows_of_completions_are_padded_without_loss(place: Path) -> None:
    examples, _ = read(place, ROWS)
    batch = tasks.TASKS["causal_lm"].batch(examples, [0, 1, 2], 0)
    counted = batch["labels"] != tasks.IGNORED
    lengths = [len(ids) - start for ids, start in zip(examples.ids, examples.starts, strict=True)]
    assert counted.sum(1).tolist() == lengths
    assert tasks.TASKS["causal_lm"].weight(batch) == sum(lengths)
    assert not (counted & (batch["attention_mask"] == 0)).any()
    parts, index = tasks.joined({0: examples, 1: examples})
    assert list(parts.starts) == [*examples.starts, *examples.starts] and index == [0, 0, 0, 1, 1, 1]
    assert parts.reading.rows == 6


def test_digest_knows_where_prompts_end(place: Path) -> None:
    examples, _ = read(place, ROWS)
    assert examples.digest() != examples._replace(starts=[]).digest()


def test_what_was_read_of_labelled_rows_is_said(place: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "sun", "label": "Good", "id": 1}, {"text": "the cold rain", "label": "bad"}]
    rows += [{"text": " ", "label": "bad"}, {"text": "mud " * 20, "label": "good"}, {"text": "NaN", "label": "bad"}]
    examples, said = read(place, rows, kind="bert", max_length=8)
    assert len(examples.ids[2]) == 8
    assert examples.ids[2][-1] == tokenizer(place, "bert").sep_token_id  # the closing token is kept
    for part in (
        "data     rows.jsonl: 5 rows, 4 read for seq_cls",
        "column 'text', 3 to 22 tokens, median 3; 1 cut to 8",
        "column 'label': 3 labels: Good 1, bad 2, good 1",
        "labels 'Good' and 'good' differ in case alone",
        "not read  'id'",
        "1 with no text (row 3)",
        "'sun' is Good",
        "1 with 'NaN' and nothing else, read as a text (row 5)",
    ):
        assert part in said


def test_what_was_read_of_texts_is_said(place: Path) -> None:
    rows = [{"text": "the day was cold"}, {"text": "sun"}, {"text": "the " * 30}]
    _, said = read(place, rows, max_length=8)
    assert "column 'text', 2 to 31 tokens, median 5; joined, and cut into 5 pieces of at most 8" in said
    _, said = read(place, rows, max_length=8, long_text="truncate")
    assert "2 to 31 tokens, median 5; 1 cut to 8" in said
    words = tokenizer(place)
    words.eos_token = None
    settings = DataSettings(model="m", data="d", long_text="truncate")
    found = tasks.TASKS["causal_lm"].encode(
        tables.Table("t", ["text"], rows), Columns("text", None, []), words, settings
    )
    assert found.reading.too_short == 1  # "sun" alone, with no token that ends it
    said = data_summary.about("data", tables.Table("t", ["text"], rows), Columns("text", None, []), found, settings)
    assert "1 with a single token: nothing of them is predicted" in said


def test_a_held_out_file_is_described_too_and_its_labels_go_by_name(place: Path, tmp_path: Path) -> None:
    train = small.write_csv(tmp_path / "train.csv", small.rows(40))
    held_out = small.write_csv(
        tmp_path / "held-out.csv", [row for row in small.rows(40, 3) if row["label"] == "good"], ";"
    )
    printed = call(
        *("train", "--model", place / "bert", "--data", train, "--eval-data", held_out, "--output", tmp_path / "out"),
        *("--target-modules", "query", "--lr", "0.03", "--max-steps", 30, "--threads", 1),
    )
    assert "held out" in printed and "its columns are parted by semicolons" in printed
    assert re.search(r"2 labels: bad 0, good \d+", printed)
    printed = call("eval", "--adapter", tmp_path / "out", "--data", held_out, "--threads", 1)
    accuracy = float(re.findall(r"with adapter +\S+ +(\S+)", printed)[0])
    assert accuracy > 0.8
