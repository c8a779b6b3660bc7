"""docs/methods.md: a section for every method, in one form, and nothing that is not there."""

from __future__ import annotations

import dataclasses
import re

import pytest
from places import ROOT

import peftfn as pf
from peftfn import methods

PAGE = (ROOT / "docs" / "methods.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
ELSEWHERE = {"alora_offsets", "init_type", "input_ids", "input_type_mask", "of_cache", "task_ids"}
"""Names of what a call or a sub-config has, and of functions."""


def config(text: str) -> str:
    """The name of the config that a section begins with."""
    return text.split("`")[1].split("(", maxsplit=1)[0]


def test_the_page_has_every_method_once_in_the_order_of_the_alphabet() -> None:
    heads = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    assert heads == sorted(heads, key=lambda head: re.sub(r"[^a-z0-9 ]", "", head.lower()))
    named = {config(text) for text in SECTIONS.values()}
    assert named == {method.config.__name__ for method in methods.TABLE}
    for method in methods.TABLE:  # a variant is asked for by a field
        if method.variant:
            assert any(f"{method.variant}=" in text for text in SECTIONS.values())


@pytest.mark.parametrize("head", SECTIONS)
def test_a_section_says_what_when_and_at_what_cost_and_its_fields_are_there(head: str) -> None:
    text = SECTIONS[head]
    assert re.search(r"\]\(https://|no paper", text)
    assert re.findall(r"\*(\w+)\*: ", text)[:4] == ["When", "Parameters", "Time", "Layers"]
    fields = {*re.findall(r"`([a-z]+(?:_[a-z_0-9]+)+)`", text), *re.findall(r"`(\w+)=", text)}
    assert fields <= {field.name for field in dataclasses.fields(getattr(pf, config(text)))} | ELSEWHERE
