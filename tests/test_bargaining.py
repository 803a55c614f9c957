"""NashMTL and FairGrad beyond the laws of test_rules.py."""

import pytest
import torch
from problems import gramian, kinds
from residuals import fair_residual

from mmfast import ops
from mmfast.resolvers.bargaining import FairGrad, NashMTL

BACKENDS = ["auto", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cosine", [-0.999999, -0.7, 0.0, 0.5, 1.0])
def test_nash_of_two_rows_in_closed_form(cosine, backend):
    norm = torch.tensor([3e-4, 2e5], dtype=torch.float64)
    C = torch.tensor([[1, cosine], [cosine, 1]], dtype=torch.float64)
    w = ops.weights(C * norm * norm.unsqueeze(1), NashMTL(), backend=backend)
    torch.testing.assert_close(w, 1 / (norm * (1 + C[0, 1]).sqrt()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nash_is_fairgrad_of_alpha_one(backend):
    for k in (1, 3, 8, 40):
        G = gramian(k)
        assert torch.equal(ops.weights(G, NashMTL(), backend=backend), ops.weights(G, FairGrad(1.0), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.25, 0.5, 3.0, 10.0])
def test_every_alpha(alpha, backend):
    for k in (1, 2, 5, 17, 64):
        for kind, G in kinds(k):
            if kind in ("normal", "aligned", "copies", "orthogonal", "nearly opposite", "norms over 10^6"):
                w = ops.weights(G, FairGrad(alpha), backend=backend)
                assert fair_residual(alpha)(G, w) <= 1e-8, (k, kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_hard_problems(backend):
    """Low rank, clusters of opposite rows, norms over many orders of magnitude: Newton's cut-off steps arrive in each."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    for k in (3, 6, 20):
        few = normal(100, k, max(1, k // 3))
        clusters = normal(100, 3, k + 3)[:, torch.arange(k) % 3] * normal(100, k, 1).sign() + 1e-2 * normal(100, k, k + 3)
        heavy = normal(100, k, k) * (4 * normal(100, k, 1)).exp() * (2 * normal(100, 1, k)).exp()
        off_line = 10 ** (-6 * torch.rand(100, 1, 1, dtype=torch.float64, generator=g))
        line = normal(100, k, 1) * normal(100, 1, k) + off_line * normal(100, k, k)
        for J in (few, clusters, heavy, line):
            G = J @ J.mT
            w = ops.weights(G, NashMTL(), backend=backend)
            worst = max(fair_residual(1.0)(G[b], w[b]) for b in range(len(G)))
            assert worst <= 1e-8, (k, worst)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resolver", [NashMTL(), FairGrad(0.5), FairGrad(2.0)], ids=repr)
def test_pareto_stationary(resolver, backend):
    """Rows that sum to zero: finite weights, and a direction that vanishes beside the rows it is made of."""
    for k in (2, 3, 16):
        J = torch.randn(k, 3 * k, dtype=torch.float64)
        J -= J.mean(0)
        for scale in (1e-12, 1.0, 1e12):
            w = ops.weights(scale**2 * (J @ J.mT), resolver, backend=backend)
            assert w.isfinite().all() and (w > 0).all()
            assert (w @ J).norm() <= 1e-5 * (w * J.norm(dim=1)).sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_the_direction(backend):
    """sqrt(K) at every scale, cut down to max_norm where that is less."""
    for k in (1, 2, 9):
        for scale in (1e-16, 1.0, 1e20):
            G = gramian(k) * scale
            for max_norm, expected in ((None, k**0.5), (0.1, 0.1), (100.0, k**0.5)):
                w = ops.weights(G, NashMTL(max_norm), backend=backend)
                torch.testing.assert_close((w @ G @ w).sqrt().item(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_zero_is_the_mean_of_those_present(backend):
    mask = torch.tensor([True, False, True, True])
    w = ops.weights(gramian(4), FairGrad(0.0), mask, backend=backend)
    torch.testing.assert_close(w, mask.double() / 3, rtol=0, atol=1e-15)


def test_bad_arguments():
    for max_norm in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_norm is .* expected None or a positive number"):
            NashMTL(max_norm)
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha is .* expected 0 or a number from 0.05 up"):
            FairGrad(alpha)


def test_repr():
    assert repr(NashMTL()) == "NashMTL(max_norm=None)"
    assert repr(FairGrad(2)) == "FairGrad(alpha=2.0)"
