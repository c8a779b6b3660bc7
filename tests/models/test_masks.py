"""Padding masks under `torch.vmap`: rows of unlike length, one by one and mapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from cases import BY_NAME, Case, loss, texts, trained
from exact import EXACT, Float64, off
from snapshot import snapshot
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

import peftfn as pf

NAMES = ("llama", "gpt2", "albert", "ia3-llama", "adalora-gpt2", "prompt-bert", "prompt-t5", "p-tuning-lstm-gpt2")
NAMES += ("prefix-llama", "prefix-bert", "prefix-t5", "adaption-llama", "adaption-gpt2")
# transformers 4 decides for these when the model is built, and its decision looks at the mask.
BUILT_IN = ("albert", "prompt-bert", "prefix-bert") if transformers.__version__ < "5" else ()
on_texts = pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in NAMES if name not in BUILT_IN], ids=lambda case: case.name
)


def padded(case: Case) -> dict[str, Tensor]:
    """A batch whose first two rows are padded, right and left, and whose others are not."""
    return {**case.batch(), "attention_mask": texts()["attention_mask"]}


def alone(model: Any, adapter: pf.Adapter, params: Any, row: dict[str, Tensor]) -> Tensor:
    return loss(pf.apply(model, adapter.replace(params=params), {name: tensor[None] for name, tensor in row.items()}))


@on_texts
def test_gradients_of_padded_rows_are_those_of_each_row_alone(case: Case) -> None:
    assert_mapped_rows_are_those_alone(case, case.exact())


@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")  # of transformers 4, whose BERTs call torch's own
@pytest.mark.parametrize("name", ["albert", "prompt-bert", "prompt-t5", "llama", "gpt2"])
def test_so_they_are_where_attention_is_eager(name: str) -> None:
    model = BY_NAME[name].exact()
    model.set_attn_implementation("eager")
    assert_mapped_rows_are_those_alone(BY_NAME[name], model)


def assert_mapped_rows_are_those_alone(case: Case, model: Any) -> None:
    batch = padded(case)
    adapter = trained(pf.init(model, case.config, dtype=torch.float64))
    before, kind = snapshot(model), model.config._attn_implementation
    one = grad(lambda params, row: alone(model, adapter, params, row))
    with Float64():
        together = vmap(one, in_dims=(None, 0))(adapter.params, batch)
    assert snapshot(model) == before
    assert model.config._attn_implementation == kind
    for number in range(4):
        with Float64():
            expected = one(adapter.params, {name: tensor[number] for name, tensor in batch.items()})
        for leaf in expected.values():
            for name, tensor in leaf.items():
                assert tensor.any() or name in ("lora_A", "ia3_l")  # a position's row of an embedding may be unused
        assert off(tree_map(lambda tensor: tensor[number], together), expected) < EXACT  # noqa: B023  # called at once


def test_a_mask_that_is_mapped_decides_what_is_seen() -> None:
    case = BY_NAME["llama"]
    model, batch = case.exact(), padded(case)
    adapter = trained(pf.init(model, case.config, dtype=torch.float64))
    row = {"input_ids": batch["input_ids"][0]}
    masks = torch.ones(3, 6, dtype=torch.long)
    masks[1, 0] = masks[2, :3] = 0
    with Float64():
        mapped = vmap(lambda mask: alone(model, adapter, adapter.params, {**row, "attention_mask": mask}))(masks)
        for mask, found in zip(masks, mapped, strict=True):
            assert off(found, alone(model, adapter, adapter.params, {**row, "attention_mask": mask})) < EXACT
    assert mapped.unique().numel() == 3
