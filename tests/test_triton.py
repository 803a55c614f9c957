"""The Triton backend: its kernels under the interpreter, and what it says where it cannot run."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

installed = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments, **environment):
    """Python in a process of its own, where TRITON_INTERPRET is what `environment` says."""
    full = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    full["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments], cwd=Path(__file__).parent.parent, env=full, check=False, capture_output=True, text=True
    )


@installed
@pytest.mark.parametrize("part", ["", "_solve", "_norm", "_likelihoods"])
def test_the_kernels_interpreted(part):
    """Each can be run by itself, too: TRITON_INTERPRET=1 pytest tests/triton_interpreted.py."""
    asked = {"MMFAST_BACKEND": "triton"} if part == "_likelihoods" else {}
    options = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore:Conversion of an array with ndim:DeprecationWarning",
    ]  # by Triton 3.6's interpreter
    if part == "_likelihoods" and version("triton") < "3.7" and not version("numpy").startswith(("1.", "2.0", "2.1", "2.2", "2.3", "2.4")):
        pytest.skip("NumPy 2.5 refuses what Triton 3.6's interpreter makes of a loop's bound; a GPU's compiler knows nothing of either")
    done = run("-m", "pytest", *options, f"tests/triton{part}_interpreted.py", TRITON_INTERPRET="1", **asked)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_the_package_neither_imports_nor_needs_triton():
    done = run("-c", "import sys, mmfast; assert not {'triton', 'mmfast.backends.triton', 'torch._dynamo'} & sys.modules.keys()")
    assert done.returncode == 0, done.stderr
    done = run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mmfast as mf\n"
        "ok, why = mf.backends()['triton']; assert not ok and 'not installed' in why\n"
        "try: mf.gram([torch.ones(3)], backend='triton')\n"
        "except RuntimeError as error: assert 'pip install triton' in str(error)\n"
        "else: raise SystemExit(1)\n",
    )
    assert done.returncode == 0, done.stderr


@installed
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_without_a_gpu_it_says_so():
    code = "import torch, mmfast as mf\nassert not mf.backends()['triton'][0]\nmf.gram([torch.ones(3)], backend='triton')"
    done = run("-c", code)
    assert done.returncode == 1 and "sees no GPU" in done.stderr and "TRITON_INTERPRET" in done.stderr
    assert run("-c", code.replace("assert not", "assert"), TRITON_INTERPRET="1").returncode == 0
