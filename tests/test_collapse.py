"""Collisions, participation, ranks and similarity: closed forms, brute force, and what the functions refuse."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import mmfast as mf
from mmfast.collapse.collisions import energy_shares

NAN = float("nan")


def planted(n, d, sigma, dtype=torch.float64, lead=()):
    """[..., n, d] with these singular values."""
    sigma = torch.tensor(sigma, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(*lead, size, len(sigma), dtype=torch.float64))[0] for size in (n, d))
    return (u * sigma @ v.mT).to(dtype)


def entropy_rank(sigma):
    total = math.fsum(sigma)
    return math.exp(-math.fsum(s / total * math.log(s / total) for s in sigma if s))


@pytest.mark.parametrize("dims", [[1], [3, 3], [1, 2], [5, 1, 4], [2, 2, 2, 2], [7, 3, 1, 1, 6]])
def test_collisions_by_brute_force(dims):
    """All pairs of features, drawn with replacement: how many are of two modalities."""
    owners = [i for i, d in enumerate(dims) for _ in range(d)]
    apart = sum(a != b for a, b in itertools.product(owners, repeat=2))
    exact, bound = mf.collapse.collision_probability(dims), mf.collapse.collision_bound(dims)
    assert exact == pytest.approx(apart / len(owners) ** 2, rel=1e-14, abs=0)
    smallest = sum(min(dims) ** 2 for i in range(len(dims)) for j in range(len(dims)) if i != j)
    assert bound == pytest.approx(smallest / sum(dims) ** 2, rel=1e-14, abs=0)
    assert bound == pytest.approx(exact) if len(set(dims)) == 1 else bound < exact


def test_collisions_of_equal_modalities():
    """1 - 1/m."""
    for m in (2, 3, 10):
        assert mf.collapse.collision_bound([8] * m) == pytest.approx(1 - 1 / m)


@pytest.mark.parametrize("shape", [(5, 9), (5, 9, 2, 3)])
def test_participation_by_loops(shape):
    weight, sizes = torch.randn(shape), [2, 4, 3]
    found = mf.collapse.participation(weight, sizes)
    shares = energy_shares(weight, sizes)
    for row, gamma, share in zip(weight.tolist(), found, shares, strict=True):
        flat = torch.tensor(row, dtype=torch.float64)
        energies = [float(flat[a:b].square().sum()) for a, b in ((0, 2), (2, 6), (6, 9))]
        assert gamma == pytest.approx(sum(energies) ** 2 / sum(e * e for e in energies), rel=1e-12)
        assert share.tolist() == pytest.approx([e / sum(energies) for e in energies], rel=1e-12)
    assert found.dtype == torch.float64 and not found.requires_grad


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_planted_participation(scale):
    """One modality, two of four alike, all alike; and that a scale changes nothing, where energies are beyond the numbers there are."""
    weight = torch.zeros(4, 8, dtype=torch.float64)
    weight[0, 2], weight[1, 0:4], weight[2, :] = -3, 1, torch.tensor([1.0, -1] * 4)
    weight[3] = torch.tensor([2.0, 0, 1, 0, 0, 0, 0, 0])  # energies 4 and 1
    found = mf.collapse.participation(weight.requires_grad_() * scale, [2, 2, 2, 2])
    torch.testing.assert_close(found, torch.tensor([1, 2, 4, 25 / 17], dtype=torch.float64))
    features = mf.collapse.participation(weight, [1] * 8)
    torch.testing.assert_close(features, torch.tensor([1, 4, 8, 25 / 17], dtype=torch.float64))


def test_participation_of_what_is_no_neuron():
    weight = torch.tensor([[0.0, 0.0], [1.0, NAN], [math.inf, 1.0], [1.0, 1.0]])
    assert mf.collapse.participation(weight, [1, 1]).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, d", [(60, 20), (20, 60), (33, 33), (500, 7)])
def test_planted_ranks(n, d, dtype):
    for sigma in ([2.0], [1.0] * 5, [1.0, 0.5, 0.25, 0.125], [10.0, 0.011, 0.009, 1e-4], [3.0] * 4 + [1e-5]):
        x = planted(n, d, sigma, dtype)
        error = 1e-4 if dtype == torch.float32 else 1e-10
        assert float(mf.collapse.effective_rank(x)) == pytest.approx(entropy_rank(sigma), rel=error)
        assert float(mf.collapse.numerical_rank(x)) == sum(s > 1e-3 * sigma[0] for s in sigma)
        assert float(mf.collapse.numerical_rank(x, tol=0.3)) == sum(s > 0.3 * sigma[0] for s in sigma)


@pytest.mark.parametrize("d", [64, 512])
def test_effective_rank_in_float32_is_that_of_the_decomposition(d):
    """What is left out of the Gramian of a matrix of low rank, and of one whose singular values never end, is less than the stated 1e-4."""
    for sigma in ([1.0] * 8, [0.7**i for i in range(60)], [1 / (1 + i) ** 2 for i in range(d)], [1e-3 ** (i / d) for i in range(d)]):
        x = planted(2 * d, d, sigma[:d], torch.float32)
        exact = entropy_rank(torch.linalg.svdvals(x.double()).tolist())
        assert float(mf.collapse.effective_rank(x)) == pytest.approx(exact, rel=1e-4)


def test_ranks_of_batches_and_scales():
    sigma = [4.0, 3.0, 0.5]
    for x in (planted(11, 9, sigma, torch.float32, (2, 3)), planted(11, 9, sigma, torch.bfloat16, (2, 3)).float()):
        found = mf.collapse.effective_rank(x), mf.collapse.numerical_rank(x, 0.1)
        for i, j in itertools.product(range(2), range(3)):
            for scale in (1e-25, 1.0, 1e25):
                torch.testing.assert_close(mf.collapse.effective_rank(x[i, j] * scale), found[0][i, j], rtol=1e-5, atol=0)
                assert mf.collapse.numerical_rank(x[i, j] * scale, 0.1) == found[1][i, j] == 3


def test_a_small_tolerance_is_decomposed():
    """Where the Gramian could not tell: 1e-8 of the largest, which a float32 number can be."""
    x = torch.diag(torch.tensor([1.0, 1e-8, 1e-12, 0.0]))
    assert [float(mf.collapse.numerical_rank(x, tol)) for tol in (1e-3, 1e-7, 1e-10, 0.0)] == [1, 1, 2, 3]
    x = planted(50, 40, [1.0] * 3 + [1e-9] * 5)
    assert [float(mf.collapse.numerical_rank(x, tol)) for tol in (1e-3, 1e-10)] == [3, 8]
    assert float(mf.collapse.effective_rank(x)) == pytest.approx(entropy_rank([1.0] * 3 + [1e-9] * 5), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_of_nothing_and_of_no_numbers(dtype):
    x = torch.zeros(3, 4, 5, dtype=dtype)
    x[0, 0, 0] = 1
    x[1, 2, 2] = NAN
    found = mf.collapse.effective_rank(x), mf.collapse.numerical_rank(x)
    for rank in found:
        assert rank[0] == pytest.approx(1) and rank[1].isnan() and rank[2] == 0
    x[1, 2, 2] = math.inf
    assert mf.collapse.effective_rank(x)[1].isnan() and mf.collapse.numerical_rank(x)[1].isnan()
    for empty in (torch.zeros(0, 4, dtype=dtype), torch.zeros(4, 0, dtype=dtype)):
        assert mf.collapse.effective_rank(empty) == mf.collapse.numerical_rank(empty) == 0


def kernel_alignment(x, y):
    """By n x n matrices, centred as in Szekely and Rizzo (2014), whose inner product is Song's estimate."""
    n = len(x)

    def centred(z):
        K = z.double() @ z.double().T
        K = K - K.diag().diag()
        K = K - K.sum(0, keepdim=True) / (n - 2) - K.sum(1, keepdim=True) / (n - 2) + K.sum() / ((n - 1) * (n - 2))
        return K - K.diag().diag()

    K, L = centred(x), centred(y)
    return (K * L).sum() / (K.norm() * L.norm())


