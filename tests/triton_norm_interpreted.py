"""The norm of the plain sum in Triton where the gradients cancel and their Gramian loses it: against the compiled CPU and plain torch, by Triton's interpreter."""

import copy

import pytest
import torch
from interpreter import poison, quiet  # noqa: F401
from rule_table import RULES
from test_precision import UPGRAD
from triton_solve_interpreted import FORMS, NAMES

import mmfast as mf
from mmfast import contract, ops
from mmfast.backends import reference
from mmfast.backends.triton import lengths, rows, solve
from mmfast.backends.triton import ops as triton
from mmfast.ops.heads import heads
from mmfast.resolvers.solve import norm_of

assert rows.INTERPRETED, "TRITON_INTERPRET must be 1"

P = torch.finfo(torch.float32).eps
LEFT = [1e-2, 3e-4, 1e-7, 0.0]  # of two opposite rows
# far below the distance at which a wrong way of keeping the norm shows; 16-bit types round the result
CLOSE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5, torch.float64: 1e-9}


def cancelling(left, dtype):
    """The rows [1, 0] and [-1, t] for each t, [2] of [len(left), 2]."""
    t = torch.tensor(left, dtype=torch.float64)
    return [torch.stack([x, y], -1).to(dtype) for x, y in ((torch.ones_like(t), 0 * t), (-torch.ones_like(t), t))]


def resolved(grads, rule, per="batch", mask=None, *backends):
    return [
        ops.resolve_info(grads, copy.deepcopy(rule), per, mask, preserve_norm=True, backend=name) for name in backends or ("triton", "cpu")
    ]


def plain_sum(grads, per, mask):
    shown = [g if mask is None else torch.where(mask.expand(len(g), len(grads))[:, i : i + 1], g, 0) for i, g in enumerate(grads)]
    total = sum(g.double() for g in shown)
    return total.sum(0) if per == "batch_sum" else total


def assert_alike(grads, rule, per="batch", mask=None):
    """As the compiled CPU has it, relative to the result's length, but for the rounding of weights."""
    (out, info), (expected, expected_info) = resolved(grads, rule, per, mask)
    k, dtype = len(grads), out.dtype
    out, expected = out.double(), expected.double()
    size = expected.norm(dim=-1, keepdim=True) if per == "sample" else expected.norm()
    limit = CLOSE[dtype] * size + torch.finfo(dtype).eps * expected_info[..., :k].abs().amax(-1, keepdim=True) * (dtype == torch.float32)
    assert ((out - expected).abs() <= limit).all(), (out, expected)
    torch.testing.assert_close(info[..., :k], expected_info[..., :k], rtol=CLOSE[dtype], atol=1e-30)


@pytest.mark.parametrize("name", [name for name in FORMS if RULES[name].min_k <= 2] + ["FairGrad(0.1)"])
def test_two_rows_that_cancel(name):
    """Every rule, sample by sample, down to rows of which nothing is left."""
    grads = cancelling(LEFT, torch.float32)
    rule = mf.FairGrad(0.1) if name == "FairGrad(0.1)" else RULES[name].make(2)
    assert_alike(grads, rule, "sample")
    out = resolved(grads, rule, "sample", None, "triton")[0][0]
    ratio = out.double().norm(dim=1) / plain_sum(grads, "sample", None).norm(dim=1)
    if name in (
        "Sum",
        "Mean",
        "PCGrad",
        "MGDA",
        "UPGrad",
        "DualProj",
        "NashMTL",
    ):  # those that have a direction wherever the sum is not zero
        assert (ratio[:2] - 1).abs().max() < 1e-4, ratio
    assert (ratio[:3] < 1 + 1e-4).all() and (out[3].abs() == 0).all(), ratio


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(mf.UPGrad(), torch.bfloat16), (mf.Mean(), torch.float16), (mf.PCGrad(order="fixed"), torch.float32), (mf.DualProj(), torch.float64)],
)
def test_granularities_masks_and_dtypes(rule, dtype):
    """What a mask hides holds no number; a third row, that is not hidden everywhere, ends the cancelling."""
    grads = [x * torch.tensor([[0.25], [0.75]]).to(dtype) for x in cancelling([1e-3, 1e-5], dtype)]
    grads.append(torch.full_like(grads[0], torch.nan))
    one = torch.tensor([True, True, False])
    for per in ("batch", "batch_sum", "sample"):
        assert_alike(grads, rule, per, one)
        assert_alike(grads[:2], rule, per)
    assert_alike(grads, rule, "batch", one.expand(2, 3))
    grads[2][1] = torch.tensor([0.5, -1]).to(dtype)
    assert_alike(grads, rule, "sample", torch.tensor([[True, True, False], [True, False, True]]))
    assert_alike(grads, rule, "batch", torch.tensor([[True, True, False], [True, True, True]]))
    (out, _), (holes, _) = (resolved(g, rule, "batch", None, "triton")[0] for g in (grads[:2], [None, *grads[:2], None]))
    assert torch.equal(out, holes) and out.isfinite().all()


