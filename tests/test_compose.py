"""Compose and CRMOGM against the same steps on explicit gradients; the compiled and the Python way; names of resolvers."""

import copy

import pytest
import torch
from problems import gramian

from mmfast import ops
from mmfast.resolvers import (
    CRMOGM,
    DBMTL,
    MGDA,
    NSGD,
    Compose,
    Constant,
    GradDrop,
    GradNorm,
    GradVac,
    Mean,
    MMPareto,
    PCGrad,
    Random,
    Resolver,
    Sum,
    Unit,
    resolver,
)

BACKENDS = ["auto", "reference"]


class Own(Resolver):
    """A user's resolver around another one: only Python can run it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, G, mask=None):
        return ops.weights(G, self.inner, mask)


class Halves(Resolver):
    """Keeps no promise about missing rows."""

    def forward(self, G, mask=None):
        return torch.full_like(G[..., 0], 0.5)


def gradients(k, seed=0):
    return torch.randn(k, 3 * k + 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def project(J):
    """PCGrad with the fixed order, on the rows."""
    rows = []
    for i in range(len(J)):
        g = J[i].clone()
        for j in range(len(J)):
            if j != i and g @ J[j] < 0:
                g -= g @ J[j] / (J[j] @ J[j]) * J[j]
        rows.append(g)
    return torch.stack(rows)


def equalise(J):
    n = J.norm(dim=1)
    return J * (n.square().sum() / n.sum() / n).unsqueeze(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 33])
def test_steps_see_what_the_step_before_left(k, backend):
    J = gradients(k)
    scale = torch.linspace(0.1, 3, k, dtype=torch.float64)
    for make, expected in (
        (lambda: Compose(NSGD(), PCGrad(order="fixed")), project(equalise(J))),
        (lambda: Compose(PCGrad(order="fixed"), NSGD()), equalise(project(J))),
        (lambda: Compose(Constant(scale.tolist()), PCGrad(order="fixed"), NSGD()), equalise(project(J * scale.unsqueeze(1)))),
        (lambda: Compose(PCGrad(order="fixed"), CRMOGM(NSGD()), PCGrad(order="fixed")), project(equalise(project(J)))),
        (lambda: Compose(Sum()), J),
    ):
        w = ops.weights(J @ J.mT, make(), backend=backend)
        torch.testing.assert_close(w @ J, expected.sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_own_resolvers_take_part(k):
    J = gradients(k)
    for make, expected in (
        (lambda: Compose(Own(NSGD()), PCGrad(order="fixed")), project(equalise(J))),
        (lambda: Compose(PCGrad(order="fixed"), Own(NSGD())), equalise(project(J))),
        (lambda: Compose(PCGrad(order="fixed"), Halves(), CRMOGM(Own(NSGD())), PCGrad(order="fixed")), project(equalise(project(J) / 2))),
    ):
        rule = make()
        assert rule.chain() is None
        torch.testing.assert_close(rule(J @ J.mT) @ J, expected.sum(0), rtol=1e-9, atol=1e-9)


def test_python_and_compiled_steps_agree_over_calls():
    """State, random streams, missing rows and batches: the same, whichever way a composition is run."""
    compiled = Compose(GradVac(), CRMOGM(NSGD(update_at=2)), GradNorm(lr=0.1))
    python = copy.deepcopy(compiled)
    python.parts[2] = Own(python.parts[2])
    assert compiled.chain() is not None and python.chain() is None
    for call in range(4):
        G = torch.stack([gramian(5, seed=10 * call + b) for b in range(3)])
        mask = torch.tensor([[True] * 5, [True, False, True, True, True], [call != 1, True, True, False, True]])
        torch.testing.assert_close(python(G, mask), compiled(G, mask), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "held", [lambda: PCGrad(every=3), lambda: GradVac(every=3), lambda: MGDA(every=2)], ids=["PCGrad", "GradVac", "MGDA"]
)
def test_a_python_step_leaves_held_weights_alone(held):
    """`every` means the same beside a step of one's own: weights are kept, also those of a rule that maps rows."""
    torch.manual_seed(0)
    compiled = Compose(held(), Sum())
    python = copy.deepcopy(compiled)
    python.parts[1] = Own(python.parts[1])
    assert compiled.chain() is not None and python.chain() is None
    for call in range(7):
        G = gramian(5, seed=call)
        mask = torch.tensor([True, True, call != 2, True, True])
        torch.testing.assert_close(python(G, mask), compiled(G, mask), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [lambda: MGDA(), lambda: MGDA("l2"), lambda: MMPareto()], ids=["MGDA", "MGDA l2", "MMPareto"])
def test_a_row_without_weight_is_gone(first, backend):
    """Rows that have no part in the shortest vector get weight 0, not nearly 0: a later step that looks at directions alone would make them whole again."""
    for seed in range(6):
        J = gradients(6, seed)
        J[1] -= 2 * J[0]  # a conflict, for MMPareto
        J[3:] = 4 * J.norm(dim=1).max() * (J[:3] / J[:3].norm(dim=1, keepdim=True)).sum(0) + J[3:]
        G = J @ J.mT
        w = ops.weights(G, first(), backend=backend)
        there = w > 1e-6
        assert there.sum() >= 2 and (w[~there] == 0).all() and not there.all()
        norm = J[there].norm(dim=1)
        for rule, expected in ((Unit(), 1 / norm), (DBMTL(), (w[there] * norm).max() / norm)):
            found = ops.weights(G, Compose(first(), rule), backend=backend)
            torch.testing.assert_close(found[there], expected, rtol=1e-6, atol=0)
            assert (found[~there] == 0).all()


