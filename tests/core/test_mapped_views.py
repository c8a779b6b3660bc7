"""Views as other dtypes under `torch.vmap`, for which an older torch has no rule: the same bits are computed."""

from __future__ import annotations

import pytest
import torch
from torch import vmap

from peftfn.core import transforms


@pytest.mark.parametrize("has_rule", [True, False])
def test_bits_are_those_of_the_view(has_rule: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "_VIEWS_MAPPED", has_rule and transforms._VIEWS_MAPPED)
    words = torch.randint(-(2**63), 2**63 - 1, (3, 5), generator=torch.Generator().manual_seed(0))
    octets = words.view(torch.int8)
    assert torch.equal(vmap(transforms.as_bytes)(words), octets)
    assert torch.equal(vmap(transforms.as_words)(octets), words)
    assert torch.equal(vmap(transforms.as_uint8)(octets), octets.view(torch.uint8))
    assert torch.equal(vmap(transforms.as_uint8)(octets > 0), (octets > 0).view(torch.uint8))
