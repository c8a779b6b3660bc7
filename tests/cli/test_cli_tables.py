"""What the command line reads of a file: read right, or refused in a sentence; nothing is left out without a word."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from cli_folders import write_csv

from peftfn.cli.data import columns, labels, tables
from peftfn.cli.errors import UserError
from peftfn.cli.settings import DataSettings

ROWS = [{"text": "good; very good", "label": "yes"}, {"text": "bad|worse, or so", "label": "no"}] * 3


def read(folder: Path, content: str | bytes, name: str = "a.csv") -> tables.Table:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    return tables.read_table(str(folder / name), "train")


def chosen(table: tables.Table, **options: Any) -> tuple[str, columns.Columns]:
    return columns.choose(table, DataSettings(model="m", data=table.name, **options))


def table(*found: dict[str, object]) -> tables.Table:
    return tables.Table("rows.jsonl", list(dict.fromkeys(name for row in found for name in row)), list(found))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_file_is_parted_by_what_parts_its_header(tmp_path: Path, delimiter: str, name: str) -> None:
    found = tables.read_table(str(write_csv(tmp_path / name, ROWS, delimiter)), "train")
    assert found.rows == ROWS
    usual = {"a.csv": ",", "a.tsv": "\t"}[name]
    assert bool(found.notes) == (delimiter != usual)


def test_of_several_delimiters_in_a_header_the_one_counts_that_parts_all_rows_alike(tmp_path: Path) -> None:
    found = read(tmp_path, "text;label, or kind\none, two;x\nthree;y\n")
    assert found.columns == ["text", "label, or kind"]
    assert found.rows[0] == {"text": "one, two", "label, or kind": "x"}
    assert read(tmp_path, '"text; all of it",label\na,b\n').columns == ["text; all of it", "label"]
    with pytest.raises(UserError, match=r"parted by commas or by semicolons; write a first line sep=, or sep=;"):
        read(tmp_path, "a;b,c\n1;2,3\n")
    assert read(tmp_path, "sep=;\na;b,c\n1;2,3\n").rows == [{"a": "1", "b,c": "2,3"}]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    for start, line in (("", 3), ("sep=,\n", 4)):
        with pytest.raises(
            UserError, match=rf"line {line}: 3 cells where the header has 2; put a text that holds commas"
        ):
            read(tmp_path, f"{start}text,label\na,b\na,b,c\n")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_an_encoding_that_the_first_bytes_name_is_read(tmp_path: Path, encoding: str) -> None:
    found = read(tmp_path, "text,label\nŁódź,1\n".encode(encoding))
    assert found.rows == [{"text": "Łódź", "label": "1"}]
    big = read(tmp_path, codecs.BOM_UTF16_BE + "text,label\nŁódź,1\n".encode("utf-16-be"))
    assert big.rows == found.rows


def test_another_encoding_is_refused_with_the_way_to_utf_8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 12\); save it as UTF-8, for instance with iconv"):
        read(tmp_path, "text,label\nä,1\n".encode("latin-1")[:11] + "xäö,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="NUL characters, as UTF-16 text without a byte order mark"):
        read(tmp_path, "text,label\na,1\n".encode("utf-16-le"))


def test_blank_lines_and_rows_without_text_are_counted(tmp_path: Path) -> None:
    found = read(tmp_path, "text,label\na,1\n\n\nb,0\n\n\n")
    assert len(found.rows) == 2
    assert found.notes == ["2 blank lines left out"]  # those at the end are none
    lines = '{"text": "a"}\n\n{"text": "b"}\n\n'
    assert read(tmp_path, lines, "a.jsonl").notes == ["1 blank line left out"]


@pytest.mark.parametrize(
    "content",
    [
        'text,label\n"never closed,yes\nsecond,no\n"third",yes\n',
        'text,label\n"never closed,yes\nsecond,no\nthird,"yes"\n',
        'text,label\nfirst,no\n"never closed,yes\nsecond,no\nthird "", no",yes\n',
        'text,label\nfirst,no\n"never closed,yes\nsecond,no\n',
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"is a quote left open\?|close the quote before it"):
        read(tmp_path, content)


def test_a_text_of_several_lines_is_one_text(tmp_path: Path) -> None:
    rows = [{"text": "Dear all,\nwell, so far so good\nbye, Ann", "label": "yes"}, {"text": "no", "label": "no"}]
    assert tables.read_table(str(write_csv(tmp_path / "a.csv", rows)), "train").rows == rows


def test_a_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 3 is the header again"):
        read(tmp_path, "text,label\na,yes\n\ufefftext,label\nb,no\n")
    assert len(read(tmp_path, "text\na\ntext\n").rows) == 2  # of one column alone, that may be a text


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    for content in ("I loved it,1\nI hated it,0\n", "I loved it\nI hated it\n"):
        with pytest.raises(
            UserError, match=r"give --text-column; it has: I loved it.* \(its first line: if that is a row"
        ):
            chosen(read(tmp_path, content))
    found = read(tmp_path, "what they said\nI loved it\n")
    assert chosen(found, text_column="what they said")[1].text == "what they said"
    assert chosen(read(tmp_path, "text\nI loved it\n"))[1].text == "text"


def test_json_is_read_as_an_array_or_as_lines(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    lines = "\n".join(map(json.dumps, rows))
    for name, content in (("a.json", json.dumps(rows, indent=2)), ("a.json", lines), ("a.jsonl", lines)):
        assert read(tmp_path, content, name).rows == rows
    with pytest.raises(UserError, match=r"a JSON array belongs in a file that ends in \.json"):
        read(tmp_path, json.dumps(rows, indent=2), "a.jsonl")
    with pytest.raises(UserError, match="line 1: expected an object"):
        read(tmp_path, json.dumps(rows), "a.jsonl")
    with pytest.raises(UserError, match="line 1: an object names 'text' twice"):
        read(tmp_path, '{"text": "a", "text": "b"}\n', "a.jsonl")


def test_columns_that_may_both_be_meant_are_asked_for() -> None:
    for row, option in (
        ({"text": "a", "review": "b", "label": "c"}, "--text-column"),
        ({"text": "a", "label": "b", "category": "c"}, "--label-column"),
        ({"Text": "a", "text": "b", "label": "c"}, "--text-column"),
        ({"prompt": "a", "completion": "b", "label": True}, "--task causal_lm to train on the completions"),
        ({"prompt": "a", "response": "b"}, "give --completion-column response, or --text-column prompt"),
        ({"text": "a", "output": "b"}, "give --completion-column output, or --text-column text"),
        ({"prompt": "a", "response": "b", "label": 1}, "of prompt and response together"),
        ({"text;label": "a;b"}, "--text-column; it has: text;label"),
        ({"instruction": "a", "output": "b"}, "--text-column; it has: instruction, output"),
    ):
        with pytest.raises(UserError, match=option):
            chosen(table(row, row))


def test_a_column_that_may_be_the_label_is_asked_for() -> None:
    rows = [{"text": f"{n}", "rating": n % 3, "id": n} for n in range(12)]
    with pytest.raises(UserError, match=r"column rating may be the label \(3 values in 12 rows\)"):
        chosen(table(*rows))
    assert chosen(table(*rows), task="causal_lm")[0] == "causal_lm"
    assert chosen(table(*rows), label_column="rating")[1].labels == ["0", "1", "2"]


def test_prompt_and_completion_are_found_and_others_given() -> None:
    both = table({"prompt": "a", "completion": "b"})
    assert chosen(both) == ("causal_lm", columns.Columns("prompt", None, [], "completion"))
    assert chosen(both, text_column="prompt")[1].completion is None
    other = table({"question": "a", "answer": "b"})
    assert chosen(other, completion_column="answer")[1] == columns.Columns("question", None, [], "answer")
    for options, said in (
        ({"completion_column": "reply"}, "--completion-column reply: .* it has: question, answer"),
        ({"completion_column": "answer", "text_column": "answer"}, "are both answer"),
        ({"completion_column": "answer", "task": "seq_cls"}, "--completion-column is for --task causal_lm"),
        ({"label_column": "answer", "text_column": "answer"}, "are both answer"),
        ({"label_column": "answer", "task": "causal_lm"}, "--label-column is for --task seq_cls"),
    ):
        with pytest.raises(UserError, match=said):
            chosen(other, **options)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"conversations": [{"from": "human", "value": "hi"}], "id": 1},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]},
        {"text": [{"role": "user", "content": "hi"}], "label": "b"},
    ],
)
def test_a_chat_is_refused_by_name(row: dict[str, object]) -> None:
    def texts() -> list[tuple[int, str]]:
        return tables.texts_of(table(row), chosen(table(row))[1].text)

    with pytest.raises(UserError, match="holds the messages of a chat, which are not read; write them as text"):
        texts()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["1.0", "0.0"], ["1", "0"]),
        ([1, "1", 1.0, "0"], ["1", "1", "1", "0"]),
        (["-1", "1"], ["-1", "1"]),
        (["01", "02"], ["01", "02"]),
        ([" yes", "yes ", "no"], ["yes", "yes", "no"]),
        (["none", "some"], ["none", "some"]),
        (["1", "2", "other"], ["1", "2", "other"]),
        ([True, False], ["True", "False"]),
        ([2**63, 2**63 + 1, str(2**63)], [str(2**63), str(2**63 + 1), str(2**63)]),
        ([10**400, 1], [str(10**400), "1"]),
    ],
)
def test_labels_are_names_or_whole_numbers(values: list[object], names: list[str]) -> None:
    rows = [{"text": "a", "label": value} for value in values]
    assert labels.labels_of(table(*rows), "label", range(len(rows))) == names


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["0.5", "1.0"], r"numbers such as 0\.5: that is regression"),
        (["0,5", "1,25"], "numbers such as 0,5: that is regression"),
        ([0.25, 1], r"numbers such as 0\.25: that is regression"),
        (["1e-3", "2"], "that is regression"),
        (["01", "1"], "01 and 1 are one number"),
        (["yes", "", "no", " "], r"2 of 4 rows have no label \(rows 2, 4\)"),
        (["yes", None], r"1 of 2 rows have no label \(row 2\)"),
        ([1, float("nan")], r"1 of 2 rows have no label \(row 2\)"),
        (["yes", "NaN"], "1 of 2 labels are 'NaN', which says that there is none"),
        (["1", "0", "NA"], "1 of 3 labels are 'NA'"),
        (["1", "0", "none"], "1 of 3 labels are 'none'"),
        ([True, 1], "some labels are true or false and others are not"),
        ([["a", "b"]], r"row 1: label \['a', 'b'\]; give a name or a whole number"),
    ],
)
def test_what_is_no_label_is_refused(values: list[object], said: str) -> None:
    rows = [{"text": "a", "label": value} for value in values]
    with pytest.raises(UserError, match=said):
        labels.labels_of(table(*rows), "label", range(len(rows)))


def test_a_column_of_texts_is_no_label() -> None:
    with pytest.raises(UserError, match=r"has 30 different values in 30 rows, 30 of them once: those are no labels"):
        labels.refuse_texts("a.csv, column target", [f"text {n}" for n in range(30)])
    with pytest.raises(UserError, match=r"of 240 characters: a text and no label"):
        labels.refuse_texts("a.csv, column target", ["word " * 48, "no"] * 4)
    labels.refuse_texts("a.csv, column label", [f"intent {n % 40}" for n in range(80)])


def test_a_held_out_file_of_other_columns_says_what_is_there() -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl has no column 'text'; it has: body, label"):
        tables.texts_of(table({"body": "a", "label": "b"}), "text")
    with pytest.raises(UserError, match=r"rows\.jsonl has no column 'label'; it has: text, kind"):
        labels.labels_of(table({"text": "a", "kind": "b"}), "label", [0])