@pytest.mark.parametrize("make", [lambda: Compose(Halves(), PCGrad()), lambda: Compose(Halves(), Mean()), lambda: CRMOGM(Halves())])
def test_python_steps_leave_missing_rows_out(make):
    G = torch.stack([gramian(4)] * 3)
    G[0, 1, :] = G[0, :, 1] = torch.nan  # problem 0 is masked there, problem 1 is not finite
    G[1, 2, 0] = torch.inf
    mask = torch.tensor([True, False, True, True])
    w = make()(G, mask)
    assert (w[:, 1] == 0).all() and w[0].isfinite().all() and w[2].isfinite().all()
    assert w[1, [0, 2, 3]].isnan().all()
    rule = make()
    rule(G, mask)
    rule(G, mask)
    assert all(buffer.isfinite().all() for buffer in rule.buffers())


@pytest.mark.parametrize("way", [*BACKENDS, "python"])
def test_what_cancels_is_gone(way):
    """Two opposite gradients leave rounding errors behind, which the next step must not scale up to a gradient."""
    for seed in range(20):
        J = gradients(3, seed)
        J[1] = -0.7 * J[0]
        rest = project(J)[2]
        rule = Compose(PCGrad(order="fixed"), Own(NSGD()) if way == "python" else NSGD())
        w = rule(J @ J.mT) if way == "python" else ops.weights(J @ J.mT, rule, backend=way)
        torch.testing.assert_close(w @ J, rest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda inner: inner, Own, lambda inner: Compose(inner, Sum())], ids=["compiled", "own", "compose"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_crmogm_is_a_running_mean(backend, wrap):
    rule, inner = CRMOGM(wrap(NSGD(update_at=3)), alpha=0.7), NSGD(update_at=3)
    mean = torch.full((4,), torch.nan, dtype=torch.float64)
    for call in range(8):
        G = gramian(4, seed=call)
        mask = torch.tensor([True, call != 4, call > 2, True])
        newest = ops.weights(G, inner, mask)
        mean = torch.where(mask, torch.where(mean.isnan(), newest, 0.7 * mean + 0.3 * newest), mean)
        w = ops.weights(G, rule, mask, backend=backend)
        torch.testing.assert_close(w, torch.where(mask, mean, 0), rtol=1e-10, atol=0)


def test_which_ways_are_compiled():
    chain = Compose(PCGrad(), CRMOGM(NSGD()), Compose(Mean(), Compose(GradVac()))).chain()
    assert [type(rule).__name__ for rule in chain] == ["PCGrad", "NSGD", "CRMOGM", "Mean", "GradVac"]
    assert CRMOGM(Compose(Mean())).chain() is not None
    for rule in (CRMOGM(Compose(Mean(), PCGrad())), CRMOGM(CRMOGM(Mean())), CRMOGM(Halves()), Compose(Mean(), CRMOGM(Halves()))):
        assert rule.chain() is None
        assert rule(gramian(3)).isfinite().all()


def test_nested_crmogm_smooths_twice():
    rule = CRMOGM(CRMOGM(Constant([1.0, 2.0]), alpha=0.5), alpha=0.5)
    for value in ((1.0, 2.0), (3.0, 2.0), (3.0, 2.0)):
        rule.inner.inner.weights = value
        w = rule(gramian(2))
    torch.testing.assert_close(w, torch.tensor([0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 2.5, 2.0], dtype=torch.float64))


def test_preserved_norm():
    G = gramian(5)
    w = ops.weights(G, Compose(NSGD(), PCGrad()), preserve_norm=True)
    torch.testing.assert_close(w @ G @ w, G.sum())


def test_flat_and_readable():
    rule = Compose(Compose(NSGD(), PCGrad(order="fixed")), CRMOGM(Mean(), alpha=0.8))
    assert repr(rule) == "Compose(NSGD(update_at=20), PCGrad(reduction='sum', order='fixed'), CRMOGM(Mean(), alpha=0.8))"
    assert len(rule.parts) == 3


def test_reset_and_state_dict():
    def make():
        return Compose(GradVac(), CRMOGM(NSGD(update_at=1)), CRMOGM(Own(GradNorm(lr=0.1))))

    rule, other = make(), make()
    first = rule(gramian(3, seed=1))
    for seed in (2, 3):
        rule(gramian(3, seed=seed))
    other.load_state_dict(rule.state_dict())
    assert torch.equal(other(gramian(3)), rule(gramian(3)))
    rule.reset()
    rule.parts[2].inner.inner.reset()  # inside a user's own resolver
    assert torch.equal(rule(gramian(3, seed=1)), first)


def test_bad_parts():
    shared = Random()
    for make, message in (
        (lambda: Compose(), "no resolver was given"),
        (lambda: Compose(Mean(), "graddrop"), r"resolvers\[1\] is GradDrop"),
        (lambda: Compose(shared, Mean(), Compose(shared)), "given twice"),
        (lambda: CRMOGM(GradDrop), "expected a Resolver"),
        (lambda: Compose("pcgard"), "did you mean PCGrad"),
        (lambda: Compose(Mean, len), "resolver is a builtin"),
        (lambda: CRMOGM(Mean(), alpha=1.2), "alpha is 1.2"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make()


@pytest.mark.parametrize("name", ["gradvac", "GradVac", "grad-vac", "GRAD_VAC"])
def test_resolver_by_name(name):
    rule = resolver(name, beta=0.25)
    assert isinstance(rule, GradVac) and rule.beta == 0.25


def test_unknown_names():
    with pytest.raises(ValueError, match="no resolver 'pcgard'; did you mean PCGrad"):
        resolver("pcgard")
    with pytest.raises(ValueError, match="expected one of .*GradNorm, .*PCGrad"):
        resolver("zzz")
