"""Promises hold for the gradients that were given, in float32 and 16 bits, also where their Gramian is all rounding: many rows, low ranks, zero in the hull."""

import copy

import pytest
import residuals
import torch
from precision_conditions import conditions
from precision_problems import KINDS, SIZES, gradients
from rule_table import RULES

import mmfast as mf
from mmfast import ops
from mmfast.ops.heads import heads

BACKENDS = ["auto", "cpu", "reference"]

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


def ways(J, rule, backend, preserve_norm=False):
    """The resolved gradient of rows J [k, n] in every way of calling: as a batch, as samples (twice), as batch sums, through a block, as linear branches."""
    grads, k = list(J), len(J)

    def resolve(grads, per="batch"):
        return mf.resolve(grads, copy.deepcopy(rule), per, backend=backend, preserve_norm=preserve_norm)

    yield "batch", resolve(grads)
    yield from (("sample", d) for d in resolve([torch.stack([g, g]) for g in grads], "sample"))
    yield "batch_sum", resolve([torch.stack([g / 2, g / 2]) for g in grads], "batch_sum").sum(0)
    ones = torch.ones(1, k, dtype=J.dtype)
    yield "heads", heads(ones, J, torch.arange(k), copy.deepcopy(rule), k, "batch", None, preserve_norm, backend)[0][0]
    yield "heads per sample", heads(ones, J, torch.arange(k), copy.deepcopy(rule), k, "sample", None, preserve_norm, backend)[0][0]
    if backend == "auto":
        y = torch.zeros(J.shape[1], dtype=J.dtype, requires_grad=True)
        sum(
            (branch * g).sum() for branch, g in zip(mf.fork(y, k, copy.deepcopy(rule), preserve_norm=preserve_norm), J, strict=True)
        ).backward()
        yield "fork", y.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_do_not_follow_rounding(backend):
    for way, d in ways(torch.tensor(CAGRAD_ONE), mf.CAGrad(1.0), backend):
        assert d.norm() < 1e-5, way
    for way, d in ways(torch.tensor(UPGRAD), mf.UPGrad(), backend):
        assert d.norm() < 1e-5, way
    J = torch.tensor(CAGRAD_TWO)
    mean = J.mean(0)
    for way, d in ways(J, mf.CAGrad(0.2), backend):
        # three of the rows lie on a line: nothing helps them all, and what harms none lies across it, as long as the ball allows
        assert (J @ d / J.norm(dim=1)).min() > -1e-4, way
        assert (d - mean).norm() <= 0.2 * mean.norm() * (1 + 1e-5), way


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.15, 0.2, 0.3, 0.45])
def test_fairgrad_of_high_powers(alpha, backend):
    """Where no solution exists the direction vanishes; where one does, it is the solution."""
    J = torch.tensor([[0, 1], [-0.25, -0.25], [-1, 0.5], [0.25, -0.25]], dtype=torch.float64)
    assert mf.resolve(list(J), mf.FairGrad(alpha), backend=backend).norm() < 1e-6
    torch.manual_seed(0)
    J = torch.randn(100, 5, 2, dtype=torch.float64)
    G = J @ J.mT
    w = mf.weights(G, mf.FairGrad(alpha), backend=backend)
    d = (w.unsqueeze(1) @ J).squeeze(1)
    for i in range(100):
        assert residuals.fair_residual(alpha)(G[i], w[i]) < 1e-4, i
        if residuals._hull_misses_zero(G[i]) < 1e-9 and alpha >= 0.15:  # below, the barrier is reached before the direction vanishes
            assert d[i].norm() < 1e-3, i


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bargain_is_never_longer_than_it_can_be(backend):
    torch.manual_seed(0)
    problems = torch.randn(40, 5, 2)
    for J in problems:
        for way, d in ways(J, mf.NashMTL(), backend):
            assert d.norm() <= 5**0.5 * (1 + 1e-5), way
    stationary = [J for J in problems if residuals._hull_misses_zero((J @ J.mT).double()) < 1e-6]
    assert len(stationary) > 3
    for J in stationary:
        assert mf.resolve(list(J), mf.FairGrad(2.0), backend=backend).norm() <= 5**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(RULES))
