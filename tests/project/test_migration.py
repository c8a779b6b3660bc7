"""docs/migration.md: every line runs, PEFT's cell in peft and ours beside it, and what it calls equal is equal."""

from __future__ import annotations

import ast
import contextlib
import copy
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import bases
import decoding
import optree
import oracle
import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import OfflineModeIsEnabled
from places import ROOT
from torch import Tensor

import peftfn as pf
from peftfn.checkpoints import keys

PAGE = ROOT / "docs" / "migration.md"
ROUNDING = 1e-5  # the same sums in another order, of values about 1

pytestmark = pytest.mark.skipif(oracle.IS_OLD, reason="the page is about peft 0.21; older ones lack some of it")


class Row(NamedTuple):
    """One line of the page's tables."""

    theirs: str
    ours: str
    note: str


def rows() -> list[Row]:
    found = re.findall(r"^\| `(.+?)` \| `(.+?)` \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE)
    return [Row(theirs, ours, note.strip()) for theirs, ours, note in found]


ROWS = rows()
# Where both sides draw a random adapter: peft's name of it, its model and ours. Then both get the same, with noise.
DRAWN = {
    "model = get_peft_model": ("default", "model", "a"),
    "model.add_adapter": ("b", "model", "b"),
    "soft = get_peft_model": ("default", "soft", "soft"),
}


def value(code: str, names: dict[str, Any]) -> Any:
    """Run the code; what its last expression gives, or what it calls `out`."""
    *before, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        exec(code, names)  # noqa: S102  # the page is the project's own
        return names.pop("out", None)
    exec(compile(ast.Module(before, []), "<cell>", "exec"), names)  # noqa: S102
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)  # noqa: S307


def same(one: Any, other: Any) -> None:
    if isinstance(one, dict) and "logits" in one:
        same(one["logits"], other["logits"])
        if one.get("loss") is not None:
            same(one["loss"], other["loss"])
    elif isinstance(one, dict):
        assert sorted(one) == sorted(other)
        for name, tensor in one.items():
            same(tensor, other[name])
    elif isinstance(one, Tensor):
        torch.testing.assert_close(other.detach(), one.detach(), rtol=ROUNDING, atol=ROUNDING)
    else:
        assert one == other


def share(row: Row, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Give peft the adapter that this row has drawn for us, with noise in it."""
    for start, (name, model, own) in DRAWN.items():
        if row.theirs.startswith(start):
            ours[own] = oracle.randomised(ours[own], seed=len(own) + ord(own[0]))
            if "adapters" in ours:
                ours["adapters"][own] = ours[own]
            peft.set_peft_model_state_dict(theirs[model], keys.to_keys(ours[own]), adapter_name=name)


def settings(folder: Path, library: Any) -> dict[str, Any]:
    """What both columns start from: the page's own block, run in a folder that has the base."""
    torch.manual_seed(0)
    bases.BASES["llama"].make().save_pretrained(folder / "path/to/model")
    names: dict[str, Any] = {"copy": copy, "torch": torch, "ids": bases.ids(3, 6), "classifier": bases.bert()}
    names |= {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "Trainer", "TrainingArguments")}
    names |= {name: getattr(library, name) for name in dir(library) if name.endswith("Config")}
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(block) == 1
    with contextlib.chdir(folder):
        exec(block[0], names)  # noqa: S102
    return names


def peft_names() -> dict[str, Any]:
    from peft.helpers import rescale_adapter_scale
    from peft.optimizers import create_loraplus_optimizer
    from peft.utils.hotswap import hotswap_adapter

    found = {name: getattr(peft, name) for name in dir(peft) if not name.startswith("_")}
    extra = (rescale_adapter_scale, create_loraplus_optimizer, hotswap_adapter)
    return found | {one.__name__: one for one in extra}


def run(row: Row, theirs: dict[str, Any], ours: dict[str, Any], folders: tuple[Path, Path]) -> None:
    with contextlib.chdir(folders[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft and its user do is not ours
        if row.note.startswith("needs a hub"):
            with pytest.raises((OfflineModeIsEnabled, ValueError, OSError)):
                value(row.theirs, theirs)
        else:
            expected = value(row.theirs, theirs)
    with contextlib.chdir(folders[1]), warnings.catch_warnings():
        if row.note.startswith("needs a hub"):
            with pytest.raises((OfflineModeIsEnabled, FileNotFoundError)):
                value(row.ours, ours)
            return
        found = value(row.ours, ours)
    share(row, theirs, ours)
    if row.theirs.startswith("soft.generate") and decoding.cache_name(transformers.LlamaModel) == "cache":
        assert not torch.equal(expected, found)  # peft 0.21.2 puts the prompt in again at each step
        prompt = ours["prompt"]["input_ids"]
        expected = torch.cat([by_hand(ours, one[None]) for one in prompt])
    if row.note.startswith("="):
        assert expected is not None
        same(expected, found)


def by_hand(ours: dict[str, Any], text: Tensor) -> Tensor:
    """What the page's line about a prompt and generate has to give for one row."""
    said = decoding.greedy(decoding.by_hand(ours["base"], ours["soft"], text), text, 4)
    return torch.cat([text, said], 1)


def test_every_line_runs_and_is_true(tmp_path: Path) -> None:
    places = tmp_path / "theirs", tmp_path / "ours"
    theirs = peft_names() | settings(places[0], peft)
    ours = settings(places[1], pf) | {"pf": pf, "keys": keys, "optree": optree}
    ours["params"] = dict(ours["base"].named_parameters())
    before = {name: tensor.clone() for name, tensor in ours["base"].state_dict().items()}
    wrong: list[str] = []
    for row in ROWS:
        try:
            run(row, theirs, ours, places)
        except Exception as error:  # noqa: BLE001  # the other lines are to be run too
            wrong.append(f"{row.theirs}\n{row.ours}\n{type(error).__name__}: {error}\n")
        assert all(torch.equal(tensor, before[name]) for name, tensor in ours["base"].state_dict().items())
    torch.compiler.reset()
    assert not wrong, "\n".join(wrong)


def test_every_line_of_the_tables_is_run() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    heads = [line for line in lines if line.startswith(("| PEFT |", "|---|"))]
    assert len(ROWS) == len(lines) - len(heads) > 70


def test_the_page_names_what_peft_exports_and_every_operation_of_its_models() -> None:
    text = PAGE.read_text()
    functions = [name for name in peft.__all__ if name[0].islower()]
    special = {  # of methods, inits and models that peftfn does not have yet
        *("compose_cartridge_adapters", "convert_to_lora", "create_arrow_model", "find_kappa_target_modules"),
        *("get_eva_state_dict", "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text"),
        *("initialize_lora_eva_weights", "preprocess_loraga", "prompt_embeddings_from_past_key_values"),
        *("replace_lora_weights_loftq", "save_as_lora", "set_base_model_state_dict"),
    }
    assert [name for name in functions if name not in special and name not in text] == []
    models = (peft.PeftModel, peft.LoraModel)
    operations = {name for one in models for name in vars(one) if name[0].islower() and callable(vars(one)[name])}
    inner = {"tuner_layer_cls", "forward", "supports_lora_conversion", "subtract_mutated_init"}
    assert sorted(name for name in operations - inner if name not in text) == []