def test_directions_that_rounding_made_stay_short():
    """Zero lies in the hull: what is left of the direction, some 1e-6, is not blown up to the length of the plain sum, more than 3."""
    grads = list(torch.tensor(UPGRAD))
    for out, _ in resolved(grads, mf.UPGrad()):
        assert 0 < out.norm() < 1e-2 < sum(grads).norm()


def test_rules_without_a_kernel():
    """Chains, states, and a user's own resolver take the same way."""

    class Lengths(mf.Resolver):
        def forward(self, G, mask=None):
            return torch.where(mask, G.diagonal(dim1=-2, dim2=-1).sqrt(), 0)

    grads = cancelling(LEFT[:2], torch.float32)
    for rule in (mf.GradVac(), mf.Compose(mf.NSGD(), mf.PCGrad(order="fixed")), Lengths()):
        for per in ("sample", "batch_sum"):
            (out, _), (expected, _) = resolved(grads, rule, per, None, "triton", "reference")
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-9)


def test_heads():
    """delta_i W_i that cancel, per batch and per sample."""
    delta, weight = torch.tensor([[1.0, -1.0], [0.5, -0.5]]), torch.tensor([[1.0, 0.0, 0.5], [1.0, 2e-4, 0.5]])
    for rule in (mf.UPGrad(), mf.Mean(), mf.GradVac()):
        for per in ("batch", "sample", "batch_sum"):
            made = [
                heads(delta, weight, torch.tensor([0, 1]), copy.deepcopy(rule), 2, per, None, preserve_norm=True, backend=b)
                for b in ("triton", "reference")
            ]
            torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-9)
            plain, out = delta @ weight, made[0][0]
            wanted, have = (x.sum(0) if per == "batch_sum" else x for x in (plain.double(), out.double()))
            torch.testing.assert_close(have.norm(dim=-1), wanted.norm(dim=-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [3, 17])
@pytest.mark.parametrize("per", list(contract.PER))
def test_lengths(per, k, monkeypatch):
    """Against plain torch in double precision: tiles, slots of several tiles, masks, rows that are not there."""
    monkeypatch.setattr(lengths, "SLOTS", 2)
    for dtype, shape in ((torch.float32, (3, 700)), (torch.bfloat16, (2, 30)), (torch.float64, (1, 1030)))[: 3 if k == 3 else 1]:
        grads = [torch.randn(shape).to(dtype) for _ in range(k)]
        for mask in (None, torch.arange(k + 1) % 3 != 1, torch.rand(shape[0], k + 1) < 0.7):
            w = torch.randn((shape[0], k + 1) if per == "sample" else k + 1, dtype=torch.float64)
            found = triton.lengths(grads, [1], mask, w, per)
            expected = reference.lengths([g.double() for g in grads], [1], mask, w, per)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 17])
def test_what_the_gramian_says_of_the_norm(k):
    """Factor, whether it is settled, and noise, at scales that a square root must not lose."""
    J = torch.randn(4, k, 3, dtype=torch.float64)
    J[1:, -1] = -J[1:, :-1].sum(1) + torch.tensor([[1e-1], [1e-2], [1e-4]]) * torch.randn(3, 3, dtype=torch.float64)
    G = (J @ J.mT).float().double() * torch.tensor([1e-200, 1.0, 1e30, 3.0], dtype=torch.float64).view(-1, 1, 1)
    w = 1 + 1e-3 * torch.randn(2, 4, k, dtype=torch.float64)
    held = rows.rows_of([torch.zeros(4, 3) for _ in range(k)])
    norms = lengths.measure_by_gramian(held, None, G, w, contract.PER["sample"], P).norms
    expected = norm_of(G, None, w[0], w[1], P)
    torch.testing.assert_close(norms[:, 0], expected.factor, rtol=1e-6, atol=1e-6)
    assert torch.equal(norms[:, 1] != 0, expected.settled) and (k == 1 or not expected.settled[3])
    torch.testing.assert_close(norms[:, 2], expected.noise, rtol=1e-6, atol=0)


def test_random_rules_draw_alike_for_the_changed_gramian():
    """The stream moves on by one call; the second half of the programs draws as the first."""
    rule = mf.PCGrad()
    G = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]], dtype=torch.float64).expand(4, 3, 3).contiguous()
    both = solve.solve_twice(G, None, [rule], [None], rule.rng, 1e-9)
    assert rule.rng[1] == 1 and not torch.equal(both[0, 0], both[0, 1])
    torch.testing.assert_close(both[1], both[0], rtol=1e-6, atol=1e-6)
    assert solve.solve_twice(G, None, [mf.Mean()], [None], None, 1e-9).shape == (1, 4, 3)


def test_every_rule_is_tried():
    assert {type(RULES[name].make(RULES[name].min_k)) for name in NAMES} == {type(RULES[name].make(RULES[name].min_k)) for name in FORMS}
