"""Promises hold for the gradients that were given, in float32 and bfloat16, also where their Gramian is all rounding: many rows, low ranks, zero in the hull."""

import copy

import pytest
import residuals
import torch
from precision_problems import KINDS, SIZES, gradients
from rule_table import RULES

import mmfast as mf
from mmfast import ops
from mmfast.ops.heads import heads as linear_heads
from mmfast.resolvers import solve

P = torch.finfo(torch.float32).eps
BACKENDS = ["auto", "cpu", "reference"]
FLOATS = [torch.float32, torch.bfloat16]

CAGRAD_ONE = [
    [-1.487959981, -0.986543834],
    [-1.594650507, -1.615708113],
    [-0.976202548, -1.582391143],
    [0.979153812, 1.233486652],
    [0.908111334, 0.299628139],
]
CAGRAD_TWO = [
    [0.15118339657783508, -0.05410117283463478],
    [-0.15696419775485992, 0.056169841438531876],
    [-0.4688061475753784, -1.31005859375],
    [-0.05314872786402702, 0.019019341096282005],
]
UPGRAD = [
    [0.0708632618, -1.3117647171],
    [0.1266721040, 0.7599202394],
    [-1.2255342003, -0.0481989979],
    [-2.2419435977, -0.7223894596],
    [0.3141788244, 0.2455203086],
]


def rows(values, dtype=torch.float32):
    return list(torch.tensor(values, dtype=dtype))


def ways(grads, rule, backend):
    """One problem in every way of calling: as a batch, as samples (the problem twice), as batch sums, and through a block."""
    yield mf.resolve(grads, copy.deepcopy(rule), backend=backend)
    twice = mf.resolve([torch.stack([g, g]) for g in grads], copy.deepcopy(rule), "sample", backend=backend)
    yield from twice
    yield mf.resolve([torch.stack([g / 2, g / 2]) for g in grads], copy.deepcopy(rule), "batch_sum", backend=backend).sum(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_do_not_follow_rounding(backend):
    for d in ways(rows(CAGRAD_ONE), mf.CAGrad(1.0), backend):
        assert d.norm() < 1e-5
    for d in ways(rows(UPGRAD), mf.UPGrad(), backend):
        assert d.norm() < 1e-5
    J = torch.tensor(CAGRAD_TWO)
    for d in ways(rows(CAGRAD_TWO), mf.CAGrad(0.2), backend):
        # three of the rows lie on a line: nothing helps them all, and what harms none lies across it, as long as the ball allows
        assert (J @ d / J.norm(dim=1)).min() > -1e-5
        mean = J.mean(0)
        assert (d - mean).norm() <= 0.2 * mean.norm() * (1 + 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.15, 0.2, 0.3, 0.45])
def test_fairgrad_of_high_powers(alpha, backend):
    """Where no solution exists the direction vanishes; where one does, it is the solution."""
    J = rows([[0, 1], [-0.25, -0.25], [-1, 0.5], [0.25, -0.25]], torch.float64)
    assert mf.resolve(J, mf.FairGrad(alpha), backend=backend).norm() < 1e-8
    torch.manual_seed(0)
    for seed in range(100):
        G = torch.randn(5, 2, dtype=torch.float64)
        d = mf.resolve(list(G), mf.FairGrad(alpha), backend=backend)
        if torch.linalg.norm(G / G.norm(dim=1, keepdim=True), dim=1).numel() and residuals._hull_misses_zero(G @ G.mT) < 1e-9:
            assert d.norm() < 1e-3, seed
        else:
            assert residuals.fair_residual(alpha)(G @ G.mT, mf.weights(G @ G.mT, mf.FairGrad(alpha), backend=backend)) < 1e-6, seed


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bargain_is_never_longer_than_it_can_be(backend):
    torch.manual_seed(0)
    for _ in range(100):
        J = torch.randn(5, 2)
        for d in ways(list(J), mf.NashMTL(), backend):
            assert d.norm() <= 5**0.5 * (1 + 1e-5)
        if residuals._hull_misses_zero((J @ J.mT).double()) < 1e-6:
            assert mf.resolve(list(J), mf.FairGrad(2.0), backend=backend).norm() <= 5**0.5


def batched(dtype, k, n, seeds=2):
    """Samples of every kind: J [samples, k, n], their names."""
    names = [(kind, seed) for kind in KINDS for seed in range(seeds)]
    return torch.stack([gradients(kind, k, n, dtype, seed) for kind, seed in names]), names


