"""Shared by all tests: one seed a test, Gramians of every kind a rule must stand."""

import os
from collections import Counter

import pytest
import torch

LONG = os.environ.get("MMFAST_LONG", "0") not in (
    "",
    "0",
)  # make ptx and make triton: all of what takes long, of which make test has a part


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """The longest first: at the end one of two processes would wait for them. Of interpreted Triton kernels one case in eight, of each test the first."""
    items.sort(key=lambda item: not item.path.name.startswith("test_triton"))
    if not LONG:
        before: Counter = Counter()
        for item in items[:]:
            if item.path.name.startswith("triton_"):
                if before[item.function] % 8:
                    items.remove(item)
                before[item.function] += 1
