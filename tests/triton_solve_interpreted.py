"""The solvers in Triton against the rules' own conditions and the plain-torch forms: by Triton's interpreter where there is no GPU."""

import copy

import pytest
import residuals
import torch
from precision_conditions import conditions
from precision_problems import KINDS, gradients
from problems import gramian, kinds
from rule_table import RULES
from test_cone import nearly_opposite
from test_minnorm import hard, randn
from test_precision import CAGRAD_ONE, CAGRAD_TWO, UPGRAD

from mmfast import resolvers
from mmfast.backends.triton import solve as solvers
from mmfast.backends.triton.rows import INTERPRETED
from mmfast.resolvers.chain import states_of
from mmfast.resolvers.solve import precision_of
from mmfast.resolvers.solve import weights as plain_weights

DEVICE = "cpu" if INTERPRETED else "cuda"
NAMES = [name for name, row in RULES.items() if solvers.has_kernel(row.make(row.min_k).chain() or (), row.min_k)]
FORMS = ["Sum", "Mean", "Constant", "Random", "PCGrad", "PCGrad fixed", "MGDA", "MGDA l2", "MGDA capped", "CAGrad"]
FORMS += ["UPGrad", "DualProj", "NashMTL", "FairGrad(0.5)", "IMTLG", "AlignedMTL", "ConFIG"]  # of every kernel
EPS = torch.finfo(torch.float64).eps
SINGLE = precision_of(torch.float32)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What a kernel leaves unwritten shows as NaN."""
    monkeypatch.setattr(solvers.torch, "empty", lambda *args, **kwargs: torch.full(*args, torch.nan, **kwargs))


def solve(rule, G, mask=None, norm=False, precision=EPS):
    mask = None if mask is None else mask.to(DEVICE)
    rng = None if rule.rng is None else rule.rng.to(DEVICE)
    w = solvers.solve(G.to(DEVICE), mask, [rule], [None], rng, norm, precision)
    if rng is not None:
        rule.rng = rng.cpu()
    return None if w is None else w.cpu()


def plain(rule, G, mask=None, norm=False):
    return plain_weights(G, mask, [rule], [None], rule.rng, norm)


# the interpreter takes some 10 ms for each round of a solver: the larger problems are for the rules in exact steps
SIZES = [(name, 3) for name in NAMES if name not in ("CAGrad c=0.1", "CAGrad c=1", "FairGrad")]
SIZES += [(name, k) for name in ("PCGrad fixed", "MGDA", "CAGrad", "UPGrad", "DualProj", "IMTLG", "NashMTL") for k in (1, 2, 5)]
SIZES += [(name, k) for name in ("PCGrad fixed", "MGDA", "DualProj") for k in (8, 16)]


@pytest.mark.parametrize(("name", "k"), [(name, k) for name, k in SIZES if RULES[name].residual])
def test_optimality(name, k):
    """The rule's own conditions, for every kind of Gramian at some scale."""
    row = RULES[name]
    scales = (1e-20, 1e-3, 1.0, 1e30)
    cases = [(kind, G * scales[i % 4]) for i, (kind, G) in enumerate(kinds(k))]
    for (kind, G), w in zip(cases, solve(row.make(k), torch.stack([G for _, G in cases])), strict=True):
        assert row.residual(G, w) <= row.tolerance, kind
        if row.nonconflicting:
            size = G.diagonal().sqrt()
            assert ((G @ w) >= -row.tolerance * size * (w.abs() * size).sum() - 1e-300).all(), kind


@pytest.mark.parametrize("name", FORMS)
def test_agrees_with_reference(name):
    """Weights and random stream, call after call, with missing rows, with and without the norm; a problem is the same alone."""
    for k, masked, norm in ((1, 0, True), (4, 0, False), (4, 1, True), (4, 2, False)):
        ours = RULES[name].make(k)
        theirs = copy.deepcopy(ours)
        G = torch.stack([gramian(k, seed=s) for s in range(2)]).unsqueeze(1)
        G[1] *= 1e-300
        mask = (None, torch.tensor([[[True, True, False, True]], [[False, True, True, True]]]), torch.tensor([False, True, True, True]))[
            masked
        ]
        w, expected = solve(ours, G, mask, norm), plain(theirs, G, mask, norm)
        assert w.shape == (2, 1, k)
        torch.testing.assert_close(w, expected, rtol=1e-7, atol=0)
        if ours.rng is not None:
            assert torch.equal(ours.rng, theirs.rng)
            torch.testing.assert_close(solve(ours, G, mask, norm), plain(theirs, G, mask, norm), rtol=1e-7, atol=0)
        elif masked == 1:
            assert torch.equal(solve(ours, G[1, 0], mask[1, 0], norm), w[1, 0])


