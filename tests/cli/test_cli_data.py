"""Rows, columns, labels and options: what the command line makes of what it is given."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("typer")

from cli_folders import rows, write_csv, write_jsonl

from peftfn.cli import options
from peftfn.cli.data import batches, columns, labels, tables
from peftfn.cli.errors import UserError
from peftfn.cli.settings import TrainSettings, differences
from peftfn.cli.train import records

ROWS = [{"text": 'He said "no",\nthen left', "label": "no"}, {"text": "Łódź\u2028über", "label": "yes"}]


def table(*found: dict[str, object]) -> tables.Table:
    return tables.Table("rows.csv", list(found[0]), list(found))


def test_csv_tsv_and_jsonl_of_the_same_rows_are_read_as_the_same_rows(tmp_path: Path) -> None:
    files = [
        write_csv(tmp_path / "a.csv", ROWS),
        write_csv(tmp_path / "a.TSV", ROWS, delimiter="\t"),
        write_jsonl(tmp_path / "a.jsonl", ROWS),
    ]
    assert [tables.read_table(str(file), "train").rows for file in files] == [ROWS] * 3


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufefftext,label\nhello,1\n".encode())
    assert tables.read_table(str(tmp_path / "a.csv"), "train").columns == ["text", "label"]


def test_a_text_longer_than_the_csv_modules_own_limit_is_read(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [{"text": "x" * 200_000}])
    assert len(tables.read_table(str(file), "train").rows[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\none,1,2\n", "line 2: 3 cells where the header has 2"),
        ("a.csv", "text,label\none\n", "line 2: 1 cells where the header has 2"),
        ("a.csv", "text,text\none,two\n", "names a column twice"),
        ("a.csv", 'text\n"never closed\n', "line 2: unexpected end of data"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", '["a"]\n', "line 1: expected an object"),
        ("a.csv", b"text\n\xff\xfe\n", "not UTF-8 text (byte 5)"),
        ("a.xlsx", "text\n", "give a file that ends in .csv"),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        tables.read_table(str(tmp_path / name), "train")
    assert said in str(caught.value)


def test_a_folder_written_by_datasets_is_read_with_its_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "d"))
    assert tables.read_table(str(tmp_path / "d"), "train").rows == [
        {"text": "a", "label": "good"},
        {"text": "b", "label": "bad"},
    ]
    with pytest.raises(UserError, match="has no split 'test'; it has: train"):
        tables.read_table(str(tmp_path / "d"), "test")


def test_a_missing_datasets_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "peftfn\[cli\]"'):
        tables.read_table("imdb", "train")


@pytest.mark.parametrize(
    ("row", "text", "label"),
    [
        ({"id": "1", "Text": "a", "Category": "b"}, "Text", "Category"),
        ({"sentence": "a", "sentiment": "b", "source": "c"}, "sentence", "sentiment"),
        ({"body of the mail": "a", "label": "b"}, "body of the mail", "label"),
        ({"words": "a"}, "words", None),
    ],
)
def test_columns_are_found_by_their_usual_names(row: dict[str, object], text: str, label: str | None) -> None:
    found = columns.label_column(table(row), None)
    assert (columns.text_column(table(row), None, [found]), found) == (text, label)


def test_a_text_column_that_cannot_be_told_is_an_error_that_lists_the_columns() -> None:
    with pytest.raises(UserError, match="give --text-column; it has: first, second"):
        columns.text_column(table({"first": "a", "second": "b"}), None)
    with pytest.raises(UserError, match=r"--text-column third: rows\.csv has no such column; it has: first, second"):
        columns.text_column(table({"first": "a", "second": "b"}), "third")


def test_rows_without_text_are_left_out_and_rows_without_label_are_an_error() -> None:
    found = table({"text": "a", "label": 1}, {"text": " ", "label": 0}, {"text": None, "label": 0})
    assert tables.texts_of(found, "text") == [(0, "a")]
    with pytest.raises(UserError, match=r"column label holds numbers such as 0\.5: that is regression"):
        labels.labels_of(table({"text": "a", "label": 0.5}), "label", [0])
    with pytest.raises(UserError, match="column text is empty in all 1 rows"):
        tables.texts_of(table({"text": ""}), "text")


def test_labels_that_are_numbers_from_0_keep_their_number_and_others_are_sorted() -> None:
    assert labels.label_names([str(i) for i in (10, *range(10))]) == [str(i) for i in range(11)]
    assert labels.label_names(["spam", "ham", "spam"]) == ["ham", "spam"]
    assert labels.label_names(["2", "1"]) == ["1", "2"]


def test_an_epoch_has_each_example_once_and_a_step_is_the_same_wherever_a_run_starts() -> None:
    lengths = [len(row["text"]) for row in rows(101)]
    per_epoch = batches.steps_per_epoch(101, 4, 3)
    whole = list(batches.steps(lengths, 4, 3, seed=7, start=0, total=3 * per_epoch))
    assert [step for step, _ in whole] == list(range(3 * per_epoch))
    for epoch in range(3):
        seen = [i for _, parts in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for part in parts for i in part]
        assert sorted(seen) == list(range(101))
    assert (
        list(batches.steps(lengths, 4, 3, seed=7, start=per_epoch + 2, total=3 * per_epoch)) == whole[per_epoch + 2 :]
    )
    assert whole[2][1] != whole[per_epoch + 2][1]


def test_the_learning_rate_rises_to_its_peak_and_falls_to_the_last_step() -> None:
    rates = [batches.learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert batches.learning_rate(0, 10, 1.0, 0) == 1.0
    assert [batches.learning_rate(step, 10, 1.0, 4.0) for step in (0, 3)] == [0.25, 1.0]


@pytest.mark.parametrize(
    ("hint", "typed", "value"),
    [
        (int, ["3"], 3),
        (float | None, ["1e-3"], 1e-3),
        (Sequence[str] | str | None, ["query, value"], ["query", "value"]),
        (list[str], ["query", "value"], ["query", "value"]),
        (Sequence[str] | str, ["all-linear"], "all-linear"),
        (Sequence[str] | str, [r"regex:.*\.[0-9]{1,2}"], r".*\.[0-9]{1,2}"),
        (Sequence[int] | int | None, ["1,2"], [1, 2]),
        (bool | str, ["gaussian"], "gaussian"),
        (bool | str, ["False"], False),
        (bool | Literal["gaussian"], ["true"], True),
        (Literal["none", "all"], ["ALL"], "all"),
        (Mapping[str, int], ['{"query": 4}'], {"query": 4}),
        (list[list[int]] | None, ["[[0, 2], [1, 3]]"], [[0, 2], [1, 3]]),
    ],
)
def test_an_option_is_read_by_the_type_of_its_field(hint: object, typed: list[str], value: object) -> None:
    assert options.parse(hint, typed) == value


@pytest.mark.parametrize(
    ("hint", "typed", "said"),
    [
        (int, "x", "'x' is not INT"),
        (Sequence[int] | int | None, "1,b", "'b' is not INT"),
        (Literal["none", "all"], "some", "'some' is not none|all: one of none, all"),
        (Mapping[str, int], "{query: 4}", "is not JSON"),
        (Mapping[str, int], "[4]", "is JSON but not an object"),
    ],
)
def test_a_value_of_another_type_is_an_error(hint: object, typed: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        options.parse(hint, [typed])


def test_a_new_field_of_a_config_is_a_new_option_by_itself() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later:
        r: int = 8
        newly_added: Sequence[str] = dataclasses.field(default=("a", "b"), metadata={"help": "Fresh."})

    Later.__annotations__ = {"r": int, "newly_added": Sequence[str]}
    command = options.command(lambda later: None, {Later: "Panel"})
    parameter = __import__("inspect").signature(command).parameters["newly_added"]
    assert parameter.default == ["a", "b"]
    assert parameter.annotation.__metadata__[0].help.startswith("Fresh.")


def test_two_dataclasses_with_a_field_of_one_name_cannot_share_a_command() -> None:
    other = dataclasses.make_dataclass("Other", [("seed", int, 0)])
    with pytest.raises(TypeError, match=r"Other\.seed would hide another option"):
        options.command(lambda *_: None, {TrainSettings: "a", other: "b"})


def test_settings_that_no_run_could_use_are_an_error() -> None:
    wrong: dict[str, Any] = {"batch_size": 0, "lr": float("nan"), "epochs": 0, "warmup": -1, "max_steps": 0}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
            TrainSettings(model="m", data="d", output="o", **{name: value})


def test_differences_name_the_nested_field_that_changed() -> None:
    assert differences({"lr": 1, "config": {"r": 8}}, {"lr": 1, "config": {"r": 4}}) == ["config.r: 8, now 4"]


def test_a_record_that_a_kill_cut_short_is_left_out_and_later_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        records.append(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in records.read(path)] == [1, 2, 3]
    assert records.keep_until(path, 2) == records.read(path) == [{"step": 1}, {"step": 2}]


def test_the_running_mean_of_a_constant_is_that_constant() -> None:
    assert records.smoothed([2.0] * 5, keep=0.9) == pytest.approx([2.0] * 5)
