"""GradNorm against autograd and torch's Adam, NSGD against its formula, and what both remember."""

import math

import pytest
import torch
from problems import gramian

from mmfast import ops
from mmfast.resolvers import NSGD, GradNorm

BACKENDS = ["auto", "reference"]


def norms_at(call, k=4):
    """Norms that fall at different rates from different places."""
    return torch.tensor([10.0**i * math.exp(-0.05 * call * (i + 1)) + 0.1 for i in range(k)], dtype=torch.float64)


def problem(norms, seed=0):
    J = torch.nn.functional.normalize(torch.randn(len(norms), 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)
    J = J * norms.unsqueeze(1)
    return J @ J.mT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_gradnorm_is_adam_on_its_loss(alpha, backend):
    rule = GradNorm(alpha=alpha, lr=0.02, update_at=5)
    logit = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logit], lr=0.02)
    first = torch.ones(4, dtype=torch.float64)
    for call in range(1, 40):
        n = norms_at(call)
        if call == 5:
            first = n
        a = 4 * logit.softmax(0)
        torch.testing.assert_close(ops.weights(problem(n, call), rule, backend=backend), a.detach(), rtol=1e-10, atol=0)
        size, change = n / n.mean(), n / first
        target = (a * size).mean().detach() * (change / change.mean()) ** alpha
        adam.zero_grad()
        (a * size - target).abs().sum().backward()
        adam.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradnorm_equalises_norms(backend):
    n = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    rule = GradNorm(lr=0.01)
    for _ in range(400):
        w = ops.weights(problem(n), rule, backend=backend)
    torch.testing.assert_close(w * n, (w * n).mean().expand(3), rtol=0.05, atol=0)
    torch.testing.assert_close(w.sum(), torch.tensor(3.0, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradnorm_rests_where_norms_are_equal(backend):
    """Rounding must not decide in which direction the weights drift."""
    rule = GradNorm(lr=0.1)
    for call in range(50):
        w = ops.weights(problem(torch.full((5,), 0.1, dtype=torch.float64), call), rule, backend=backend)
    torch.testing.assert_close(w, torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradnorm_does_not_see_the_scale(backend):
    weights = []
    for scale in (1e-18, 1.0, 1e24):
        rule = GradNorm(alpha=1.0, lr=0.05, update_at=3)
        for call in range(20):
            w = ops.weights(problem(norms_at(call)) * scale, rule, backend=backend)
        weights.append(w)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(weights[2], weights[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [GradNorm(alpha=1.0, lr=0.1, update_at=2), NSGD(update_at=2)])
def test_missing_rows_keep_their_state(rule, backend):
    """Rows 0 and 2 go through what they would have gone through without row 1, and row 1 starts late."""
    rule.reset()
    alone = type(rule)(**{name: getattr(rule, name) for name in ("alpha", "lr", "update_at") if hasattr(rule, name)})
    for call in range(6):
        G = problem(norms_at(call, 3), call)
        w = ops.weights(G, rule, torch.tensor([True, False, True]), backend=backend)
        rest = G[[0, 2]][:, [0, 2]].contiguous()
        torch.testing.assert_close(w[[0, 2]], ops.weights(rest, alone, backend=backend), rtol=1e-12, atol=0)
        kept = rule.state[:-1].view(-1, 3)
        assert w[1] == 0 and (kept[:, 1] == 0).all()
    ops.weights(problem(norms_at(7, 3)), rule, backend=backend)
    first = rule.state[-4:-1] if isinstance(rule, NSGD) else rule.state[9:12]
    torch.testing.assert_close(first[1], norms_at(7, 3)[1])
    torch.testing.assert_close(first[0], norms_at(1, 3)[0])  # of the second call


@pytest.mark.parametrize("backend", BACKENDS)
def test_nsgd_is_its_formula(backend):
    rule, first = NSGD(update_at=3), torch.ones(4, dtype=torch.float64)
    for call in range(1, 8):
        n = norms_at(call) * 10.0 ** (3 * call)  # the Gramian's own scale must not leak into the norms that are kept
        if call == 3:
            first = n
        change = n / first
        expected = (change / change.sum() * n).sum() / n
        torch.testing.assert_close(ops.weights(problem(n), rule, backend=backend), expected, rtol=1e-10, atol=0)


def test_single_gradient_is_left_alone():
    for rule in (GradNorm(), NSGD()):
        for backend in BACKENDS:
            assert torch.equal(ops.weights(gramian(1), rule, backend=backend), torch.ones(1, dtype=torch.float64))


def test_state_is_saved():
    rule, G = GradNorm(lr=0.1), gramian(4)
    for _ in range(3):
        ops.weights(G, rule)
    other = GradNorm(lr=0.1)
    other.load_state_dict(rule.state_dict())
    assert torch.equal(ops.weights(G, other), ops.weights(G, rule))


def test_bad_hyperparameters():
    for make, message in (
        (lambda: GradNorm(alpha=-1.0), "alpha is -1.0"),
        (lambda: GradNorm(lr=math.inf), "lr is inf"),
        (lambda: GradNorm(update_at=0), "update_at is 0"),
        (lambda: NSGD(update_at=2.5), "update_at is 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
