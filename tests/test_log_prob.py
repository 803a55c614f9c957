"""The compiled likelihoods against plain torch: values, derivatives, masks, layouts, and what torch makes of the operator."""

import copy
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mmfast.backends import direct, library
from mmfast.models.likelihoods import Bernoulli, Categorical, Exponential, Gamma, Joint, LogNormal, Normal, Ordinal, Poisson
from mmfast.ops import log_prob as ops

pytestmark = pytest.mark.skipif(not library.available, reason=str(library.missing_reason))
OP, BACKWARD = (
    (getattr(torch.ops.mmfast, name).default for name in ("log_prob", "log_prob_backward")) if library.available else (None, None)
)
ALL = [
    Poisson(),
    Normal(),
    Categorical(5),
    Bernoulli(),
    LogNormal(),
    Ordinal(4),
    Gamma(),
    Exponential(),
    Categorical(2),
    Ordinal(2),
    Normal(),
]
KINDS = {
    "normal": Normal(),
    "log-normal": LogNormal(),
    "gamma": Gamma(),
    "exponential": Exponential(),
    "bernoulli": Bernoulli(),
    "categorical": Categorical(5),
    "ordinal": Ordinal(5),
    "ordinal of 2": Ordinal(2),
    "poisson": Poisson(),
}


def values(likelihood, shape):
    """x that the likelihood can have."""
    if isinstance(likelihood, Categorical | Ordinal):
        return torch.randint(likelihood.classes, shape).float()
    if isinstance(likelihood, Bernoulli):
        return torch.randint(2, shape).float()
    if isinstance(likelihood, Poisson):
        return torch.randint(40, shape).float()
    return torch.randn(shape) if isinstance(likelihood, Normal) else torch.randn(shape).exp()


def problem(likelihoods=ALL, rows=37, samples=(), dtype=torch.float32, scale=1.0):
    """(joint, raw, x, seen)"""
    joint = Joint(likelihoods, torch.rand(len(likelihoods)) + 0.5).to(dtype)
    raw = (scale * torch.randn(*samples, rows, sum(joint.sizes))).to(dtype).requires_grad_()
    x = torch.stack([values(part, (rows,)) for part in likelihoods], -1).to(dtype)
    return joint, raw, x, torch.rand(rows, len(likelihoods)) > 0.3


def both(joint, function, raw, x, seen):
    """(values, derivatives)"""
    out = function(raw, x, seen)
    direction = torch.linspace(0.5, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, raw, direction)[0]


def error(found, exact):
    """The largest, by the size of each number or of 1."""
    return ((found.double() - exact).abs() / exact.abs().clamp_min(1)).max().item()


@pytest.mark.parametrize("scale", [1.0, 12.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_no_less_exact_than_torch(kind, dtype, scale):
    """Against float64, and float64 against the sum of its rounding; 4 units of it are given, for a result of nothing but rounding."""
    torch.manual_seed(1)
    joint, raw, x, _ = problem([KINDS[kind]] * 3, 400, dtype=dtype, scale=scale)
    exact = both(
        copy.deepcopy(joint).double(), copy.deepcopy(joint).double().in_torch, raw.detach().double().requires_grad_(), x.double(), None
    )
    ours, torchs = (both(joint, function, raw, x, None) for function in (joint.log_prob, joint.in_torch))
    for mine, other, right in zip(ours, torchs, exact, strict=True):
        assert mine.dtype == dtype and torch.isfinite(mine).all()
        allowed = 2 * error(other, right) if dtype == torch.float32 else 1e-12 if scale < 100 else 1e-10
        assert error(mine, right) <= allowed + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "kind, raws", [("poisson", [-13.9, -13.815510, -13.8, 46.0, 46.051, 46.1]), ("normal", [-800.0, -40.0, 19.9, 20.1, 800.0])]
)
def test_derivatives_at_the_clamps(kind, raws):
    """Where torch's are zero or one exactly, at the ends of what a Poisson rate may be and above softplus's 20, they are here too."""
    joint = Joint([KINDS[kind]])
    last = torch.tensor(raws)
    raw = last[:, None].expand(-1, joint.sizes[0]).clone().requires_grad_()
    x = torch.ones(len(raws), 1)
    (_, mine), (_, theirs) = (both(joint, function, raw, x, None) for function in (joint.log_prob, joint.in_torch))
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)
    assert ((mine == 0) == (theirs == 0)).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("samples", [(), (3,), (2, 2)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 64, 1000])