def conditions(name, rule, J, w, w64, exact):
    """What must hold of weights w [k] for gradients J [k, n], each with its violation in units of k times the precision.

    w64 are the weights of the same gradients as float64; exact those of the true Gramian, where it is known to be as inexact as the rounded one.
    """
    k, p = len(J), len(J) * P
    G, norm, d = J @ J.mT, J.norm(dim=1), w @ J
    bound = (w.abs() * norm).sum().clamp(min=1e-300)
    mean, scale = J.mean(0), norm.mean()
    apart = ((w - w64) @ J).norm() / norm.max()
    row = RULES[name]
    if row.nonconflicting:
        yield "conflict", (-(J @ d) / (norm * bound)).max() / p
    if name in ("MGDA", "MGDA l2"):
        yield "shortest", row.residual(G, w) / p
        yield "length", (d.norm() - (norm.min() if name == "MGDA" else 1)) / bound / p
    elif name in ("UPGrad", "DualProj"):
        yield "length", (d.norm() - scale) / scale / p
        yield "float64", apart / p**0.5
    elif name.startswith("CAGrad"):
        shrink = {"CAGrad c=0.1": 1 / 1.1, "CAGrad c=1": 0.5}.get(name, 1.0)
        yield "ball", ((d / shrink - mean).norm() - rule.c * mean.norm()) / scale / p**0.5
        worst, best = ((J @ v / norm).min() / scale for v in (d, w64 @ J))
        yield "worst case", (best - worst) / p**0.5
    elif name.startswith(("NashMTL", "FairGrad")):
        alpha = getattr(rule, "alpha", 1.0)
        if name == "NashMTL(max_norm)":
            yield "length", (d.norm() - 1) / p
            return
        yield "length", (d.norm() / (w ** (1 - 1 / alpha)).sum().sqrt() - 1) / p
        x = w * norm / norm ** ((1 - alpha) / (1 + alpha))
        if x.max() < 10:
            yield "bargain", ((G @ w) * w ** (1 / alpha) - 1).abs().max() / p / 300
    elif name == "PCGrad fixed":
        yield "loop", residuals.pcgrad_fixed_residual(G, w * k) / p if apart > p else 0.0
    elif name.startswith(("GradNorm", "NSGD", "Sum", "Mean", "Constant", "Random")):
        yield "float64", (w - w64).abs().max() / w64.abs().max() / p
    elif name.startswith(("Krum", "Multi-Krum")):
        yield "nearest", row.residual(G, w) / p
    elif name == "PCD":
        yield "length", abs(d.norm() - norm[0]) / norm[0] / p**0.5 / bound * norm[0]
        if w[1:].any():
            yield "progress", (-(J @ d) / norm / norm[0]).max() / p**0.5
    elif name.startswith(("IMTLG", "AlignedMTL", "ConFIG")):
        values = torch.linalg.eigvalsh(G if name.startswith("AlignedMTL") else G / norm / norm.unsqueeze(1))
        kept = values[values > 8 * p * values[-1]]
        if kept[0] > 1e-3 * values[-1] and not ((values > 2 * p * values[-1]) & (values < 32 * p * values[-1])).any():
            yield "aligned", ((w - exact) @ J).norm() / norm.max() / p / 1e3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", list(RULES))
def test_conditions_hold_for_the_gradients(name, dtype):
    """Every optimality condition and bound of every rule, to the precision of the Gramian."""
    row = RULES[name]
    for k, n in SIZES:
        if k < row.min_k:
            continue
        J, names = batched(dtype, k, n)
        grads, base = list(J.unbind(1)), row.make(k)
        J64 = J.double()
        exact = solve.weights(J64 @ J64.mT, None, copy.deepcopy(base).chain(), *_kept(base, len(J), k), False, P)
        _, truth = ops.resolve_info([g.double() for g in grads], copy.deepcopy(base), "sample")
        for backend in ("auto", "reference"):
            out, info = ops.resolve_info(grads, copy.deepcopy(base), "sample", backend=backend)
            w = info[:, :k]
            assert w.isfinite().all() and out.isfinite().all(), (k, n, backend)
            for b, problem in enumerate(names):
                for what, violation in conditions(name, base, J64[b], w[b], truth[b, :k], exact[b]):
                    assert violation <= 4, (what, float(violation), problem, k, n, backend)
        # one by one, past the dispatcher, the same
        b = (k + n) % len(names)
        if not row.make(k).random:
            torch.testing.assert_close(mf.resolve(list(J[b]), row.make(k)), mf.resolve([g[b : b + 1] for g in grads], row.make(k), "sample")[0])


def _kept(rule, problems, k):
    from mmfast.resolvers.chain import bind

    return bind(copy.deepcopy(rule).chain(), (problems,), k, torch.device("cpu"))[1:]
