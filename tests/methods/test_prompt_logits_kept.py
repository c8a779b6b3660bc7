"""`logits_to_keep` names places of the text, whatever prompt is before it."""

from __future__ import annotations

import torch
from cases import llama

import peftfn as pf


def test_places_are_those_of_the_text_and_a_number_has_room_for_its_labels() -> None:
    model = llama().eval()
    adapter = pf.init(model, pf.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    ids = torch.tensor([[3, 5, 7, 9]])
    whole = pf.apply(model, adapter, {"input_ids": ids}).logits
    for places in ([0, 3], [-1, 1]):
        kept = pf.apply(model, adapter, {"input_ids": ids, "logits_to_keep": torch.tensor(places)}).logits
        torch.testing.assert_close(kept, whole[:, [3 + one % 4 for one in places]])
    torch.testing.assert_close(pf.apply(model, adapter, {"input_ids": ids, "logits_to_keep": 2}).logits, whole[:, -2:])
    losses = [
        pf.apply(model, adapter, {"input_ids": ids, "labels": ids, **more}).loss for more in ({}, {"logits_to_keep": 4})
    ]
    torch.testing.assert_close(*losses)
