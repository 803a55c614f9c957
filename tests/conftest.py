"""Shared by all tests: one seed a test, Gramians of every kind a rule must stand."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """The longest first: at the end one of two processes would wait for them."""
    items.sort(key=lambda item: not item.path.name.startswith("test_triton"))
