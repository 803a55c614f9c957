"""Every example in a docstring does what it shows."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import mmfast as mf

MODULES = [m.name for m in pkgutil.walk_packages(mf.__path__, "mmfast.") if not m.name.endswith(("__main__", "._C", "._host"))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")
    assert doctest.testmod(module, extraglobs={"mf": mf, "torch": torch, "nn": nn}).failed == 0


def test_the_operators_have_examples():
    for function in (mf.gram, mf.combine, mf.weights, mf.resolve, mf.backends, mf.ImpartialityBlock, mf.LinearHeads):
        assert ">>>" in function.__doc__