@pytest.mark.parametrize("n", [4, 5, 40])
def test_similarity_by_brute_force(n):
    x = torch.randn(n, 6)
    features = {"a": x, "b": x @ torch.randn(6, 3) + torch.randn(n, 3) + 5, "c": torch.randn(n, 50)}
    found = mf.collapse.similarity(features)
    for (i, a), (j, b) in itertools.product(enumerate(features.values()), repeat=2):
        torch.testing.assert_close(found[i, j], kernel_alignment(a, b), rtol=1e-9, atol=1e-12)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(mf.collapse.similarity(list(features.values())), found)


def test_similarity_sees_no_rotation_scale_or_mean():
    x, y = torch.randn(100, 8, dtype=torch.float64), torch.randn(100, 5, dtype=torch.float64)
    y = y + x[:, :5]
    turned = 1e-3 * x @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] + 1e6
    found = mf.collapse.similarity([x, turned, y])
    assert found[0, 1] == pytest.approx(1, abs=1e-6)
    assert found[0, 2] == pytest.approx(float(found[1, 2]), rel=1e-5)


def test_similarity_of_strangers_is_none():
    """More features than samples, where the usual estimate says .7: the mean of ten is within three standard errors of 0."""
    found = torch.stack([mf.collapse.similarity([torch.randn(60, 200), torch.randn(60, 200)])[0, 1] for _ in range(10)])
    assert found.mean().abs() < 3 * found.std() / 10**0.5
    assert found.abs().max() < 0.1


