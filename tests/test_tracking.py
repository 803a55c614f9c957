"""EMA (DB-MTL), MoCo, ExcessMTL and M-ConFIG: each method's formula written out in float64 loops, and what holds of all of them."""

import copy

import pytest
import torch

import mmfast as mf

K, N, CALLS = 3, 40, 6
BACKENDS = ["auto", "reference"]
MAKE = {
    "EMA": lambda: mf.EMA(mf.DBMTL(), beta=0.8, sigma=0.3),
    "EMA of PCGrad": lambda: mf.EMA(mf.PCGrad(order="fixed")),
    "MoCo": lambda: mf.MoCo(rho=0.1),
    "ExcessMTL": lambda: mf.ExcessMTL(n_warmup_steps=2),
    "MConFIG": lambda: mf.MConFIG(beta1=0.8, beta2=0.9),
}
every_rule = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def calls(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(K, N, generator=generator, dtype=torch.float64).mul(torch.tensor([[1.0], [5.0], [0.2]])).to(dtype) for _ in range(CALLS)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dbmtl_with_its_running_means(backend):
    rule, y = mf.EMA(mf.DBMTL(), beta=0.8, sigma=0.3), torch.zeros(K, N, dtype=torch.float64)
    for t, J in enumerate(calls(), 1):
        y = J + 0.8 / t**0.3 * (y - J)
        norm = y.norm(dim=1)
        expected = ((norm.max() / norm).unsqueeze(1) * y).sum(0)
        torch.testing.assert_close(mf.resolve(list(J), rule, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("told", [True, False])
def test_moco(told, backend):
    rule, y, w = mf.MoCo(beta=0.6, gamma=0.2, rho=0.1), torch.zeros(K, N, dtype=torch.float64), torch.full((K,), 1 / K, dtype=torch.float64)
    for t, J in enumerate(calls(), 1):
        losses = torch.tensor([1.0, 2.0, 0.5]) / t if told else torch.ones(K)
        if told:
            rule.see(losses)
        g = J / J.norm(dim=1, keepdim=True) * losses.unsqueeze(1)
        y = y - 0.6 / t**0.5 * (y - g)
        w = torch.softmax(w - 0.2 / t**0.5 * (y @ y.T + 0.1 * torch.eye(K)) @ w, 0)
        torch.testing.assert_close(mf.resolve(list(J), rule, backend=backend), w @ y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warm", [1, 3])
def test_excessmtl(warm, backend):
    rule, sums, w, first = (
        mf.ExcessMTL(0.7, warm),
        torch.zeros(K, N, dtype=torch.float64),
        torch.full((K,), 1 / K, dtype=torch.float64),
        0.0,
    )
    for t, J in enumerate(calls(), 1):
        sums = sums + J**2
        excess = (J**2 / sums.sqrt()).sum(1)
        if t <= warm:
            first = first + excess / warm
        else:
            w = w * torch.exp(0.7 * excess / first)
            w = w / w.sum()
        torch.testing.assert_close(mf.resolve(list(J), rule, backend=backend), w @ J)


def test_excessmtl_against_torchjd():
    """Which has absolute floors of 1e-7, and with a warm-up takes its mean as the first excess risk, as here."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    mine, theirs = mf.ExcessMTL(0.5, 2), aggregation.ExcessMTL(0.5, 2)
    for J in calls():
        torch.testing.assert_close(mf.resolve(list(J), mine), theirs(J), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mconfig(backend):
    """All gradients at the first call, later one in turn: the momenta of the others take part."""
    b1, b2 = 0.8, 0.9
    rule, m, seen = mf.MConFIG(b1, b2), torch.zeros(K, N, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    moment, square = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for t, J in enumerate(calls(), 1):
        new = [True] * K if t == 1 else [i == t % K for i in range(K)]
        for i in range(K):
            if new[i]:
                m[i], seen[i] = b1 * m[i] + (1 - b1) * J[i], seen[i] + 1
        hats = m / (1 - b1**seen).unsqueeze(1)
        units = hats / hats.norm(dim=1, keepdim=True)
        along = torch.linalg.pinv(units) @ torch.ones(K, dtype=torch.float64)
        along = along / along.norm()
        d = (hats @ along).sum() * along
        before, moment = moment, d * (1 - b1**t)
        square = b2 * square + (1 - b2) * ((moment - b1 * before) / (1 - b1)) ** 2
        expected = d / (square / (1 - b2**t)).sqrt()
        found = mf.resolve([g if there else None for g, there in zip(J, new, strict=True)], rule, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(make, dtype):
    """What is kept of it is in float32, the result as near to that of the same numbers in float64 as float32 allows."""
    ours, exact = make(), make()
    for J in calls(dtype):
        out, truth = mf.resolve(list(J), ours), mf.resolve(list(J.double()), exact)
        assert out.dtype == dtype
        scale = truth.abs().max().item()
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=(2e-2 if dtype == torch.bfloat16 else 2e-4) * scale)
    assert all(getattr(ours, name).dtype == torch.float32 for name in ours.of_elements)


@every_rule
def test_state(make):
    """A checkpoint goes on where it was; half() leaves it alone; a number that is not finite changes nothing; reset() begins anew."""
    rule, J = make(), calls()
    first = mf.resolve(list(J[0]), rule)
    saved = copy.deepcopy(rule.state_dict())
    other, twin = make(), copy.deepcopy(rule).half()
    other.load_state_dict(saved)
    broken = J[1].clone()
    broken[1, 7] = torch.inf
    assert mf.resolve(list(broken), rule).isnan().all()
    second = mf.resolve(list(J[1]), rule)
    assert torch.equal(mf.resolve(list(J[1]), other), second) and torch.equal(mf.resolve(list(J[1]), twin), second)
    rule.reset()
    assert torch.equal(mf.resolve(list(J[0]), rule), first)
    rule.reset_parameters()
    assert torch.equal(mf.resolve(list(J[0]), rule), first)
    fresh = make()
    fresh.load_state_dict(make().state_dict())
    assert torch.equal(mf.resolve(list(J[0]), fresh), first)


@every_rule
def test_a_loss_scale_that_is_told_is_not_seen(make):
    """As a number or as the scaler's tensor."""
    scaled, plain = make(), make()
    for t, J in enumerate(calls()):
        s = 2.0 ** (5 * t % 7)
        scaled.loss_scale = s if t % 2 else torch.tensor(s)
        torch.testing.assert_close(mf.resolve(list(J * s), scaled) / s, mf.resolve(list(J), plain), rtol=1e-12, atol=1e-14)


@every_rule
def test_missing_rows(make):
    """None, a row of zeros and a masked one are the same; what was kept of it is kept."""
    rules, J, mask = [make() for _ in range(3)], calls(), torch.tensor([True, False, True])
    for n, g in enumerate(J[:4]):
        if n == 2:
            zero, poisoned = g.clone(), g.clone()
            zero[1], poisoned[1] = 0, torch.nan
            ways = [([g[0], None, g[2]], None), (list(zero), None), (list(poisoned), mask)]
        else:
            ways = [(list(g), None)] * 3
        before = [x.clone() for x in (getattr(rules[0], rules[0].of_elements[0]),)] if n else []
        a, b, c = (mf.resolve(grads, rule, mask=m) for (grads, m), rule in zip(ways, rules, strict=True))
        assert torch.equal(a, b) and torch.equal(a, c) and a.isfinite().all()
        if n == 2:
            assert torch.equal(getattr(rules[0], rules[0].of_elements[0])[1], before[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tiny", [1e-24, 1e-30, 1e-44])
@every_rule
def test_a_row_whose_squares_vanish_is_missing(make, tiny, backend):
    """In float32 nothing is in proportion to it: it makes no number infinite, at its first call or later, and the others go on as without it."""
    for first in (0, 2):
        rule, without = make(), make()
        for n, J in enumerate(calls(torch.float32)):
            small = J.clone()
            small[1] *= tiny if n == first else 1
            out = mf.resolve(list(small), rule, backend=backend)
            expected = mf.resolve([J[0], None, J[2]] if n == first else list(J), without, backend=backend)
            assert all(x.isfinite().all() for x in rule.buffers()), n
            if type(rule) in (mf.MoCo, mf.ExcessMTL):  # the others keep its running mean, however small
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@every_rule
def test_lists_shapes_and_order(make):
    """Several tensors are one problem; the order of the gradients does not matter."""
    whole, split, turned, order = make(), make(), make(), torch.tensor([2, 0, 1])
    for J in calls()[:3]:
        expected = mf.resolve(list(J), whole)
        a, b = mf.resolve([[g[:12].view(3, 4), g[12:]] for g in J], split)
        torch.testing.assert_close(torch.cat([a.flatten(), b]), expected, rtol=1e-12, atol=1e-14)
        if "PCGrad" not in repr(whole):
            torch.testing.assert_close(mf.resolve(list(J[order]), turned), expected, rtol=1e-9, atol=1e-12)


def test_at_the_parameters_of_a_model():
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(4, 3), [torch.nn.Linear(3, 1) for _ in range(K)]
    rule, values = mf.MoCo(), []
    optimizer = torch.optim.SGD([*trunk.parameters(), *(p for head in heads for p in head.parameters())], lr=0.1)
    x = torch.randn(32, 4)
    for _ in range(40):
        optimizer.zero_grad()
        losses = [(head(trunk(x)) - x[:, i : i + 1]).square().mean() for i, head in enumerate(heads)]
        values.append(sum(losses).item())
        rule.see(torch.stack(losses))
        mf.backward(losses, rule)
        optimizer.step()
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mf.fork(torch.ones(2, requires_grad=True), 2, mf.EMA("dbmtl")), "EMA, which keeps what it saw of every element"),
        (lambda: mf.ImpartialityBlock([torch.nn.Linear(2, 1)] * 2, mf.MoCo()), "MoCo, which keeps what it saw of every element"),
        (lambda: mf.resolve([torch.ones(2, 3)] * 2, mf.MoCo(), per="sample"), "per is 'sample', but MoCo resolves gradients of parameters"),
        (
            lambda: mf.resolve([torch.ones(2, 3)] * 2, mf.MoCo(), mask=torch.ones(2, 2, dtype=torch.bool)),
            r"mask has shape \(2, 2\), expected \(2,\)",
        ),
        (lambda: mf.resolve([torch.ones(3)] * 2, mf.MConFIG), "which keeps state from call to call"),
        (lambda: mf.weights(torch.eye(2), mf.MoCo()), "MoCo works on gradients element by element"),
        (lambda: mf.Compose(mf.Unit(), mf.MoCo()), "expected a Resolver of Gramians"),
        (lambda: mf.EMA(mf.GradDrop()), "EMA: inner is GradDrop"),
        (lambda: mf.EMA("mgda", beta=1.0), "EMA: beta is 1.0, expected a number of at least 0, below 1"),
        (lambda: mf.MConFIG(beta2=-0.1), "MConFIG: beta2 is -0.1"),
        (lambda: mf.ExcessMTL(0.0), "ExcessMTL: robust_step_size is 0.0"),
        (lambda: mf.ExcessMTL(n_warmup_steps=0), "ExcessMTL: n_warmup_steps is 0"),
        (lambda: mf.MoCo(gamma=-1.0), "MoCo: gamma is -1.0"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_another_set_of_parameters_is_refused():
    rule = mf.EMA("mgda")
    mf.resolve([torch.ones(3), torch.ones(3)], rule)
    with pytest.raises(
        ValueError, match=r"EMA keeps mean of shape \(2, 3\), torch.float32, from earlier calls, but these gradients need \(2, 4\)"
    ):
        mf.resolve([torch.ones(4), torch.ones(4)], rule)
    moco = mf.MoCo()
    moco.see(torch.ones(3))
    with pytest.raises(ValueError, match=r"MoCo: losses has shape \(3,\), expected \(2,\)"):
        mf.resolve([torch.ones(4), torch.ones(4)], moco)
