"""What every test runs under: no hub, one thread, and a global random state that is put back.

`--threads`, `--order` and `--sums` run the same tests as another machine might; `make test-machines` does.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import random

import pytest
import sums
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """What may differ between two machines, or two runs."""
    parser.addoption("--threads", type=int, default=1, help="threads that torch uses in each process (1)")
    parser.addoption("--order", type=int, metavar="SEED", help="files, and the tests of each, in a random order")
    parser.addoption("--sums", type=int, metavar="SEED", help="products add up in another order, as on another CPU")
    parser.addoption("--device", help="where test_gpu.py runs: cpu tries the tests (the GPU, if there is one)")


def pytest_configure(config: pytest.Config) -> None:
    """Small tensors: threads only add noise, and make tests that run side by side wait for each other."""
    torch.set_num_threads(config.getoption("threads"))
    if config.getoption("sums") is not None:
        sums.reorder(config.getoption("sums"))


@pytest.hookimpl(tryfirst=True)  # pytest then puts together again what shares a fixture
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests in the order of a seed. Those of a file stay together: they share what is made once for all of them."""
    seed = config.getoption("order")
    if seed is not None:
        draw = random.Random(seed)
        places = {path: draw.random() for path in sorted({item.path for item in items})}
        items.sort(key=lambda item: (places[item.path], draw.random()))


@pytest.fixture(autouse=True)
def seeded():
    """The same global random state for every test, whatever ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
