"""UPGrad, DualProj and PCD beyond the laws that hold for every rule."""

import math

import pytest
import torch
from problems import gramian, kinds
from residuals import dual_cone_residual
from rule_table import RULES

from mmfast import ops
from mmfast.resolvers import cone

BACKENDS = ["auto", "reference"]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 17])
def test_upgrad_is_the_sum_of_its_projections(k, backend):
    """Each projection pi(pref_i e_i) meets the conditions of optimality, and UPGrad's direction is their sum."""
    for kind, G in kinds(k):
        pref = torch.rand(k, dtype=torch.float64)
        pref[k // 2] = 1.0
        total = torch.zeros_like(pref)
        for i in range(k):
            u = torch.zeros_like(pref)
            u[i] = pref[i]
            v = ops.weights(G, cone.DualProj(u.tolist()), backend=backend)
            assert dual_cone_residual(G, u, v) <= 1e-12, (kind, i)
            total += v
        w = ops.weights(G, cone.UPGrad(pref.tolist()), backend=backend)
        size = G.diagonal().sqrt()
        assert (w >= pref - 1e-12 * w.abs()).all(), kind
        assert ((G @ (w - total)).abs() <= 1e-11 * size * (total * size).sum()).all(), kind


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0.34, 0.5, 0.75, 1.0])
def test_strong_conflict(rank, backend):
    """Few dimensions: from projections that vanish (no direction suits all) to cones bounded by most rows."""
    for k in (3, 12, 48):
        G = gramian(k, max(1, round(rank * k)), seed=k)
        u = torch.full((k,), 1 / k, dtype=torch.float64)
        w = ops.weights(G, cone.DualProj(), backend=backend)
        assert dual_cone_residual(G, u, w) <= 1e-12
        assert RULES["UPGrad"].residual(G, ops.weights(G, cone.UPGrad(), backend=backend)) <= 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [cone.UPGrad, cone.DualProj])