@pytest.mark.parametrize("measure", ["cka", "cosine"])
def test_similarity_of_the_samples_that_have_both(measure):
    x, y = torch.randn(12, 4), torch.randn(12, 4)
    has_x, has_y = torch.arange(12) < 9, torch.arange(12) > 2
    expected = mf.collapse.similarity([x[3:9], y[3:9]], measure=measure)[0, 1]
    x[9:], y[:3] = NAN, math.inf
    found = mf.collapse.similarity({"x": x, "y": y}, {"x": has_x, "y": has_y}, measure)
    torch.testing.assert_close(found[0, 1], expected)
    torch.testing.assert_close(found.diagonal(), torch.ones(2, dtype=torch.float64))
    y = y.nan_to_num(0.0, 0.0)  # y is there throughout
    expected = mf.collapse.similarity([x[:9], y[:9]], measure=measure)[0, 1]
    torch.testing.assert_close(mf.collapse.similarity({"x": x, "y": y}, {"x": has_x}, measure)[0, 1], expected)


def test_cosines():
    x, y = torch.randn(10, 3), torch.randn(10, 3)
    found = mf.collapse.similarity([x, y, torch.zeros(10, 3)], measure="cosine")
    assert found[0, 1] == pytest.approx(float(F.cosine_similarity(x.double(), y.double()).mean()), rel=1e-12)
    assert found[0, 2] == found[2, 2] == 0 and found[0, 0] == pytest.approx(1)


@pytest.mark.parametrize("n", [64, 100, 300, 1000])
def test_similarity_of_what_one_sample_alone_has(n):
    """As of a layer where one neuron is alive, for one sample; two samples on one neuron are structure."""
    alone = torch.zeros(n, 2)
    alone[3, 0] = 1.7
    assert mf.collapse.similarity([torch.randn(n, 3), alone]).isnan().tolist() == [[False, True], [True, True]]
    alone[5, 0] = -0.4
    found = mf.collapse.similarity([alone, 3 * alone.flip(1)])
    torch.testing.assert_close(found, torch.ones(2, 2, dtype=torch.float64))


