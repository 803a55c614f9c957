"""The Triton kernel of the likelihoods, interpreted on the CPU: through `Joint.log_prob`, against plain torch and float64.

tests/test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1 MMFAST_BACKEND=triton.
"""

import copy

import pytest
import torch
from interpreter import poison, quiet  # noqa: F401
from test_log_prob import KINDS, OUTSIDE, both, error, problem

from mmfast.backends import library
from mmfast.backends.triton import likelihoods, rows
from mmfast.models.likelihoods import Normal

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


@pytest.mark.parametrize("kind, value, near", [(kind, *pair) for kind, pairs in OUTSIDE.items() for pair in pairs])
def test_a_value_that_the_likelihood_does_not_take_shows(kind, value, near):
    """NaN, and so are its derivatives; no other value's."""
    joint, raw, x, _ = problem([Normal(), KINDS[kind], Normal()])
    x[5, 1] = value
    out = joint.log_prob(raw, x)
    slopes = torch.autograd.grad(out.sum(), raw)[0]
    assert out[5, 1].isnan() and out.isnan().sum() == 1
    assert slopes[5, 2:-2].isnan().all() and slopes.isnan().sum() == joint.sizes[1]
    x[5, 1] = near
    assert not joint.log_prob(raw, x).isnan().any()
