"""Wrong input to the commands: one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

import cli_folders as small
import torch.distributed.run
from cli_folders import call
from same import assert_same
from typer.testing import CliRunner

import peftfn as pf
from peftfn import cli
from peftfn.cli.app import app
from peftfn.cli.settings import TrainSettings


def refused(*arguments: object) -> str:
    """What a command says that ends with exit code 2, and without a traceback, on one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its data."""
    folder = tmp_path_factory.mktemp("errors")
    small.bert(folder / "bert")
    small.write_csv(folder / "train.csv", small.rows(90))
    return folder


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--model": "nowhere/at-all"}, "could not load --model nowhere/at-all"),
        ({"--data": "missing.csv"}, "missing.csv: no such file"),
        ({"--text-column": "body"}, "it has: text, label"),
        ({"--eval-data": "other.csv"}, "labels ugly are not among the trained: bad, good"),
        ({"--target-modules": "q_proj"}, "matched no module"),
        ({"--r": "0"}, "r=0; expected a positive integer"),
        ({"--r": "four"}, "'four' is not INT"),
        ({"--rank-pattern": "query=4"}, "is not JSON"),
        ({"--batch-size": "0"}, "--batch-size 0: give a whole number of at least 1"),
        ({"--device": "cuda:7"}, "--device cuda:7 cannot be used here"),
        ({"--device": "gpu"}, "--device gpu cannot be used here"),
        ({"--lr": "1e30"}, "the loss is nan at step"),
        ({"--no-such": "1"}, "No such option"),
        ({"--data": "empty.csv"}, "empty.csv has no rows"),
        ({"--label-column": "kind"}, "--label-column kind: "),
    ],
)
def test_wrong_input_ends_with_one_sentence_and_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    small.write_csv(tmp_path / "other.csv", [{"text": "a", "label": "ugly"}])
    (tmp_path / "empty.csv").write_text("text,label\n")
    given = {
        "--model": str(place / "bert"),
        "--data": str(place / "train.csv"),
        "--output": "out",
        "--threads": "1",
    } | changed
    printed = refused("train", *(part for pair in given.items() for part in pair))
    assert said in printed
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    if "--lr" not in changed:  # the one error that comes while training
        assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused_as_a_language_model(place: Path, tmp_path: Path) -> None:
    given = (
        "--model",
        place / "bert",
        "--data",
        place / "train.csv",
        "--task",
        "causal_lm",
        "--output",
        tmp_path / "out",
    )
    assert "sees the tokens that come after" in refused("train", *given)
    assert not (tmp_path / "out").exists()


def test_one_label_only_is_an_error(place: Path, tmp_path: Path) -> None:
    data = small.write_csv(tmp_path / "a.csv", [{"text": "a", "label": "x"}] * 3)
    printed = refused("train", "--model", place / "bert", "--data", data, "--output", tmp_path / "out")
    assert "every row is labelled 'x'" in printed


def test_a_missing_extra_is_one_sentence_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert 'pip install "peftfn[cli]"' in capsys.readouterr().err


def test_settings_have_a_help_text_for_every_field() -> None:
    assert [field.name for field in dataclasses.fields(TrainSettings) if not field.metadata["help"].endswith(".")] == []


def test_commands_on_what_is_no_adapter_say_so(place: Path, tmp_path: Path) -> None:
    for command in (("inspect",), ("convert", tmp_path / "out"), ("merge", tmp_path / "out")):
        said = refused(command[0], place / "bert", *command[1:])
        assert "adapter_config.json" in said
    assert "give --model, --adapter, or both" in refused("eval", "--data", place / "train.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_disk_without_room_is_one_sentence_that_names_the_file(place: Path, tmp_path: Path) -> None:
    import resource

    options = ("--model", place / "bert", "--data", place / "train.csv", "--threads", "1", "--max-steps", "4")
    small_run = ("train", *options, "--target-modules", "query,value", "--r", "16", "--save-every", "2")
    call(*small_run, "--output", tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def without_room(size: int, *command: object) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # as a full disk, for each file alone
        try:
            return refused(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    said = without_room(6_000, *small_run, "--output", tmp_path / "out")
    assert "adapter_model.safetensors cannot be written: File too large; make room, and the same command" in said
    said = without_room(15_000, *small_run, "--output", tmp_path / "out")
    assert "training_state.pt cannot be written: File too large" in said
    said = without_room(15_000, "merge", tmp_path / "whole", tmp_path / "merged")
    assert "cannot be written: File too large" in said
    assert not (tmp_path / "merged").exists()
    call(*small_run, "--output", tmp_path / "out")
    assert_same(pf.load(tmp_path / "out"), pf.load(tmp_path / "whole"))
    call("merge", tmp_path / "whole", tmp_path / "merged")


def test_one_of_several_processes_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ("--model", place / "bert", "--data", place / "train.csv", "--output", tmp_path / "out")
    assert "started as one of 2 processes (WORLD_SIZE)" in refused("train", *options)
    assert "started as one of 2 processes (WORLD_SIZE)" in refused("sweep", *options, "--lr", "1e-3,1e-2")
    assert not (tmp_path / "out").exists()


def test_the_rank_has_a_name_that_torchrun_leaves_alone(place: Path, tmp_path: Path) -> None:
    parser = torch.distributed.run.get_args_parser()
    given = ["--model", str(place / "bert"), "--data", str(place / "train.csv"), "--output", str(tmp_path / "out")]
    given += ["--rank", "3", "--target-modules", "query", "--max-steps", "1", "--threads", "1"]
    assert parser.parse_args(["-m", "peftfn", "train", *given]).training_script_args == ["train", *given]
    call("train", *given)
    config = pf.load(tmp_path / "out").config
    assert isinstance(config, pf.LoraConfig)
    assert config.r == 3


def test_a_dtype_that_is_none_is_refused(place: Path, tmp_path: Path) -> None:
    said = refused("merge", place / "bert", tmp_path / "merged", "--dtype", "float8")
    assert "--dtype float8: give one of auto, float32, bfloat16, float16" in said
