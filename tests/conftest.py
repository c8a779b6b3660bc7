"""What every test runs under: no hub, one thread, and a global random state that is put back."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors: threads only add noise, and make tests that run side by side wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same global random state for every test, whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
