"""Products of two lists of gradients, and the rules that take them: MoDo, SDMGrad."""

import itertools

import pytest
import torch

import mmfast as mf
from mmfast.resolvers.stochastic import project_on_simplex

K = 4


def make(k, shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(k)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_products_of_two_lists(per, dtype, backend):
    """Against float64 sums, with masks of rows and of samples; not symmetric."""
    for k, shape in ((1, (3, 5)), (3, (4, 301)), (7, (2, 2500))):
        grads, others = make(k, shape, dtype), make(k, shape, dtype, seed=1)
        for mask in (None, torch.arange(k) != 1, torch.rand(shape[0], k) < 0.7):
            found = mf.gram(grads, per, others=others, mask=mask, backend=backend)
            a, b = (torch.stack(x, 1).double() for x in (grads, others))  # [B, K, M]
            seen = torch.ones(shape[0], k) if mask is None else mask.expand(shape[0], k)
            a, b = (torch.where(seen.bool().unsqueeze(-1), x, 0) for x in (a, b))
            if per == "batch_sum":
                a, b = a.sum(0, keepdim=True), b.sum(0, keepdim=True)
            exact = a @ b.mT if per == "sample" else (a @ b.mT).sum(0)
            size = (a.abs() @ b.abs().mT).amax()
            torch.testing.assert_close(found, exact, rtol=0, atol=(1e-14 if dtype == torch.float64 else 1e-6) * size.item())
            assert found.dtype == torch.float64 and found.is_contiguous()


def test_lists_of_tensors_one_tensor_and_many_gradients():
    grads, others = make(3, (2, 5)), make(3, (2, 5), seed=1)
    whole = mf.gram(grads, others=others)
    torch.testing.assert_close(mf.gram(torch.stack(grads), others=torch.stack(others)), whole, rtol=0, atol=0)
    split = [[[g[0], g[1]] for g in side] for side in (grads, others)]
    torch.testing.assert_close(mf.gram(split[0], others=split[1]), whole, rtol=1e-6, atol=1e-6)
    absent = [*split[0][:2], None]
    torch.testing.assert_close(mf.gram(absent, others=split[1])[:2], whole[:2], rtol=1e-6, atol=1e-6)
    assert not mf.gram(absent, others=split[1])[2].any()
    for k in (128, 129, 256):  # beyond 128 by blocks
        grads, others = make(k, 17, torch.float64), make(k, 17, torch.float64, seed=1)
        torch.testing.assert_close(mf.gram(grads, others=others), torch.stack(grads) @ torch.stack(others).T)
    assert torch.equal(mf.gram(grads, others=grads), mf.gram(grads))


def by_trying(y):
    """The nearest point of the simplex: the best of those with each support."""
    best = None
    for support in itertools.product((False, True), repeat=len(y)):
        s = torch.tensor(support)
        if s.any():
            x = torch.where(s, y - (y[s].sum() - 1) / s.sum(), 0)
            if x.min() >= -1e-12 * y.abs().max() and (best is None or (x - y).norm() < (best - y).norm()):
                best = x
    return best


def test_projection_on_the_simplex():
    y = torch.randn(40, 5, dtype=torch.float64) * torch.logspace(-2, 3, 40).double().unsqueeze(1)
    found = project_on_simplex(y, torch.ones_like(y, dtype=torch.bool))
    torch.testing.assert_close(found, torch.stack([by_trying(row) for row in y]))
    active = torch.rand(40, 5) < 0.6
    active[:, 0] = True
    found = project_on_simplex(y, active)
    assert not found[~active].any()
    for row, mask, x in zip(y, active, found, strict=True):
        torch.testing.assert_close(x[mask], by_trying(row[mask]))


def products(calls=6, n=30):
    """Of gradients of one batch and of another, which agree in part."""
    batches = [(torch.stack(make(K, n, torch.float64, 2 * c)), torch.stack(make(K, n, torch.float64, 2 * c + 1))) for c in range(calls)]
    return [mf.gram(a, others=a + b) / n for a, b in batches]


def test_modo_moves_as_its_formula():
    rule, w = mf.MoDo(gamma=0.3, rho=0.2), torch.full((K,), 1 / K, dtype=torch.float64)
    for A in products():
        w = by_trying(w - 0.3 * (A @ w + 0.2 * w))
        torch.testing.assert_close(mf.weights(A, rule), w)


def test_sdmgrad_moves_as_its_formula():
    pref = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    rule, w = mf.SDMGrad(penalty=0.6, pref=pref.tolist(), lr=2.0, momentum=0.4, n_iter=3), torch.full((K,), 1 / K, dtype=torch.float64)
    for A in products():
        A = A / A.diagonal().clamp(min=0).sqrt().mean() ** 2
        velocity = torch.zeros(K, dtype=torch.float64)
        for _ in range(3):
            velocity = 0.4 * velocity + A @ (w + 0.6 * pref)
            w = by_trying(w - 2.0 * velocity)
        torch.testing.assert_close(mf.weights(A * (A.diagonal().clamp(min=0).sqrt().mean() ** 2 * 7), rule), (w + 0.6 * pref) / 1.6)


def test_against_torchjd():
    peers = pytest.importorskip("torchjd.aggregation")
    for mine, theirs in ((mf.MoDo(), peers.MoDoWeighting()), (mf.SDMGrad(), peers.SDMGradWeighting())):
        for A in products():
            torch.testing.assert_close(mf.weights(A, mine), theirs(A), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make_rule", [mf.MoDo, mf.SDMGrad])
def test_laws_and_state(make_rule):
    """Weights on the simplex's scale; missing rows keep their place; NaN keeps the state; each sample has its own; a checkpoint goes on."""
    rule, calls = make_rule(), products()
    first = mf.weights(calls[0], rule)
    assert first.sum().item() == pytest.approx(1) and (first >= 0).all()
    kept = rule.state.clone()
    assert mf.weights(torch.full((K, K), torch.nan), rule).isnan().all() and torch.equal(rule.state, kept)
    mask = torch.tensor([True, True, False, True])
    poisoned = calls[1].clone()
    poisoned[2] = poisoned[:, 2] = torch.inf
    w = mf.weights(poisoned, rule, mask)
    assert w[2] == 0 and rule.state[2] == kept[2] and w.sum().item() == pytest.approx(1)
    other = make_rule()
    other.load_state_dict(rule.state_dict())
    assert torch.equal(mf.weights(calls[2], rule), mf.weights(calls[2], other))
    order = torch.tensor([2, 0, 3, 1])
    a, b = make_rule(), make_rule()
    for A in calls[:3]:
        torch.testing.assert_close(mf.weights(A[order][:, order], b), mf.weights(A, a)[order])
    both, alone = make_rule(), make_rule()
    for A, B in itertools.pairwise(calls):
        torch.testing.assert_close(mf.weights(torch.stack([A, B]), both)[0], mf.weights(A, alone))
    rule.reset()
    assert torch.equal(mf.weights(calls[0], rule), first)
    out = mf.resolve(make(K, (2, 9)), make_rule())  # one batch stands for both
    assert out.shape == (2, 9)


def test_sdmgrad_sees_no_scale():
    for scale in (1e-20, 1e20):
        ours, plain = mf.SDMGrad(), mf.SDMGrad()
        for A in products(3):
            torch.testing.assert_close(mf.weights(A * scale, ours), mf.weights(A, plain))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mf.gram(make(2, 3), others=make(3, 3)), "others holds 3 gradients, expected 2 as grads does"),
        (lambda: mf.gram(make(2, 3), others=make(2, 4)), r"others\[0\] has shape \(4,\), expected \(3,\) like grads\[0\]"),
        (lambda: mf.gram(make(2, 3), others=make(2, 3), mask=torch.ones(4, dtype=torch.bool)), r"mask has shape \(4,\), expected \(2,\)"),
        (lambda: mf.gram(make(2, 3), others=7), "is a int, expected K gradients"),
        (lambda: mf.weights(torch.eye(2), mf.MoDo), "which keeps state from call to call"),
        (lambda: mf.MoDo(gamma=0.0), "MoDo: gamma is 0.0, expected a positive number"),
        (lambda: mf.MoDo(rho=-1.0), "MoDo: rho is -1.0, expected a finite number of at least 0"),
        (lambda: mf.SDMGrad(momentum=1.0), "SDMGrad: momentum is 1.0"),
        (lambda: mf.SDMGrad(n_iter=0), "SDMGrad: n_iter is 0"),
        (lambda: mf.weights(torch.eye(3), mf.SDMGrad(pref=[1.0, 2.0])), "pref has 2 numbers, expected 3"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