@pytest.mark.parametrize("name", FORMS)
def test_missing_rows_are_left_out(name):
    """A masked row and an all-zero row both vanish from the problem, whatever they held."""
    k = 5
    G, mask = gramian(k), torch.ones(k, dtype=torch.bool)
    mask[1] = False
    poisoned, zeroed = G.clone(), G.clone()
    poisoned[1], poisoned[:, 1] = torch.nan, torch.inf
    zeroed[1], zeroed[:, 1] = 0, 0
    base = RULES[name].make(k)
    a, b = solve(copy.deepcopy(base), poisoned, mask), solve(copy.deepcopy(base), zeroed)
    assert a[1] == 0 and a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("name", FORMS)
def test_non_finite_and_empty(name):
    """A number that is not finite spoils its own problem; nothing there means weights of zero; no problems, no weights."""
    k = 3
    G = torch.stack([gramian(k) for _ in range(5)])
    G[0, 0, 1] = G[0, 1, 0] = torch.nan
    G[1, 0, 1] = G[1, 1, 0] = torch.inf
    G[2, 2, 2] = torch.nan
    G[3] = 0
    rule = RULES[name].make(k)
    w = solve(rule, G, norm=True)
    assert w[:3].isnan().all() and (w[3] == 0).all() and w[4].isfinite().all()
    w = solve(rule, G[1:3], torch.tensor([True, True, False]))
    assert (w[:, 2] == 0).all() and w[0, :2].isnan().all() and w[1].isfinite().all()
    assert (solve(rule, G[4], torch.zeros(k, dtype=torch.bool)) == 0).all()
    assert solve(rule, G[:0]).shape == (0, k)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of the interpreter
def test_extreme_scales():
    """Down to subnormal numbers, up to where a sum of squares overflows: then there is no number to work with."""
    G = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    scales = [2.0**-1060, 2.0**-1022, 2.0**-511, 2.0**511, 2.0**1021]
    w = solve(resolvers.MGDA(), torch.stack([G * s for s in scales]))
    torch.testing.assert_close(w, solve(resolvers.MGDA(), G).expand(5, 2), rtol=1e-12, atol=0)
    assert solve(resolvers.MGDA(), G * 2.0**1022).isnan().all()


