"""The operators against float64: shapes, dtypes, granularities, masks, strides, threads, instruction sets."""

import copy

import numpy as np
import pytest
import torch
from block_model import ByLength
from rule_table import RULES
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast as mf
from mmfast.backends import reference
from mmfast.resolvers.elementwise import GradDrop, TrimmedMean
from mmfast.resolvers.simple import Constant, Mean, Random, Sum

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# 1; around one step (16); around one chain (512); around one chunk (4096); several chunks; primes
LENGTHS = [1, 15, 16, 17, 511, 512, 513, 4095, 4096, 4097, 12289, 70001]
COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 50, 64, 65, 130, 256]


def make(k, shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(k)]


def exact_gram(grads):
    """In float64, for float64 gradients in the processor's longer doubles."""
    J = torch.stack([g.flatten() for g in grads])
    if J.dtype != torch.float64:
        return J.double() @ J.double().mT
    long = J.numpy().astype(np.longdouble)
    return torch.from_numpy((long @ long.T).astype(np.float64))


def exact_combine(grads, w):
    J = torch.stack(grads)
    if J.dtype != torch.float64:
        return w @ J.double()
    return torch.from_numpy((w.numpy().astype(np.longdouble) @ J.numpy().astype(np.longdouble)).astype(np.float64))


def worst(value, exact, scale):
    return ((value.double() - exact).abs() / scale).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COUNTS)