def test_no_conflict_changes_nothing(rule, backend):
    G = gramian(6).abs()
    torch.testing.assert_close(ops.weights(G, rule(), backend=backend), torch.full((6,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(ops.weights(G, rule([1, 2, 3, 4, 5, 0]), backend=backend), double([1, 2, 3, 4, 5, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [cone.UPGrad, cone.DualProj])
def test_opposite_gradients_cancel(rule, backend):
    """Exactly opposite rows leave nothing of themselves, and a third row of its own keeps all that is orthogonal to them."""
    J = double([[1, 0, 0], [-2, 0, 0], [0, 3, 0]])
    w = ops.weights(J @ J.mT, rule([1, 1, 1]), backend=backend)
    torch.testing.assert_close(w @ J, double([0, 3, 0]), rtol=1e-12, atol=1e-12)


def nearly_opposite(k, n, count, seed=0):
    """[count, k, n], float64: one pair opposite to 10^-6 ... 10^-12, or two with more rows: what of it is left is squared below the rounding of a Gramian."""
    g = torch.Generator().manual_seed(seed)
    J = torch.randn(count, k, n, dtype=torch.float64, generator=g)
    apart = 10 ** -(6 + 6 * torch.rand(count, 1, dtype=torch.float64, generator=g))
    J[:, 1] = apart * J[:, 1] - J[:, 0] * (0.1 + 2 * torch.rand(count, 1, dtype=torch.float64, generator=g))
    if k > 5:
        J[: count // 2, 3] = apart[: count // 2] * J[: count // 2, 3] - 3 * J[: count // 2, 2]
    return J[:, torch.randperm(k, generator=g)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "n", "count"), [(4, 9, 800), (6, 12, 300), (12, 30, 60)])
def test_nearly_opposite_gradients(k, n, count, backend):
    """A projection is no longer than what it projects and harms no row, also where no factor of the Gramian tells two opposite rows apart."""
    J = nearly_opposite(k, n, count)
    size, G = J.norm(dim=-1), J @ J.mT
    for rule in (cone.UPGrad(), cone.DualProj()):
        d = (ops.weights(G, rule, backend=backend).unsqueeze(1) @ J).squeeze(1)
        assert (d.norm(dim=-1) / size.mean(-1)).max() <= 1 + 1e-6, rule
        assert ((J @ d.unsqueeze(-1)).squeeze(-1) / size).min() >= -1e-6 * size.mean(), rule


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [cone.UPGrad, cone.DualProj])
def test_preference_belongs_to_the_row(rule, backend):
    """A missing row takes its preference with it; the others keep theirs."""
    G, pref, rest = gramian(5, 4), [0.1, 3.0, 0.0, 1.0, 2.0], [0, 2, 3, 4]
    mask = torch.tensor([True, False, True, True, True])
    w = ops.weights(G, rule(pref), mask, backend=backend)
    expected = ops.weights(G[rest][:, rest].contiguous(), rule([pref[i] for i in rest]), backend=backend)
    torch.testing.assert_close(w[rest], expected, rtol=1e-9, atol=1e-12)
    alone = ops.weights(G, rule([0, 1, 0, 0, 0]), mask, backend=backend)
    assert torch.equal(alone, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [cone.UPGrad, cone.DualProj, cone.PCD])
def test_rounded_gramian(rule, backend):
    """A rank-deficient Gramian rounded to float32 is no longer positive semidefinite: the weights stay tame, the direction useful."""
    for k in (4, 16, 48):
        for n in (k // 2, 3 * k // 4):
            J = torch.randn(k, n, dtype=torch.float64)
            G = J @ J.mT
            w = ops.weights(G.float().double(), rule(), backend=backend)
            assert w.isfinite().all() and w.abs().max() <= 1e4
            if rule is not cone.PCD:
                size = G.diagonal().sqrt()
                assert ((G @ w) >= -1e-6 * size * (w * size).sum()).all()


@pytest.mark.parametrize("rule", [cone.UPGrad, cone.DualProj])
@pytest.mark.parametrize("pref", [[1.0, -0.1], [0.0, 0.0], [1.0, math.inf], [math.nan, 1.0], []])
def test_bad_preference(rule, pref):
    with pytest.raises(ValueError, match="pref is .* none negative"):
        rule(pref)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [cone.UPGrad, cone.DualProj])
def test_preference_of_another_length(rule, backend):
    with pytest.raises(ValueError, match="pref has 2 numbers, expected 3"):
        ops.weights(gramian(3), rule([1, 2]), backend=backend)


@pytest.mark.parametrize(
    ("name", "value"), [("tau", -0.1), ("tau", 1.1), ("tau", math.nan), ("beta", 1.0), ("beta", -0.1), ("beta", math.nan)]
)
def test_bad_pcd_parameters(name, value):
    with pytest.raises(ValueError, match=f"{name} is .* should be"):
        cone.PCD(**{name: value})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_pcd_over_many_steps(beta, backend):
    """The averages, of squares over their mean part of the averages before, are bias-corrected; each constraint is g_j'd >= tau |g_j|^2 over the
    average norm, before d gets the norm of g_1."""
    tau, k, rule = 0.3, 5, cone.PCD(0.3, beta)
    average = torch.zeros(k, dtype=torch.float64)
    for step in range(1, 30):
        J = torch.randn(k, 9, dtype=torch.float64) * torch.rand(k, 1, dtype=torch.float64).mul(10).exp()
        w = ops.weights(J @ J.mT, rule, backend=backend)
        square = J.square().sum(-1)
        common = 1 if step == 1 else (square / (average / (1 - beta ** (step - 1)))).mean()
        average = beta * average + (1 - beta) * square / common
        s = (average / (1 - beta**step)).rsqrt()
        scaled, d = J * s.unsqueeze(1), w @ J
        torch.testing.assert_close(d.norm(), J[0].norm(), rtol=1e-9, atol=0)
        d = d * (s[0] / w[0])
        slack = scaled[1:] @ d - tau * scaled[1:].square().sum(-1)
        reach = scaled[1:].norm(dim=1) * (d.norm() + scaled.norm(dim=1))[1:]
        assert (w[1:] >= 0).all()
        assert (slack >= -1e-10 * reach).all()
        assert ((slack * w[1:] / w[0]).abs() <= 1e-10 * (1 + w[1:] / w[0]) * reach).all()


def test_pcd_state_is_the_same_bits():
    ours, theirs = cone.PCD(beta=0.95), cone.PCD(beta=0.95)
    for step in range(20):
        G = gramian(4, seed=step) * 10.0 ** (step - 10)
        mask = torch.tensor([True, step % 3 > 0, True, step > 5])
        ops.weights(G, ours, mask)
        ops.weights(G, theirs, mask, backend="reference")
        assert ours.state is not None and theirs.state is not None
        assert torch.equal(ours.state, theirs.state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pcd_missing_rows(backend):
    """A missing row keeps its average, the first one present is the primary, a newcomer is measured by its own norm."""
    G, rule = gramian(4, 3), cone.PCD(beta=0.5)
    ops.weights(G, rule, torch.tensor([True, True, True, False]), backend=backend)
    assert rule.state is not None
    torch.testing.assert_close(rule.state[:4], G.diagonal() * double([1, 1, 1, 0]))
    w = ops.weights(4 * G, rule, torch.tensor([False, True, False, True]), backend=backend)
    torch.testing.assert_close(rule.state[:4], G.diagonal() * double([1, 1, 1, 4]))  # row 1 says that all are four times as large
    torch.testing.assert_close(w @ (4 * G) @ w, 4 * G[1, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pcd_contradiction_and_nothing_left(backend):
    J = double([[1, 1, 0], [2, 0, 0], [-3, 0, 0], [0, 0, 1]])
    torch.testing.assert_close(ops.weights(J @ J.mT, cone.PCD(), backend=backend), double([1, 0, 0, 0]), rtol=1e-14, atol=0)
    opposite = double([[1, 0], [-2, 0]])  # tau = 0 allows no progress at all: the direction is zero
    torch.testing.assert_close(ops.weights(opposite @ opposite.mT, cone.PCD(tau=0.0), backend=backend) @ opposite, double([0, 0]))
