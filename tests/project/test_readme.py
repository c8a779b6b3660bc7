"""README.md, CONTRIBUTING.md and docs/: their commands and blocks run, and what they name is there."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import peft
import pytest
import torch
import transformers
from places import ROOT

import peftfn as pf

pytest.importorskip("typer")

import cli_folders as small
from cli_folders import call

from peftfn.cli.app import METHODS

README = ROOT / "README.md"
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs" / f"{one}.md" for one in ("methods", "migration", "transforms")),
)
MAKE = shutil.which("make")
ROUNDING = 1e-5  # the same sums in another order, of values about 1


def made(folder: Path) -> None:
    """What README's commands and blocks name, as small real files of those names."""
    stand_ins = {
        "path/to/model": small.bert,
        "train.csv": lambda at: small.write_csv(at, small.rows(48, seed=1)),
        "test.csv": lambda at: small.write_csv(at, small.rows(16, seed=2)),
        "old-adapter": lambda at: shutil.copytree(ROOT / "tests/files/peft-0.5.0/bert-seqcls-bin", at),
    }
    for name, make in stand_ins.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder / name)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The language of each fenced block, empty for commands, and what is in it."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """The code within lines of prose and tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def commands(page: Path) -> list[list[str]]:
    lines = [line for language, text in blocks(page) if not language for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def targets(page: Path) -> set[str]:
    """The targets of make that a page names."""
    named = [words[1] for words in commands(page) if words[0] == "make"]
    return {*named, *(one.split()[1] for one in spans(page) if re.match(r"make [a-z]", one))}


def test_commands_of_the_readme_run_one_after_the_other(tmp_path: Path) -> None:
    made(tmp_path)
    ran: list[str] = []
    with contextlib.chdir(tmp_path):
        for words in commands(README):
            if words[0] == "peftfn":
                call(*words[1:])
                ran.append(words[1])
            else:
                assert words[0] == "make"
    assert ran == ["train", "eval", "merge", "convert", "inspect", "generate", "sweep"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.skipif(MAKE is None, reason="make is not installed")
def test_targets_of_make_that_the_pages_name_are_there() -> None:
    every = set[str]().union(*map(targets, PAGES))
    assert {"demo", "test", "bench", "format", "transforms"} <= every
    for target in sorted(every):
        done = subprocess.run([MAKE or "", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_other_commands_that_the_pages_name_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page in PAGES:
        for one in spans(page):
            if extras := re.fullmatch(r'pip install "?\.(?:\[([a-z,]+)\])?"?', one):
                assert set((extras[1] or "cli").split(",")) <= set(project["optional-dependencies"])
            if script := re.match(r"python (\S+\.py)", one):
                assert (ROOT / script[1]).is_file(), one
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".pre-commit-config.yaml").is_file()
    assert any(one.startswith("pre-commit") for one in project["optional-dependencies"]["dev"])
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in README.read_text()


def test_python_of_the_readme_runs_and_peft_reads_what_it_saves(tmp_path: Path) -> None:
    made(tmp_path)
    ids = torch.tensor([[2, 5, 6, 3], [2, 9, 14, 3]])
    names: dict[str, Any] = {"batches": [{"input_ids": ids, "labels": torch.tensor([0, 7])}] * 2}
    with contextlib.chdir(tmp_path):
        for language, text in blocks(README):
            if language == "python":
                exec(text, names)  # noqa: S102  # the page is the project's own
        assert set(names["grads"]) == set(names["adapter"].params)
        expected = pf.apply(names["model"].eval(), names["adapter"], {"input_ids": ids}).logits
        with oracle.quiet_peft():
            theirs = peft.PeftModel.from_pretrained(names["model"], "my-adapter").eval()
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=ROUNDING, atol=ROUNDING)


def test_each_cell_beside_peft_runs_and_names_what_peft_has(tmp_path: Path) -> None:
    section = README.read_text().split("## Beside PEFT")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.+) \| (`.+) \|$", section, flags=re.MULTILINE)
    assert len(lines) == section.count("\n| ") - 1 > 10
    small.llama(tmp_path / "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    config = pf.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    b, c = (oracle.randomised(pf.init(base, config), seed) for seed in range(2))
    batch = {"input_ids": torch.randint(5, 20, (3, 4))}
    names: dict[str, Any] = {"pf": pf, "torch": torch, "base": base, "config": config, "b": b, "c": c, "batch": batch}
    names |= {"params": dict(base.named_parameters()), "folders": ["folder", "folder"], "folder": "folder"}
    run = transformers.TrainingArguments("run", report_to=[])
    names |= {"Trainer": lambda model: transformers.Trainer(model, run)}
    with oracle.quiet_peft():
        theirs = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama"),
            peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
    with contextlib.chdir(tmp_path):
        for left, right in lines:
            short = right.replace("generate(...)", "generate(**batch, max_new_tokens=2, pad_token_id=4)")
            for code in re.findall(r"`([^`]+)`", short.split(" — ")[0]):
                exec(code, names)  # noqa: S102
            for code in re.findall(r"`([^`]+)`", left):
                for node in ast.walk(ast.parse(code.replace("...", "None"))):
                    if (
                        isinstance(node, ast.Attribute)
                        and isinstance(node.value, ast.Name)
                        and node.value.id == "model"
                    ):
                        assert hasattr(theirs, node.attr), code
                    if isinstance(node, ast.Name) and node.id[0].isupper() and node.id != "Trainer":
                        assert hasattr(peft, node.id), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        place, _, anchor = link.partition("#")
        if "://" in place:
            continue
        target = page.parent / place if place else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_prose_are_there(page: Path) -> None:
    for one in spans(page):
        for path in re.findall(r"\bpf\.((?:\w+\.)*\w+)", one):
            found: Any = pf
            for part in path.split("."):
                found = getattr(found, part)
        for path in re.findall(r"\bpeftfn\.((?:[a-z_]+\.)*\w+)\b", one):
            assert (ROOT / "peftfn" / f"{path.replace('.', '/')}.py").exists() or (
                ROOT / "peftfn" / path.split(".")[0]
            ).exists() or hasattr(pf, path.split(".")[0]), one  # fmt: skip
        for path in re.findall(r"(?:^|\s)((?:benchmarks|tests|docs|notebooks|peftfn)/[\w./-]*)", one):
            assert (ROOT / path).exists(), one


def test_notebooks_that_the_readme_names_are_those_that_there_are() -> None:
    text = README.read_text().split("- `notebooks/`:")[1].split("\n- ")[0]
    assert set(re.findall(r"`(\w+)`", text)) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_methods_of_train_that_the_readme_names_are_those_that_there_are() -> None:
    text = README.read_text().split("`train --method` takes")[1].split(", and every field")[0]
    assert re.findall(r"`([\w-]+)`", text) == list(METHODS)


def test_versions_and_counts_in_the_readme_are_those_of_the_project() -> None:
    text = README.read_text()
    for file, pattern in (
        ("constraints.txt", r"the reference is peft (\S+) "),
        ("constraints-transformers4.txt", r"transformers (4\.\d+), with"),
    ):
        (version,) = re.findall(pattern, text)
        package = "peft" if "peft" in pattern else "transformers"
        assert re.search(rf"^{package}=={re.escape(version)}", (ROOT / file).read_text(), flags=re.MULTILINE)
