"""PCGrad and GradVac against the papers' own loops over explicit gradients, with the orders that the random stream gives."""

import copy
import math

import pytest
import torch
from problems import gramian, kinds

from mmfast import ops
from mmfast.resolvers import GradVac, PCGrad
from mmfast.resolvers.philox import Draw

BACKENDS = ["auto", "reference"]


def gradients(k, seed=0):
    return torch.randn(k, 3 * k + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orders(rule, present):
    """Whom each present row meets, in order: by draw, then by index."""
    k = len(present)
    drawn = Draw(rule.rng, 1, 0).integer(torch.arange(k)[:, None] * 256 + torch.arange(k))[0].tolist()
    rows = [i for i in range(k) if present[i]]
    return {i: sorted((j for j in rows if j != i), key=lambda j: (drawn[i][j], j)) for i in rows}


def pcgrad(J, met):
    total = torch.zeros_like(J[0])
    for i, others in met.items():
        g = J[i].clone()
        for j in others:
            if g @ J[j] < 0:
                g -= g @ J[j] / (J[j] @ J[j]) * J[j]
        total += g
    return total


def gradvac(J, met, mean, beta):
    total = torch.zeros_like(J[0])
    for i, others in met.items():
        g = J[i].clone()
        for j in others:
            cosine = float(g @ J[j] / g.norm() / J[j].norm())
            goal = float(mean[i, j])
            if cosine < goal:
                angle, wanted = math.acos(cosine), math.acos(goal)
                g += math.sin(angle - wanted) / math.sin(wanted) * g.norm() / J[j].norm() * J[j]
            mean[i, j] = (1 - beta) * goal + beta * cosine
        total += g
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 64, 256])
def test_pcgrad_is_the_loop_over_pairs(k, backend):
    rule = PCGrad()
    for call in range(3 if k < 100 else 1):
        J = gradients(k, seed=call)
        present = [k < 3 or (i + call) % 3 > 0 for i in range(k)]
        expected = pcgrad(J, orders(rule, present))
        w = ops.weights(J @ J.mT, rule, torch.tensor(present), backend=backend)
        torch.testing.assert_close(w @ J, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.5, 0.05])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 64])
def test_gradvac_is_the_loop_over_pairs(k, beta, backend):
    rule, mean = GradVac(beta), torch.zeros(k, k, dtype=torch.float64)
    for call in range(5):
        J = gradients(k, seed=call) + 0.4 * gradients(k, seed=9)[:1]
        present = [k < 3 or (i + call) % 3 > 0 for i in range(k)]
        expected = gradvac(J, orders(rule, present), mean, beta)
        w = ops.weights(J @ J.mT, rule, torch.tensor(present), backend=backend)
        torch.testing.assert_close(w @ J, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(rule.state.view(k, k), mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_orders_are_fair(backend):
    """Of three rows, each meets the others in either order about equally often, independently of the other rows."""
    J = torch.tensor([[1.0, 0.0, 0.2], [-0.6, 0.8, 0.0], [-0.6, -0.7, 0.4]], dtype=torch.float64)
    G = (J @ J.mT).expand(4000, 3, 3)
    w = ops.weights(G, PCGrad(), backend=backend)
    values, counts = w.mul(1e9).round().unique(dim=0, return_counts=True)
    assert len(values) == 8
    assert (counts - 500).abs().max() < 5 * (4000 * 1 / 8 * 7 / 8) ** 0.5


def test_a_new_order_at_each_call_and_the_same_after_reset():
    G, rule = gramian(16), PCGrad()
    calls = [ops.weights(G, rule) for _ in range(3)]
    assert not torch.equal(calls[0], calls[1]) and not torch.equal(calls[1], calls[2])
    rule.reset()
    assert torch.equal(ops.weights(G, rule), calls[0])


def test_fixed_order_draws_nothing():
    rule = PCGrad(order="fixed")
    assert rule.rng is None and "rng" not in rule.state_dict()
    G = gramian(16)
    assert torch.equal(ops.weights(G, rule), ops.weights(G, rule))


def test_mean_is_sum_over_those_present():
    G = gramian(5)
    mask = torch.tensor([True, False, True, True, True])
    rule = PCGrad(order="fixed")
    mean = ops.weights(G, PCGrad(reduction="mean", order="fixed"), mask)
    torch.testing.assert_close(4 * mean, ops.weights(G, rule, mask))


@pytest.mark.parametrize("rule", [PCGrad(), GradVac()])
@pytest.mark.parametrize("k", [2, 3, 32])
def test_no_conflict_is_the_plain_sum(k, rule):
    G = torch.rand(k, 4 * k, dtype=torch.float64)
    assert torch.equal(ops.weights(G @ G.mT, copy.deepcopy(rule)), torch.ones(k, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_of_gradvac_is_pcgrad(backend):
    for k in (2, 5, 64):
        vac, pc = GradVac(), PCGrad()
        pc.rng.copy_(vac.rng)
        for kind, G in kinds(k):
            vac.reset()
            pc.reset()
            w, expected = (ops.weights(G, rule, backend=backend) for rule in (vac, pc))
            size = G.diagonal().sqrt()
            assert ((w - expected).abs() * size).sum() <= 1e-9 * (expected.abs() * size).sum(), (k, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 5, 17])
def test_gradvac_stays_sane_on_degenerate_gradients(k, backend):
    """Running cosines that reach 1 or -1 and gradients that cancel: after 80 equal calls the result is no larger than its parts allow."""
    names, problems = zip(*kinds(k), strict=True)
    G, rule = torch.stack(problems), GradVac()
    for _ in range(80):
        w = ops.weights(G, rule, backend=backend)
    length = (w.unsqueeze(-2) @ G @ w.unsqueeze(-1)).clamp(min=0).sqrt().view(-1) / G.diagonal(dim1=-2, dim2=-1).sqrt().sum(-1)
    assert w.isfinite().all() and (length < 10).all(), dict(zip(names, length.tolist(), strict=True))
    assert (rule.state.abs() <= 1 + 1e-12).all()
    torch.testing.assert_close(w[names.index("copies")], torch.ones(k, dtype=torch.float64))


def test_opposite_gradients_leave_nothing():
    G = torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=torch.float64)
    for rule in (PCGrad(), GradVac()):
        for backend in BACKENDS:
            w = ops.weights(G, copy.deepcopy(rule), backend=backend)
            assert (w @ G @ w).abs() < 1e-15


@pytest.mark.parametrize("make", ["PCGrad", "GradVac"])
def test_two_rows_against_torchjd(make):
    """Two rows have one order only, so the peer's random one does not matter."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    ours, peer = {"PCGrad": PCGrad, "GradVac": GradVac}[make](), getattr(aggregation, make)()
    for call in range(20):
        J = gradients(2, seed=call)
        torch.testing.assert_close(ops.weights(J @ J.mT, ours) @ J, peer(J), rtol=1e-6, atol=1e-6)


def test_bad_hyperparameters():
    for make, name in (
        (lambda: PCGrad(reduction="max"), "reduction is 'max'"),
        (lambda: PCGrad(order="sorted"), "order is 'sorted'"),
        (lambda: GradVac(beta=1.5), "beta is 1.5"),
        (lambda: GradVac(beta=math.nan), "beta is nan"),
    ):
        with pytest.raises(ValueError, match=name):
            make()
