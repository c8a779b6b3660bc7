"""What tests of `torch.compile` ask of torch."""

from __future__ import annotations

import pytest

from peftfn.core import transforms

one_graph = pytest.mark.skipif(
    not transforms.TRACES_WHOLE, reason="an older Dynamo than that of torch 2.12 calls peftfn.apply between two graphs"
)