def test_gram_accuracy(k, dtype):
    """At most twice the error of torch's product in the accumulating precision, for every length."""
    for n in LENGTHS if k < 50 else [1, 17, 513, 4097] if k < 100 else [1, 17, 513]:
        grads = make(k, n, dtype)
        exact = exact_gram(grads)
        size = exact.diagonal().sqrt()
        scale = torch.outer(size, size)
        J = torch.stack(grads).to(torch.float64 if dtype == torch.float64 else torch.float32)
        eps = torch.finfo(J.dtype).eps
        assert worst(mf.gram(grads), exact, scale) <= 2 * worst(J @ J.mT, exact, scale) + eps, n
        assert torch.equal(mf.gram(grads), mf.gram(grads).mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", COUNTS)
def test_combine_accuracy(k, dtype):
    for n in LENGTHS if k < 50 else [1, 17, 513, 4097]:
        grads, w = make(k, n, dtype), torch.randn(k, dtype=torch.float64)
        J = torch.stack(grads).double()
        exact = exact_combine(grads, w)
        scale = w.abs() @ J.abs() + 1e-300
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        same = (w.to(accumulator) @ J.to(accumulator)).to(dtype)
        out = mf.combine(grads, w)
        assert out.dtype == dtype and out.shape == (n,)
        assert worst(out, exact, scale) <= 2 * worst(same, exact, scale) + torch.finfo(dtype).eps, n


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("masked", [None, "row", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_granularities_and_masks_against_float64(per, masked, dtype):
    for k, batch, inner in [(1, 3, 5), (3, 7, 50), (5, 1, 600), (9, 20, 33), (50, 4, 17)]:
        grads = make(k, (batch, inner), dtype)
        mask = None
        if masked == "row":
            mask = torch.rand(k) < 0.7
        elif masked == "sample":
            mask = torch.rand(batch, k) < 0.7
        exact = [g.double() for g in grads]
        if mask is not None:
            for i in range(k):
                keep = mask[i] if mask.dim() == 1 else mask[:, i : i + 1]
                exact[i] = torch.where(keep, exact[i], 0)
                grads[i] = torch.where(keep, grads[i], torch.nan)  # what is masked is never read
        J = torch.stack(exact, 1)  # [B, K, M]
        if per == "sample":
            G = J @ J.mT
        elif per == "batch":
            G = (J @ J.mT).sum(0)
        else:
            G = J.sum(0) @ J.sum(0).mT
        torch.testing.assert_close(mf.gram(grads, per, mask=mask), G, rtol=1e-5, atol=1e-5 * inner * batch)
        torch.testing.assert_close(reference.gram(grads, [], mask, per), G, rtol=1e-5, atol=1e-5 * inner * batch)
        w = torch.arange(1.0, k + 1, dtype=torch.float64)
        rule = Constant(w.tolist())
        for backend in ("auto", "reference"):
            out = mf.resolve(grads, rule, per, mask, backend=backend)
            exact_out = torch.einsum("k,bkm->bm", w, J)
            torch.testing.assert_close(out.double(), exact_out, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", [Sum(), Mean(), Random(), GradDrop(), GradDrop(0.3), TrimmedMean(1)], ids=repr)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_compiled_equals_reference(rule, per):
    for k, shape in [(3, (5, 7)), (4, (2, 3, 100)), (8, (3, 5000)), (17, (4, 130))]:
        for mask in (None, torch.rand(k) < 0.8, torch.rand(shape[0], k) < 0.8):
            grads = make(k, shape)
            grads[1] = torch.zeros_like(grads[1])
            ours, theirs = copy.deepcopy(rule), copy.deepcopy(rule)
            for _ in range(2):
                a = mf.resolve(grads, ours, per, mask)
                torch.testing.assert_close(a, mf.resolve(grads, theirs, per, mask, backend="reference"), rtol=1e-5, atol=1e-5)


def test_graddrop_decides_alike_everywhere():
    """The same draws and the same comparisons: bit-equal results, element by element."""
    grads = make(5, 10007)
    rule = GradDrop()
    a = mf.resolve(grads, copy.deepcopy(rule))
    assert torch.equal(a, mf.resolve(grads, copy.deepcopy(rule), backend="reference"))
    first = mf.resolve(grads, rule)
    assert torch.equal(a, first) and not torch.equal(a, mf.resolve(grads, rule))  # the stream moves on


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_strided_expanded_and_empty(per):
    base = make(3, (6, 4, 10))
    plain = mf.resolve(base, Sum(), per)
    channels = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in base]
    assert torch.equal(mf.resolve(channels, Sum(), per), plain)
    every_other = [torch.stack([g, g], -1)[..., 0] for g in base]
    assert torch.equal(mf.gram(every_other, per), mf.gram(base, per))
    one = torch.ones(1).expand(6, 4, 10)
    assert mf.resolve([one, one], Sum(), per).eq(2).all()
    for shape in ((0,), (0, 5), (5, 0)):
        empty = [torch.empty(shape) for _ in range(3)]
        assert mf.resolve(empty, Mean(), per).shape == shape
        assert mf.gram(empty, per).eq(0).all()


def test_missing_gradients():
    grads = make(3, (5, 8))
    grads[1] = None
    expected = mf.resolve([grads[0], grads[2]], Mean())
    for backend in ("auto", "reference"):
        assert torch.equal(mf.resolve(grads, Mean(), backend=backend), expected)
        zero = [grads[0], torch.zeros(5, 8), grads[2]]
        torch.testing.assert_close(mf.resolve(zero, Mean(), backend=backend), expected)


@pytest.mark.parametrize("threads", [2, 4])
def test_same_bits_for_every_thread_count(threads):
    before = torch.get_num_threads()
    try:
        for k, shape in [(3, (1, 200003)), (9, (300, 700)), (70, (64, 257))]:
            grads = make(k, shape)
            mask = torch.rand(shape[0], k) < 0.9
            results = []
            for count in (1, threads):
                torch.set_num_threads(count)
                torch.manual_seed(1)
                results.append(
                    [mf.gram(grads, per, mask=m) for per in ("batch", "sample", "batch_sum") for m in (None, mask)]
                    + [mf.resolve(grads, rule, mask=m) for rule in (Random(), GradDrop(), TrimmedMean(1)) for m in (None, mask)]
                )
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


def test_non_finite_gradients_stay_visible():
    for bad in (torch.nan, torch.inf):
        for rule in (Sum(), Mean(), Random(), GradDrop(), TrimmedMean(1)):
            for k, n in [(3, 50), (8, 5000)]:
                grads = make(k, n)
                grads[1][n // 2] = bad
                assert not mf.resolve(grads, copy.deepcopy(rule)).isfinite().all(), rule
                assert not mf.resolve(grads, copy.deepcopy(rule), backend="reference").isfinite().all(), rule


class Shortest(mf.Resolver):
    """A user's rule: the shortest gradient alone."""

    def forward(self, G, mask=None):
        norms = G.diagonal(dim1=-2, dim2=-1)
        if mask is not None:
            norms = torch.where(mask, norms, torch.inf)
        return torch.nn.functional.one_hot(norms.argmin(-1), G.shape[-1]).double()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_users_own_resolver(backend):
    grads = [torch.full((2, 4), 3.0), torch.full((2, 4), 1.0), torch.full((2, 4), 2.0)]
    assert torch.equal(mf.resolve(grads, Shortest(), backend=backend), grads[1])
    assert torch.equal(mf.resolve([grads[0], None, grads[2]], Shortest(), backend=backend), grads[2])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    assert torch.equal(mf.resolve(grads, Shortest(), "sample", mask, backend=backend), torch.tensor([[1.0] * 4, [2.0] * 4]))
    torch.testing.assert_close(mf.resolve(grads, Shortest(), preserve_norm=True, backend=backend), torch.full((2, 4), 6.0))


class Wrong(mf.Resolver):
    def forward(self, G, mask=None):
        return G


@pytest.mark.parametrize(
    "call, error, words",
    [
        (
            lambda: mf.gram([torch.ones(4, 8), torch.ones(4, 16)]),
            ValueError,
            r"grads\[1\] has shape \(4, 16\), expected \(4, 8\) like grads\[0\]",
        ),
        (
            lambda: mf.gram([torch.ones(4), torch.ones(4, dtype=torch.float64)]),
            TypeError,
            r"grads\[1\] is torch.float64, expected torch.float32",
        ),
        (lambda: mf.gram([torch.ones(4), torch.ones(4, device="meta")]), ValueError, r"grads\[1\] is on meta, expected cpu"),
        (lambda: mf.resolve([torch.ones(4, dtype=torch.int32)], Sum()), TypeError, r"grads\[0\] is torch.int32"),
        (lambda: mf.resolve([torch.ones(4), 3.0], Sum()), TypeError, r"grads\[1\] is a float"),
        (lambda: mf.gram([]), ValueError, r"grads holds 0 gradients, expected 1 to 4096"),
        (lambda: mf.gram([torch.ones(1)] * 4097), ValueError, r"grads holds 4097 gradients"),
        (lambda: mf.resolve([None, None], Sum()), ValueError, r"all 2 gradients are missing"),
        (lambda: mf.resolve([torch.ones(4)], Sum(), "samples"), ValueError, r"per is 'samples', expected one of 'batch'"),
        (lambda: mf.resolve([torch.ones(())], Sum(), "sample"), ValueError, r"needs gradients with a leading batch dimension"),
        (
            lambda: mf.resolve([torch.ones(4)] * 2, Sum(), mask=torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"mask has shape \(3,\), expected \(2,\) or \(4, 2\)",
        ),
        (lambda: mf.resolve([torch.ones(4)] * 2, Sum(), mask=torch.ones(2)), TypeError, r"mask is torch.float32, expected torch.bool"),
        (lambda: mf.resolve([torch.ones(4)] * 2, Constant([1, 2, 3])), ValueError, r"weights has 3 numbers, expected 2"),
        (lambda: Constant([1, float("nan")]), ValueError, r"weights\[1\] is nan"),
        (lambda: mf.resolve([torch.ones(4)] * 2, TrimmedMean(1)), ValueError, r"trim is 1, which leaves none of 2 gradients"),
        (lambda: mf.weights(torch.ones(2, 2), GradDrop()), TypeError, r"GradDrop works on gradients element by element"),
        (lambda: mf.weights(torch.ones(2, 3), Sum()), ValueError, r"G has shape \(2, 3\), expected \[..., K, K\]"),
        (lambda: mf.resolve([torch.ones(4)] * 2, Wrong()), ValueError, r"Wrong returned \(2, 2\) .* expected weights of shape \(2,\)"),
        (lambda: mf.combine([torch.ones(4)] * 2, torch.ones(3)), ValueError, r"w is \(3,\), expected a tensor of shape \(2,\)"),
        (lambda: mf.resolve([torch.ones(4)], Sum(), backend="gpu"), ValueError, r"backend is 'gpu', expected one of 'auto'"),
        (lambda: GradDrop(2.0), ValueError, r"leak is 2.0, expected a number from 0 to 1"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_sample_of_zeros_is_missing_to_elementwise_rules_too():
    """per="sample" with the norm kept: each sample is resolved as if it were alone."""
    grads = make(4, (3, 6))
    grads[2][1] = 0
    for backend in ("auto", "reference"):
        out = mf.resolve(grads, TrimmedMean(1), "sample", preserve_norm=True, backend=backend)
        for b in range(3):
            alone = mf.resolve([g[b] for g in grads], TrimmedMean(1), preserve_norm=True, backend=backend)
            torch.testing.assert_close(out[b], alone)


def test_a_mask_elsewhere_is_refused():
    with pytest.raises(ValueError, match="mask is on meta, expected cpu"):
        mf.gram(make(2, 4), mask=torch.ones(2, dtype=torch.bool, device="meta"))


def test_a_checkpoint_from_before_the_first_step_loads():
    fresh, used = mf.GradVac(), mf.GradVac()
    mf.resolve(make(3, 8), used)
    used.load_state_dict(fresh.state_dict())
    assert used.state is None
    again = mf.GradVac()
    mf.resolve(make(3, 8), used)
    again.load_state_dict(used.state_dict())
    assert torch.equal(again.state, used.state)


class HostCopies(TorchDispatchMode):
    """Raises where a tensor is made from Python's data, or a number read from one: what waits for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default):
            raise AssertionError(f"{function} would wait for the device")
        return function(*args, **(kwargs or {}))


PREFERRING = [mf.UPGrad, mf.DualProj, mf.ConFIG, lambda pref: mf.AlignedMTL("rmse", pref)]
MAKERS = {name: (row.make, max(4, row.min_k + 1)) for name, row in RULES.items()}  # one is missing
MAKERS |= {f"pref {i}": (lambda k, make=make: make(pref=[i + 1.0 for i in range(k)]), 4) for i, make in enumerate(PREFERRING)}
MAKERS |= {"TrimmedMean": (lambda k: TrimmedMean(1), 4), "GradDrop": (lambda k: GradDrop(0.1), 4), "own": (lambda k: ByLength(), 4)}


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("name", MAKERS)
def test_plain_torch_copies_nothing_from_the_host(name, per):
    make_rule, k = MAKERS[name]
    rule, grads = make_rule(k), make(k, (5, 7))
    grads[1] = None
    mf.resolve(grads, copy.deepcopy(rule), per, backend="reference")  # makes what is made once, as before a capture
    for mask in (None, torch.rand(5, k) < 0.9):
        expected = mf.resolve(grads, copy.deepcopy(rule), per, mask, preserve_norm=True)
        with HostCopies():
            found = mf.resolve(grads, copy.deepcopy(rule), per, mask, preserve_norm=True, backend="reference")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
