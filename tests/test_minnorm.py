"""MGDA and CAGrad beyond the laws that all rules share."""

import pytest
import torch
from problems import gramian, kinds
from residuals import cagrad_residual, mgda_residual

from mmfast import ops
from mmfast.resolvers.minnorm import MGDA, CAGrad

both = pytest.mark.parametrize("backend", ["auto", "reference"])


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hard(k):
    """(name, J): dependence at every distance that float64 can and cannot resolve, and ties."""
    n = 3 * k + 5
    for rank in {1, 2, k // 2, k - 1}:
        yield f"rank {rank}", randn(k, rank, seed=rank)
    for e in (1e-2, 1e-4, 1e-6, 1e-7, 1e-8, 1e-10):
        yield f"copies but for {e}", randn(1, n) + e * randn(k, n, seed=1)
        pairs = randn(k, n, seed=2)
        pairs[k // 2 :] = pairs[: k - k // 2] + e * randn(k - k // 2, n, seed=3)
        yield f"pairs but for {e}", pairs
        pairs[k // 2 :] = -pairs[: k - k // 2] + e * randn(k - k // 2, n, seed=4)
        yield f"opposite but for {e}", pairs
    yield "scales", randn(k, n, seed=5) * (6 * randn(k, 1, seed=6)).exp()
    yield "signs", randn(k, 3, seed=7).sign()
    yield "one-hot", torch.eye(4, dtype=torch.float64)[torch.arange(k) % 4]


@pytest.mark.parametrize("k", [2, 4, 7, 16, 33, 64, 130])
def test_hard_gramians(k):
    for name, J in hard(k):
        G = J @ J.mT
        assert mgda_residual(G, ops.weights(G, MGDA())) <= 1e-12, name
        for c in (1e-3, 0.3, 1.0, 3.0):  # a small ball leaves few digits of w - 1/k to check
            assert cagrad_residual(c)(G, ops.weights(G, CAGrad(c))) <= 1e-8, (name, c)


def test_many_small_problems():
    """Random signs and scales meet every order in which rows enter and leave."""
    J = randn(1000, 6, 3) * (3 * randn(1000, 6, 1, seed=1)).exp()
    G = J @ J.mT
    mgda, cagrad = ops.weights(G, MGDA()), ops.weights(G, CAGrad(0.5))
    residual = cagrad_residual(0.5)
    for i in range(len(G)):
        assert mgda_residual(G[i], mgda[i]) <= 1e-12, i
        assert residual(G[i], cagrad[i]) <= 1e-10, i


@both
@pytest.mark.parametrize("k", [2, 5, 16])
def test_copies_share_equally(k, backend):
    J = randn(1, 20).expand(k, 20)
    even = torch.full((k,), 1 / k, dtype=torch.float64)
    torch.testing.assert_close(ops.weights(J @ J.mT, MGDA(), backend=backend), even, rtol=1e-12, atol=0)
    torch.testing.assert_close(ops.weights(J @ J.mT, CAGrad(0.5), backend=backend), 1.5 * even, rtol=1e-9, atol=0)


@both
def test_a_doubled_row_splits_its_weight(backend):
    G = gramian(4)
    twice = [0, 1, 2, 3, 2]
    w, w2 = ops.weights(G, MGDA(), backend=backend), ops.weights(G[twice][:, twice].contiguous(), MGDA(), backend=backend)
    expected = w[twice].clone()
    expected[[2, 4]] /= 2
    torch.testing.assert_close(w2, expected, rtol=1e-9, atol=1e-11)


@both
def test_orthogonal_rows(backend):
    """The shortest vector of an orthogonal hull weighs each row by 1 / |g_i|^2."""
    squares = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(ops.weights(squares.diag(), MGDA(), backend=backend), (1 / squares) / (1 / squares).sum(), rtol=1e-9, atol=0)


@both
def test_shortest_row_of_all(backend):
    """A row far shorter than the others, which lie on its side, takes all the weight."""
    J = torch.tensor([[1e-6, 0.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(ops.weights(J @ J.mT, MGDA(), backend=backend), expected, rtol=0, atol=1e-12)


@both
def test_l2_is_mgda_on_unit_rows(backend):
    J = randn(5, 20) * torch.tensor([[1e-3], [1.0], [2.0], [1e2], [1e3]], dtype=torch.float64)
    norm = J.norm(dim=1)
    U = J / norm.unsqueeze(1)
    alpha = ops.weights(U @ U.mT, MGDA(), backend=backend)
    torch.testing.assert_close(ops.weights(J @ J.mT, MGDA("l2"), backend=backend), alpha / norm, rtol=1e-9, atol=0)


@both
def test_cagrad_without_a_ball_is_the_mean(backend):
    for _, G in kinds(5):
        assert torch.equal(ops.weights(G, CAGrad(0.0), backend=backend), torch.full((5,), 0.2, dtype=torch.float64))


@both
def test_cagrad_with_a_wide_ball_follows_mgda(backend):
    G = gramian(6)
    w, far = ops.weights(G, MGDA(), backend=backend), ops.weights(G, CAGrad(1e5), backend=backend)
    torch.testing.assert_close(far / far.sum(), w, rtol=1e-4, atol=0)


@both
def test_cagrad_rescale(backend):
    G = gramian(4)
    plain = ops.weights(G, CAGrad(0.5), backend=backend)
    torch.testing.assert_close(ops.weights(G, CAGrad(0.5, rescale=1), backend=backend), plain / 1.25, rtol=1e-12, atol=0)
    torch.testing.assert_close(ops.weights(G, CAGrad(0.5, rescale=2), backend=backend), plain / 1.5, rtol=1e-12, atol=0)


@both
def test_cagrad_of_exactly_opposite_rows(backend):
    """Nothing but zero harms neither: it is reached once the ball holds it; a smaller ball keeps to its edge nearest to zero."""
    G = torch.tensor([[1.0, -2.0], [-2.0, 4.0]], dtype=torch.float64)  # rows 1 and -2, mean -1/2
    J = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(ops.weights(G, CAGrad(3.0), backend=backend) @ J, torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        ops.weights(G, CAGrad(0.5), backend=backend) @ J, torch.tensor(-0.25, dtype=torch.float64), rtol=1e-9, atol=0
    )


@both
def test_cagrad_where_nothing_helps_all_rows(backend):
    """Rows 1 and 2 forbid the first axis; of the harmless directions the nearest to the mean (1/3, 1/3) is left."""
    J = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    d = ops.weights(J @ J.mT, CAGrad(1.5), backend=backend) @ J
    torch.testing.assert_close(d, torch.tensor([0.0, 1 / 3], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@both
def test_no_blow_up_where_rounding_is_all_that_is_left(backend):
    for k in (3, 8, 32):
        J = randn(k, 3 * k)
        J -= J.mean(0)
        w = ops.weights(J @ J.mT, CAGrad(0.5), backend=backend)
        torch.testing.assert_close(w, torch.full((k,), 1 / k, dtype=torch.float64), rtol=1e-12, atol=0)


@both
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_a_cap_cuts_weights(normalize, backend):
    """The weights on the hull, none above the cap; so low a cap as the published one makes all but zeros alike."""
    G = torch.stack([gramian(5, seed=s) for s in range(4)])
    length = G.diagonal(dim1=-2, dim2=-1).sqrt() if normalize == "l2" else torch.ones(4, 5, dtype=torch.float64)
    whole = ops.weights(G, MGDA(normalize), backend=backend) * length
    for cap in (1.0, 0.25, 1e-3):
        found = ops.weights(G, MGDA(normalize, cap=cap), backend=backend)
        torch.testing.assert_close(found, whole.clamp(max=cap) / length, rtol=1e-9, atol=1e-12)
    g = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    kept = ops.resolve(g.unbind(), MGDA(cap=1e-3), preserve_norm=True, backend=backend)
    torch.testing.assert_close(kept, torch.tensor([2.0, 1.0]))  # MGDA itself: [0.4, 0.8] at the length of the sum


def test_bad_arguments():
    for cap in (0.0, -1.0, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cap is .*, expected None or a number above 0 and at most 1"):
            MGDA(cap=cap)
    with pytest.raises(ValueError, match='normalize is "loss".*gradients, not losses'):
        MGDA("loss")
    with pytest.raises(ValueError, match="normalize is 'l1'"):
        MGDA("l1")
    for c in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="c is"):
            CAGrad(c)
    with pytest.raises(ValueError, match="rescale is 3"):
        CAGrad(0.5, rescale=3)


def test_repr():
    assert repr(MGDA("l2")) == "MGDA(normalize='l2')" and repr(MGDA(cap=1e-3)) == "MGDA(normalize='none', cap=0.001)"
    assert repr(CAGrad(c=0.4, rescale=1)) == "CAGrad(c=0.4, rescale=1)"