@pytest.mark.parametrize(
    ("name", "tolerance", "step"), [("MGDA", 1e-12, 1), ("DualProj", 1e-12, 1), ("CAGrad", 1e-8, 4), ("UPGrad", 1e-8, 4)]
)
def test_hard_gramians(name, tolerance, step):
    """Dependence at every distance that float64 can and cannot resolve, and ties; then random signs and scales."""
    J = [J for _, J in hard(4)][::step] + list(randn(40 // step, 4, 3) * (3 * randn(40 // step, 4, 1, seed=1)).exp())
    G = torch.stack([j @ j.mT for j in J])
    for i, w in enumerate(solve(RULES[name].make(4), G)):
        assert RULES[name].residual(G[i], w) <= tolerance, i


def test_nearly_opposite_gradients():
    """Projections stay as long as what they project and harm no row, where the pivot of a row is rounding."""
    J = nearly_opposite(4, 9, 400)[[46, 144, 145]]
    w = solve(resolvers.UPGrad(), J @ J.mT)
    d, size = (w.unsqueeze(1) @ J).squeeze(1), J.norm(dim=-1)
    assert (d.norm(dim=-1) <= size.mean(-1)).all()
    assert ((J @ d.unsqueeze(-1)).squeeze(-1) / size).min() >= -1e-6 * size.mean()


def test_rounded_gramian():
    """A rank-deficient Gramian rounded to float32 is no longer positive semidefinite: the weights stay tame, the direction useful."""
    for rule, k in ((resolvers.UPGrad(), 4), (resolvers.DualProj(), 12), (resolvers.MGDA(), 12), (resolvers.CAGrad(), 4)):
        J = torch.randn(k, k // 2, dtype=torch.float64)
        G = J @ J.mT
        size = G.diagonal().sqrt()
        w = solve(rule, G.float().double(), precision=SINGLE)
        assert w.isfinite().all() and w.abs().max() <= 1e4
        if not isinstance(rule, resolvers.CAGrad):
            assert ((G @ w) >= -1e-6 * size * (w * size).sum()).all()
    J = torch.randn(4, 2, dtype=torch.float64)
    G = (J @ J.mT).float().double()
    for rule in (resolvers.IMTLG(), resolvers.ConFIG(), resolvers.AlignedMTL()):
        expected = plain_weights(G, None, [rule], [None], None, False, SINGLE)
        torch.testing.assert_close(solve(rule, G, precision=SINGLE), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FORMS if type(RULES[name].make(2)).lifts or name.startswith(("PCGrad", "IMTLG"))])
def test_conditions_hold_for_the_gradients(name):
    """Of a Gramian rounded to float32: every condition and bound that the rule's row has, for the gradients that were rounded, whatever their kind."""
    J, rule = torch.stack([gradients(kind, 3, 2, torch.float32) for kind in KINDS]), RULES[name].make(3)
    w = solve(copy.deepcopy(rule), (J @ J.mT).double(), precision=SINGLE)
    J = J.double()
    truth = plain_weights(J @ J.mT, None, [rule], [None], rule.rng, False)
    for what, violation in conditions(name, rule, J, w, truth):
        worst = int(violation.argmax())
        assert violation[worst] <= 4, (what, float(violation[worst]), KINDS[worst])


def test_weights_do_not_follow_rounding():
    """Zero in the hull, as far as a float32 Gramian tells: no direction is made of what is left; CAGrad stays within its ball."""
    for values, rule in ((CAGRAD_ONE, resolvers.CAGrad(1.0)), (UPGRAD, resolvers.UPGrad())):
        J = torch.tensor(values)
        w = solve(rule, (J @ J.mT).double(), precision=SINGLE)
        assert (w @ J.double()).norm() < 1e-5
    J = torch.tensor(CAGRAD_TWO)
    d, mean = solve(resolvers.CAGrad(0.2), (J @ J.mT).double(), precision=SINGLE) @ J.double(), J.double().mean(0)
    assert (J.double() @ d / J.norm(dim=1)).min() > -1e-5 and (d - mean).norm() <= 0.2 * mean.norm() * (1 + 1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_fairgrad_of_high_powers(alpha):
    """Where no solution exists the direction vanishes; where one does, it is the solution."""
    J = torch.tensor([[0, 1], [-0.25, -0.25], [-1, 0.5], [0.25, -0.25]], dtype=torch.float64)
    assert (solve(resolvers.FairGrad(alpha), J @ J.mT) @ J).norm() < 1e-8
    J = torch.randn(4, 3, 2, dtype=torch.float64)
    J = torch.cat([J, J.abs()])
    for x, w in zip(J, solve(resolvers.FairGrad(alpha), J @ J.mT), strict=True):
        if residuals._hull_misses_zero(x @ x.T) < 1e-9:
            assert (w @ x).norm() < 1e-3
        else:
            assert residuals.fair_residual(alpha)(x @ x.T, w) < 1e-6


def test_copies_share_equally():
    G = torch.full((5, 5), 7.0, dtype=torch.float64)
    even = torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(solve(resolvers.MGDA(), G), even, rtol=1e-12, atol=0)
    torch.testing.assert_close(solve(resolvers.CAGrad(0.5), G), 1.5 * even, rtol=1e-9, atol=0)


def test_hyper_parameters():
    """Those that the table of rules leaves at their defaults, not representable in single precision."""
    G, mask = gramian(4), torch.tensor([True, True, False, True])
    pref = [0.1, 0.2, 0.3, 0.4]
    for rule in (
        resolvers.Constant([0.1, -0.7, 1e-9, 3.3]),
        resolvers.UPGrad(pref),
        resolvers.DualProj(pref),
        resolvers.AlignedMTL(pref=pref),
        *(resolvers.ConFIG(pref, length) for length in ("projection", "min", "max", "harmonic", "arithmetic", "geometric", 1)),
        resolvers.CAGrad(0.1, 1),
        resolvers.CAGrad(0.0),
        resolvers.NashMTL(0.7),
        resolvers.FairGrad(0.0),
        resolvers.FairGrad(0.7),
        resolvers.PCGrad("mean", "fixed"),
    ):
        torch.testing.assert_close(solve(rule, G, mask), plain(rule, G, mask), rtol=1e-9, atol=1e-12)


def test_what_has_no_kernel():
    """More rows than a tile holds, chains, rules with state, a user's own form of a rule: nothing was done, no stream moved."""

    class Own(resolvers.PCGrad):
        def rows(self, p):
            return super().rows(p)

    for k, rule in ((65, resolvers.PCGrad()), (3, resolvers.GradVac()), (3, resolvers.PCD()), (3, Own())):
        before = None if rule.rng is None else rule.rng.clone()
        states = states_of([rule], (), k, torch.device("cpu"))
        assert solvers.solve(gramian(k), None, [rule], states, rule.rng, False, EPS) is None
        assert before is None or torch.equal(rule.rng, before)
    assert solvers.solve(gramian(3), None, [resolvers.Sum(), resolvers.Sum()], [None, None], None, False, EPS) is None