def test_similarity_that_is_not_defined():
    for n in range(5, 40):  # less its mean a constant is zero, or what rounding leaves
        x, constant = torch.randn(n, 3), torch.full((n, 2), 0.1, dtype=torch.float64)
        assert mf.collapse.similarity([x, constant]).isnan().tolist() == [[False, True], [True, True]]
        alone = torch.zeros(n, 2)
        alone[n // 2, 1] = 0.3 * n  # one sample that differs is no structure: the estimate is zero, or what rounding leaves, of either sign
        assert mf.collapse.similarity([x, alone - 7]).isnan().tolist() == [[False, True], [True, True]]
    assert mf.collapse.similarity([x[:3], x[:3]]).isnan().all()
    gone = torch.zeros(n, dtype=torch.bool)
    for measure in ("cka", "cosine"):
        assert mf.collapse.similarity([x, x], [gone, ~gone], measure).isnan().tolist() == [[True, True], [True, False]]
        assert mf.collapse.similarity([x, torch.where(x > 1, NAN, x)], measure=measure)[0, 1].isnan()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda c: c.collision_bound([]), ValueError, r"dims is \[\], expected one positive"),
        (lambda c: c.collision_probability([3, 0]), ValueError, r"dims is \[3, 0\]"),
        (lambda c: c.collision_bound([2.5]), TypeError, r"dims is \[2.5\], expected whole numbers"),
        (lambda c: c.participation([[1.0]], [1]), TypeError, "weight is a list, expected a floating-point tensor"),
        (lambda c: c.participation(torch.ones(2, 2).long(), [2]), TypeError, "weight is torch.int64"),
        (lambda c: c.participation(torch.ones(4), [4]), ValueError, r"weight has shape \(4,\), expected \[out, in\]"),
        (lambda c: c.participation(torch.ones(2, 4), [1, 2]), ValueError, r"sizes add up to 3, expected 4, the columns of weight \(2, 4\)"),
        (lambda c: c.participation(torch.ones(2, 4), [5, -1]), ValueError, r"sizes is \[5, -1\]"),
        (lambda c: c.effective_rank(torch.ones(3)), ValueError, r"x has shape \(3,\), expected \[\.\.\., N, D\]"),
        (lambda c: c.numerical_rank(3), TypeError, "x is a int, expected"),
        (lambda c: c.effective_rank(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "x is torch.complex64"),
        (lambda c: c.numerical_rank(torch.ones(2, 2), tol=1.0), ValueError, r"tol is 1.0, expected a number in \[0, 1\)"),
        (lambda c: c.numerical_rank(torch.ones(2, 2), tol=NAN), ValueError, "tol is nan"),
        (lambda c: c.similarity(torch.ones(2, 5, 3)), TypeError, "features is a Tensor, expected a list or dict of tensors"),
        (lambda c: c.similarity({}), ValueError, "features is empty"),
        (lambda c: c.similarity([torch.ones(5, 2), None]), TypeError, r"features\[1\] is a NoneType"),
        (lambda c: c.similarity({"a": torch.ones(5, 2), "b": torch.ones(4, 2)}), ValueError, r"features\[b\] has shape \(4, 2\), expected \[5, d\]"),
        (lambda c: c.similarity([torch.ones(5)]), ValueError, r"features\[0\] has shape \(5,\), expected \[N, d\]"),
        (lambda c: c.similarity([torch.ones(5, 2), torch.ones(5, 3)], measure="cosine"), ValueError, r"features\[1\] has shape \(5, 3\), expected \(5, 2\)"),
        (lambda c: c.similarity([torch.ones(5, 2)], measure="cca"), ValueError, "measure is 'cca', expected 'cka' or 'cosine'"),
        (lambda c: c.similarity({"a": torch.ones(5, 2)}, {"b": torch.ones(5).bool()}), ValueError, "present has an entry 'b', expected those of features: 'a'"),
        (lambda c: c.similarity([torch.ones(5, 2)], [torch.ones(5)]), ValueError, r"present\[0\] is torch.float32 of shape \(5,\), expected a bool tensor of shape \(5,\)"),
        (lambda c: c.similarity([torch.ones(5, 2)], [torch.ones(4).bool()]), ValueError, r"present\[0\] is torch.bool of shape \(4,\)"),
        (lambda c: c.similarity([torch.ones(5, 2)], [None]), ValueError, r"present\[0\] is a NoneType"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(mf.collapse)