def test_conditions_hold_for_the_gradients(name, dtype):
    """Every optimality condition and bound of every rule, to what the precision of the Gramian allows."""
    names = [(kind, seed) for kind in KINDS for seed in range(2)]
    for k, n in SIZES:
        if k < RULES[name].min_k:
            continue
        J = torch.stack([gradients(kind, k, n, dtype, seed) for kind, seed in names])
        grads, rule = list(J.unbind(1)), RULES[name].make(k)
        _, truth = ops.resolve_info([g.double() for g in grads], copy.deepcopy(rule), "sample")
        for backend in ("auto", "reference")[: 2 if k <= 8 and dtype == torch.float32 else 1]:
            out, info = ops.resolve_info(grads, copy.deepcopy(rule), "sample", backend=backend)
            assert info.isfinite().all(), (k, n, backend)
            held = (truth[:, :k].abs() * J.double().norm(dim=-1)).sum(-1) < torch.finfo(dtype).max
            assert out[held].isfinite().all() and held.any(), (k, n, backend)
            yielded = 0
            for what, violation in conditions(name, rule, J.double(), info[:, :k], truth[:, :k]):
                yielded += 1
                worst = int(violation.argmax())
                assert violation[worst] <= 4, (what, float(violation[worst]), names[worst], k, n, backend)
            assert yielded


