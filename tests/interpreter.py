"""Fixtures of the files that Triton's interpreter runs: whoever imports them has them around every test."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter computes with NumPy, which warns of what a GPU does without a word."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every fresh buffer is full of NaN, so that an element that nobody writes shows."""
    real = torch.empty

    def poisoned(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