def test_rows_and_samples(rows, samples, threads):
    """Any number of rows, x once for all samples; cells that are not seen may hold anything."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        joint, raw, x, seen = problem(rows=rows, samples=samples)
        hidden = torch.where(seen, x, torch.nan)
        for cells in (None, seen, seen.float()):
            wanted = both(joint, joint.in_torch, raw, x, cells)
            for mine, right in zip(both(joint, joint.log_prob, raw, x if cells is None else hidden, cells), wanted, strict=True):
                torch.testing.assert_close(mine, right, rtol=2e-4, atol=2e-5)
            if cells is not None and rows:
                assert (both(joint, joint.log_prob, raw, hidden, cells)[0][..., ~seen] == 0).all()
    finally:
        torch.set_num_threads(before)


def test_layouts_and_both_ways_of_calling(monkeypatch):
    """Views, the same number of samples in x, and the operator that torch's dispatcher finds in place of the direct call."""
    joint, raw, x, seen = problem(samples=(3,))
    wanted = joint.log_prob(raw, x, seen)
    strided = torch.stack([raw.detach(), raw.detach()], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(joint.log_prob(strided, x.T.contiguous().T, seen), wanted)
    assert torch.equal(joint.log_prob(raw, x.expand(3, -1, -1), seen.expand(3, -1, -1)), wanted)
    direct_gradient = torch.autograd.grad(wanted.sum(), raw)[0]
    monkeypatch.setattr(direct, "_direct", None)
    again = joint.log_prob(raw, x, seen)
    assert torch.equal(again, wanted) and torch.equal(torch.autograd.grad(again.sum(), raw)[0], direct_gradient)
    with torch.no_grad():
        assert torch.equal(joint.log_prob(raw, x, seen), wanted)


@pytest.mark.parametrize("way", ["direct", "operator"])
def test_gradients_of_every_layout(way, monkeypatch):
    """Of a sum, of a mean over samples, of a view: one number for a row or a feature, rows apart, any order."""
    if way == "operator":
        monkeypatch.setattr(direct, "_direct", None)
    joint, raw, x, _ = problem(samples=(3,), rows=5)
    k = len(ALL)
    _, slopes = ops.log_prob(raw.detach(), x, None, joint._kinds, joint.w, True)
    numbers = torch.randn(3 * 5 * k * 4)
    layouts = [
        numbers[:1].expand(3, 5, k),
        numbers[:15].view(3, 5, 1).expand(3, 5, k),
        numbers[:k].expand(3, 5, k),
        numbers[:5].view(5, 1).expand(3, 5, k),
    ]
    layouts += [
        numbers[: 15 * k * 2].view(3, 5, k, 2)[..., 1],
        numbers[: 15 * k].view(k, 5, 3).permute(2, 1, 0),
        numbers[: 3 * k].view(3, 1, k).expand(3, 5, k),
    ]
    layouts += [numbers[: 30 * k].view(3, 10, k)[:, ::2]]
    for grad in layouts:
        wanted = slopes * grad.repeat_interleave(torch.tensor(joint.sizes), -1)
        assert torch.equal(ops.log_prob_backward(grad, slopes, joint._kinds), wanted)


def test_what_the_operator_does_not_take():
    """Other dtypes, a derivative by x or by the scales, likelihoods of the user: plain torch, as ever."""
    joint, raw, x, _ = problem()
    assert joint.log_prob(raw.half(), x).dtype == torch.float32
    assert joint.log_prob(raw, x.double()).dtype == torch.float64
    x.requires_grad_()
    assert torch.autograd.grad(joint.log_prob(raw, x).sum(), x)[0].abs().sum() > 0

    class Half(Normal):
        def log_prob(self, raw, x, w=1.0):
            return 0.5 * super().log_prob(raw, x, w)

    mine, raw = Joint([Half()]), torch.randn(4, 2)
    torch.testing.assert_close(mine.log_prob(raw, torch.ones(4, 1)), 0.5 * Joint([Normal()]).log_prob(raw, torch.ones(4, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_no_numbers(kind, dtype):
    """NaN and infinity come out as from torch, on their rows alone (make sanitize: no sum of their bits overflows)."""
    torch.manual_seed(2)
    joint, raw, x, _ = problem([KINDS[kind]], rows=41, dtype=dtype)
    with torch.no_grad():
        raw[3] = torch.nan
        raw[7] = -torch.nan
        raw[11] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    found = joint.log_prob(raw, x)
    torch.testing.assert_close(found, joint.in_torch(raw, x), equal_nan=True)
    assert found.isnan().sum() == 3


# values that no feature of the kind has, and the nearest that one has
OUTSIDE = {
    "log-normal": [(-1e-30, 0.0), (-torch.inf, 1e30)],
    "gamma": [(-0.5, 0.0)],
    "exponential": [(-1e-3, 0.0)],
    "bernoulli": [(-1e-6, 0.0), (1.0001, 1.0), (2.0, 0.5), (-torch.inf, 1.0)],
    "categorical": [(5.0, 4.0), (-1.0, 0.0), (torch.nan, 0.0), (torch.inf, 4.9)],
    "ordinal": [(5.0, 4.0), (torch.nan, 0.0)],
    "poisson": [(-1.0, 0.0), (0.5, 0.0), (-3.25, 3.0), (2.0**20 + 0.5, 2.0**23 + 1), (-torch.inf, 1e30)],
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore::DeprecationWarning:torch")  # torch.compile does that itself
@pytest.mark.parametrize("way", ["direct", "operator", "compiled", "torch"])
@pytest.mark.parametrize("kind, value, near", [(kind, *pair) for kind, pairs in OUTSIDE.items() for pair in pairs])
def test_a_value_that_the_likelihood_does_not_take(kind, value, near, way, monkeypatch):
    """Refused where compiled code looks, with its derivatives NaN where plain torch computes: its formula would go on with it."""
    joint, raw, x, _ = problem([Normal(), KINDS[kind], Normal()], dtype=torch.float64)
    x[5, 1] = value
    seen = torch.ones_like(x)
    seen[5, 1] = 0
    if way == "operator":
        monkeypatch.setattr(direct, "_direct", None)
    function = joint.in_torch if way == "torch" else joint.log_prob
    if way == "compiled":
        torch.compiler.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert function(raw, x, seen).isfinite().all()
    if way == "torch" and kind not in ("categorical", "ordinal"):
        out = function(raw, x)
        slopes = torch.autograd.grad(out.sum(), raw)[0]
        first, last = 2, 2 + joint.sizes[1]
        assert out[5, 1].isnan() and slopes[5, first:last].isnan().all()
        assert out.isnan().sum() == 1 and slopes.isnan().sum() == last - first
    else:
        with pytest.raises((RuntimeError, IndexError), match="index|feature 1 that its likelihood, .*, does not take, expected"):
            function(raw, x)
    x[5, 1] = near
    assert not function(raw, x).isnan().any()


def arguments(samples=(), slopes=True, mask=True, dtype=torch.float32):
    joint, raw, x, seen = problem(rows=6, samples=samples, dtype=dtype)
    return raw.detach(), x, seen if mask else None, joint._kinds, joint.w, slopes


@pytest.mark.parametrize("samples, slopes, mask", [((), True, True), ((2,), True, False), ((2,), False, True)])
def test_opcheck(samples, slopes, mask):
    args = arguments(samples, slopes, mask)
    torch.library.opcheck(OP, args)
    if slopes:
        out, beside = OP(*args)
        torch.library.opcheck(BACKWARD, (torch.randn_like(out), beside, args[3]))


@pytest.mark.parametrize("change, message", [
    (lambda a: (a[0], a[1][:5], *a[2:]), "x must be"),
    (lambda a: (a[0], a[1].double(), *a[2:]), "x must be"),
    (lambda a: (a[0], a[1], a[2][:, :3], *a[3:]), "seen must be"),
    (lambda a: (*a[:3], a[3][:-1], *a[4:]), "w must be"),
    (lambda a: (*a[:3], a[3] * 3, *a[4:]), "features must name"),
    (lambda a: (*a[:4], a[4][:3], a[5]), "w must be"),
    (lambda a: (a[0].half(), a[1].half(), *a[2:]), "raw must be"),
])  # fmt: skip
def test_the_operator_reads_nothing_that_is_not_there(change, message):
    with pytest.raises(RuntimeError, match=message):
        OP(*change(arguments()))


def test_derivatives_and_theirs():
    """gradcheck of both: the second derivative goes through plain torch."""
    for kind in KINDS.values():
        joint, raw, x, seen = problem([kind, Normal()], rows=3, dtype=torch.float64)
        gradcheck(lambda r, joint=joint, x=x, seen=seen: joint.log_prob(r, x, seen), raw)
        gradgradcheck(lambda r, joint=joint, x=x: joint.log_prob(r, x), raw)
    joint, raw, x, _ = problem(samples=(3,))
    mapped = torch.func.vmap(lambda r: joint.log_prob(r, x))(raw)
    with pytest.raises(RuntimeError, match="likelihoods inside vmap"):
        torch.autograd.grad(mapped.sum(), raw, create_graph=True)


@pytest.mark.parametrize("mapped", list(itertools.product([True, False], repeat=2)))
def test_vmap(mapped):
    """Over models, over data, over both: a loop's bits, and its gradients."""
    over_raw, over_x = mapped
    if not any(mapped):
        return
    joint, raw, x, seen = problem(rows=5, samples=(3,))
    xs = torch.stack([x, x.flip(0), x]) if over_x else x
    raws = raw if over_raw else raw[0]
    mapping = torch.func.vmap(joint.log_prob, (0 if over_raw else None, 0 if over_x else None, None))
    found = mapping(raws, xs, seen)
    wanted = torch.stack([joint.log_prob(raws[i] if over_raw else raws, xs[i] if over_x else xs, seen) for i in range(3)])
    assert torch.equal(found, wanted)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), raw, retain_graph=True) for t in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # of torch itself, in jvp
def test_torch_func():
    joint, raw, x, seen = problem(rows=4, dtype=torch.float64)
    raw = raw.detach()
    wanted = torch.func.grad(lambda r: joint.in_torch(r, x, seen).sum())(raw)
    torch.testing.assert_close(torch.func.grad(lambda r: joint.log_prob(r, x, seen).sum())(raw), wanted)
    each = torch.func.vmap(torch.func.grad(lambda r, v: joint.log_prob(r[None], v[None]).sum()))(raw, x)
    torch.testing.assert_close(each, torch.func.grad(lambda r: joint.in_torch(r, x).sum())(raw))
    _, change = torch.func.jvp(lambda r: joint.log_prob(r, x, seen), (raw,), (torch.ones_like(raw),))
    torch.testing.assert_close(change.sum(), wanted.sum())
    curved, right = (torch.func.hessian(lambda r, f=f: f(r, x[:1]).sum())(raw[0][None]) for f in (joint.log_prob, joint.in_torch))
    torch.testing.assert_close(curved, right)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore::DeprecationWarning:torch")  # torch.compile does that itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    """One graph, the bits of eager, also of the gradient."""
    joint, raw, x, seen = problem(samples=(2,))
    compiled = torch.compile(joint.log_prob, fullgraph=True, backend=backend)
    for cells in (None, seen):
        wanted, found = joint.log_prob(raw, x, cells), compiled(raw, x, cells)
        assert torch.equal(found, wanted)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), raw)[0] for t in (found, wanted)))


def test_no_memory_is_left_unwritten_and_the_graph_may_be_kept():
    joint, raw, x, _ = problem()
    out = joint.log_prob(raw, x)
    first, second = (torch.autograd.grad(out.sum(), raw, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (nothing,) = torch.autograd.grad(joint.log_prob(raw, x)[:0].sum(), raw)
    assert not nothing.any()


@pytest.mark.parametrize("shape", [(37, 3), (3,), (1, 3), (2, 1, 1)])
def test_seen_may_broadcast(shape):
    joint, raw, x, _ = problem([Normal(), LogNormal(), Bernoulli()], samples=(2,))
    x, seen = x.expand(2, *x.shape[-2:]).clone(), (torch.arange(math.prod(shape)) % 2).float().view(shape)
    assert torch.equal(joint.log_prob(raw, x, seen), joint.log_prob(raw, x, seen.expand_as(x).contiguous()))


def test_errors_are_in_words_for_people():
    joint, raw, x, _ = problem([Normal(), LogNormal(), Bernoulli()])
    with pytest.raises(ValueError, match=r"seen has shape \(5,\), expected \(37, 3\) as x, or what broadcasts to it"):
        joint.log_prob(raw, x, torch.ones(5))
    x[4, 1] = -1
    with pytest.raises(
        RuntimeError, match="^x has a value in feature 1 that its likelihood, LogNormal, does not take, expected a number from 0 on$"
    ):
        joint.log_prob(raw, x)