def _length_is_kept(J, rule, backend, tolerance=1e-5):
    wanted = J.double().sum(0).norm()
    for way, d in ways(J, rule, backend, preserve_norm=True):
        # branches' lengths come from their two Gramians: what cancels in these is rounding of float64
        slack = 1e-15 / wanted if way.startswith("heads") else 0
        assert abs(d.double().norm() - wanted) <= tolerance * wanted + slack, (way, d, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_norm_is_that_of_the_plain_sum_where_it_cancels(dtype, backend):
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
    for t in (1e-2, 1e-3, 1e-4, 1e-6, 1e-7):
        tiny = dtype == torch.float16 and t < 1e-4  # below its normal numbers
        for J in ([[1, 0], [-1, t]], [[1, 0, 0], [-0.5, t, 0], [-0.5, 0, t]], [[0, 7, 0, 0], [t, -7, t, 0]]):
            _length_is_kept(torch.tensor(J, dtype=dtype), mf.Sum(), backend, 0.1 if tiny else tolerance)


@pytest.mark.parametrize("name", [name for name, row in RULES.items() if row.min_k <= 2])
def test_every_rule_keeps_the_norm_of_a_pair_that_nearly_cancels(name):
    """As long as the rule says anything: those that find a rank, and Compose of a row of which nothing is left, have no direction below the precision."""
    for backend in BACKENDS:
        for t in (1e-2, 1e-3, 1e-4, 1e-6):
            rule, J = RULES[name].make(2), torch.tensor([[1, 0], [-1, t]])
            if t == 1e-2 or not name.startswith(("IMTLG", "ConFIG", "AlignedMTL", "Compose")):
                _length_is_kept(J, rule, backend, 1e-3 if t < 1e-3 else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", [mf.CAGrad(1.0), mf.UPGrad(), mf.DualProj(), mf.MGDA(), mf.NashMTL(), mf.FairGrad(2.0)], ids=str)
def test_rounding_is_not_given_the_norm_of_the_plain_sum(rule, backend):
    """No direction helps all: what is left is rounding and lift, and stays little beside the plain sum, which is long."""
    for rows in (CAGRAD_ONE, UPGRAD):
        J = torch.tensor(rows)
        for (way, raw), (_, kept) in zip(ways(J, rule, backend), ways(J, rule, backend, preserve_norm=True), strict=True):
            assert kept.norm() <= max(17 * raw.norm(), 0.05 * J.sum(0).norm()), (way, raw, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_decides_what_cancels(backend):
    """With a third gradient the plain sum is long; without it, in the samples where it is masked out, it nearly vanishes."""
    rows = torch.tensor([[1, 0], [-1, 1e-4], [3.0, 4.0]])
    grads = [torch.stack([g, g, g]) for g in rows]
    mask = torch.tensor([[True, True, False], [True, True, True], [False, True, False]])
    d = mf.resolve(grads, mf.Sum(), "sample", mask, preserve_norm=True, backend=backend)
    torch.testing.assert_close(d, torch.stack([rows[0] + rows[1], rows.sum(0), rows[1]]), rtol=1e-5, atol=1e-8)
    for per in ("batch", "batch_sum"):
        d = mf.resolve(grads, mf.UPGrad(), per, torch.tensor([True, True, False]), preserve_norm=True, backend=backend)
        wanted = torch.stack(grads[:2]).sum(0)
        wanted = wanted if per == "batch" else wanted.sum(0)
        assert abs((d if per == "batch" else d.sum(0)).norm() - wanted.norm()) < 1e-4 * wanted.norm()


@pytest.mark.parametrize("rule", [mf.Sum(), mf.Mean(), mf.CAGrad(0.5)])
def test_descent_on_two_quadratics_gets_as_far_as_plain_descent(rule):
    """|x - a|^2 + |x - b|^2 has its minimum between a and b, where the gradients cancel."""
    a, b = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([-1.0, 0.0, 0.25])

    def distance(resolver):
        x = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
        for _ in range(200):
            xa, xb = mf.fork(x, 2, copy.deepcopy(resolver)) if resolver else (x, x)
            ((xa - a).square().sum() + (xb - b).square().sum()).backward()
            with torch.no_grad():
                x -= 0.1 * x.grad
            x.grad = None
        return _from_segment(x.detach(), a, b) if isinstance(rule, mf.CAGrad) else (x - (a + b) / 2).norm()

    assert distance(rule) <= distance(None) + 2e-7


def _from_segment(x, a, b):
    """Distance from the Pareto-stationary points, all between a and b."""
    return (x - a - ((x - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1) * (b - a)).norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-145, 1e-120, 1e-30, 1.0, 1e30, 1e120, 1e140])
def test_the_norm_of_weights_whose_squares_no_number_holds(scale, backend):
    J = torch.tensor([[1, 0.2], [-0.5, 1]], dtype=torch.float64) * scale
    for rule in (mf.FairGrad(2.0), mf.FairGrad(10.0), mf.NashMTL(), mf.UPGrad()):
        for way, d in ways(J, rule, backend, preserve_norm=True):
            torch.testing.assert_close(
                (d / scale).norm(), (J.sum(0) / scale).norm(), rtol=1e-9, atol=0, msg=lambda text, way=way: f"{way}: {text}"
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_solution_that_is_nothing_is_no_length(backend):
    """Rows of which the changed Gramian leaves none: what that says of the noise follows the gradients' scale."""
    for t in torch.linspace(1.5e-3, 3e-3, 200):
        kept = []
        for scale in (1.0, 2.0**20):
            grads = [None, scale * torch.tensor([1.0, 0.0]), None, scale * torch.tensor([-0.5, float(t) / 2])]
            rule = mf.Compose(mf.PCGrad(order="fixed"), mf.Sum())
            kept.append(mf.resolve(grads, rule, preserve_norm=True, backend=backend) / scale)
        torch.testing.assert_close(*kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("c", [0.5, 1.0, 1.5, 2.0])
def test_cagrad_stays_in_its_ball(c, backend):
    """Zero in the hull of more rows than dimensions: a row that depends on others has no weight of its own."""
    for k, n in ((3, 2), (5, 3), (6, 4), (8, 6)):
        J = torch.stack([torch.randn(k, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in range(400)])
        w = mf.weights(J @ J.mT, mf.CAGrad(c), backend=backend)
        mean = J.mean(1)
        assert ((w.unsqueeze(1) @ J).squeeze(1) - mean).norm(dim=1).sub(c * mean.norm(dim=1)).div(J.norm(dim=-1).mean(1)).max() < 1e-6
        assert w.abs().max() < 1e9  # what rounding makes of weights is far below the ball's tolerance
