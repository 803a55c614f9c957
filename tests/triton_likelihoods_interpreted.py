"""The Triton kernel of the likelihoods, interpreted on the CPU: through `Joint.log_prob`, against plain torch and float64.

tests/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1 MMFAST_BACKEND=triton.
"""

import copy

import pytest
import torch
from interpreter import poison, quiet  # noqa: F401
from test_log_prob import KINDS, both, error, problem

from mmfast.backends import library
from mmfast.backends.triton import likelihoods, rows

assert rows.INTERPRETED and library.ASKED == "triton", "TRITON_INTERPRET must be 1, MMFAST_BACKEND triton"


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The kernel is what runs."""
    calls, run = [], likelihoods._log_prob
    monkeypatch.setattr(likelihoods, "_log_prob", lambda *args: calls.append(1) or run(*args))
    yield calls
    assert calls


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_no_less_exact_than_torch(kind, dtype, scale):
    """Twice torch's error, and 16 units of rounding: the exponential of the interpreter is NumPy's."""
    torch.manual_seed(1)
    joint, raw, x, seen = problem([KINDS[kind]] * 3, 200, dtype=dtype, scale=scale)
    wide = copy.deepcopy(joint).double()
    exact = both(wide, wide.in_torch, raw.detach().double().requires_grad_(), x.double(), seen)
    hidden = torch.where(seen, x, torch.nan)
    ours, torchs = both(joint, joint.log_prob, raw, hidden, seen), both(joint, joint.in_torch, raw, x, seen)
    for mine, other, right in zip(ours, torchs, exact, strict=True):
        allowed = 2 * error(other, right) if dtype == torch.float32 else 1e-12
        assert mine.dtype == dtype and error(mine, right) <= allowed + 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("samples", [(), (3,), (2, 2)])
@pytest.mark.parametrize("count", [1, 127, 128, 129])
def test_rows_and_samples(count, samples):
    joint, raw, x, seen = problem(rows=count, samples=samples)
    for cells in (None, seen, seen.float()):
        wanted = both(joint, joint.in_torch, raw, x, cells)
        for mine, right in zip(both(joint, joint.log_prob, raw, x, cells), wanted, strict=True):
            torch.testing.assert_close(mine, right, rtol=2e-4, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(joint.log_prob(raw, x, seen), joint.in_torch(raw, x, seen), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["categorical", "ordinal"])
def test_a_class_that_does_not_exist_shows(kind):
    joint, raw, x, _ = problem([KINDS[kind]])
    x[5] = 5
    found = joint.log_prob(raw, x)
    assert found[5].isnan() and found.isnan().sum() == 1
