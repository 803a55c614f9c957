"""What every rule of tests/rule_table.py must show."""

import copy

import pytest
import torch
from problems import gramian, kinds
from rule_table import GOLDEN_J, RULES

from mmfast import ops

SIZES = [1, 2, 3, 5, 8, 17, 32, 64]
NAMES = list(RULES)


def solve(resolver, G, mask=None, backend="auto", **kwargs):
    return ops.weights(G, resolver, mask, backend=backend, **kwargs)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_optimality(name, k):
    """The rule's own conditions hold, for the compiled solver and the plain-torch form, at every scale."""
    row = RULES[name]
    if row.residual is None or k < row.min_k:
        return
    cases = [(kind, scale, G * scale) for kind, G in kinds(k) for scale in (1e-20, 1e-3, 1.0, 1e30)]
    for backend in ("auto", "reference"):
        weights = solve(row.make(k), torch.stack([G for _, _, G in cases]), backend=backend)
        for (kind, scale, G), w in zip(cases, weights, strict=True):
            assert row.residual(G, w) <= row.tolerance, (kind, scale, backend)
            if row.nonconflicting:
                size = G.diagonal().sqrt()
                reach = (w.abs() * size).sum()
                assert ((G @ w) >= -row.tolerance * size * reach - 1e-300).all(), (kind, scale, backend)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_agrees_with_reference(name, k):
    row = RULES[name]
    if k < row.min_k:
        return
    G = torch.stack([gramian(k, seed=s) for s in range(3)])
    ours, theirs = row.make(k), None
    theirs = copy.deepcopy(ours)
    for _ in range(3):  # state and random streams advance alike
        torch.testing.assert_close(solve(ours, G), solve(theirs, G, backend="reference"), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_scale_law(name):
    row = RULES[name]
    if row.power is None:
        return
    k = max(5, row.min_k)
    for kind, G in kinds(k):
        base = row.make(k)
        w = solve(copy.deepcopy(base), G)
        for scale in (2.0**-66, 2.0**100):  # gradients of 1e-10 and 1e15
            torch.testing.assert_close(
                solve(copy.deepcopy(base), G * scale), w * scale**row.power, rtol=1e-9, atol=0, msg=f"{kind} {scale}"
            )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_permutation(name, backend):
    row = RULES[name]
    if not row.equivariant:
        return
    for k in (2, 5, 16):
        if k < row.min_k:
            continue
        G, order = gramian(k), torch.randperm(k)
        w = solve(row.make(k), G, backend=backend)
        torch.testing.assert_close(solve(row.make(k), G[order][:, order].contiguous(), backend=backend), w[order], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_missing_rows_are_left_out(name, backend):
    """A masked row and an all-zero row both vanish from the problem, whatever they held."""
    row = RULES[name]
    k = row.min_k + 4
    G = gramian(k)
    mask = torch.ones(k, dtype=torch.bool)
    mask[1] = False
    poisoned = G.clone()
    poisoned[1], poisoned[:, 1] = torch.nan, torch.nan
    zeroed = G.clone()
    zeroed[1], zeroed[:, 1] = 0, 0
    base = row.make(k)
    a = solve(copy.deepcopy(base), poisoned, mask, backend)
    b = solve(copy.deepcopy(base), zeroed, None, backend)
    assert a[1] == 0 and a.isfinite().all()
    assert torch.equal(a, b)
    if row.equivariant:
        rest = [i for i in range(k) if i != 1]
        torch.testing.assert_close(a[rest], solve(row.make(k - 1), G[rest][:, rest].contiguous(), None, backend), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_and_empty(name, backend):
    row = RULES[name]
    k = row.min_k + 2
    for bad in (torch.nan, torch.inf):
        G = torch.stack([gramian(k), gramian(k)])
        G[0, 0, 1] = G[0, 1, 0] = bad
        w = solve(row.make(k), G, backend=backend)
        assert w[0].isnan().all() and w[1].isfinite().all()
    assert torch.equal(solve(row.make(k), torch.zeros(k, k, dtype=torch.float64), backend=backend), torch.zeros(k, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", [n for n in NAMES if RULES[n].golden])
def test_golden(name, backend):
    row = RULES[name]
    w = solve(row.make(2), GOLDEN_J @ GOLDEN_J.mT, backend=backend)
    torch.testing.assert_close(w, torch.tensor(row.golden, dtype=torch.float64), rtol=0, atol=row.golden_tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_preserve_norm(name):
    row = RULES[name]
    k = row.min_k + 3
    G = gramian(k)
    for backend in ("auto", "reference"):
        w = solve(row.make(k), G, preserve_norm=True, backend=backend)
        torch.testing.assert_close(w @ G @ w, G.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_against_torchjd(name):
    """Where the peer is accurate: norms near 1, full rank."""
    row = RULES[name]
    if row.torchjd is None:
        return
    pytest.importorskip("torchjd")
    for k in (2, 3, 5, 8):
        if k < row.min_k:
            continue
        J = torch.randn(k, 3 * k + 5, dtype=torch.float64) / (3 * k + 5) ** 0.5
        expected = row.torchjd()(J)
        torch.testing.assert_close(solve(row.make(k), J @ J.mT) @ J, expected, rtol=2e-3, atol=2e-3)
