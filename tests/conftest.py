"""Shared by all tests: one seed a test, Gramians of every kind a rule must stand."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
