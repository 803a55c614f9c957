"""The Triton kernels, interpreted on the CPU: against plain torch and float64, at every boundary, with what must not be read poisoned.

tests/test_triton.py runs this file in a process of its own, for Triton reads TRITON_INTERPRET where it is imported first.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import LONG
from interpreter import poison, quiet  # noqa: F401

import mmfast as mf
from mmfast import ops
from mmfast.backends.triton import gram, rows
from mmfast.backends.triton.gram import slots_of

assert rows.INTERPRETED, "TRITON_INTERPRET must be 1"

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def make(k, shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(k)]


def tolerance(dtype):
    return {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]


def assert_gram(grads, per="batch", mask=None):
    """At most twice the error of torch's product in the accumulating precision."""
    G = mf.gram(grads, per, mask=mask, backend="triton")
    J = torch.stack([g.reshape(-1) for g in grads])
    wide = torch.float64 if J.dtype == torch.float64 else torch.float32
    long = J.double().numpy().astype(np.longdouble)
    exact, same = torch.from_numpy((long @ long.T).astype(np.float64)), (J.to(wide) @ J.to(wide).T).double()
    norms = exact.diagonal().sqrt().clamp_min(1e-300)
    scale = norms.outer(norms)
    eps = torch.finfo(wide).eps
    assert ((G - exact) / scale).abs().max() <= 2 * ((same - exact) / scale).abs().max() + 4 * eps
    assert torch.equal(G, G.T)


def assert_combine(grads, per="batch"):
    w = torch.randn((grads[0].shape[0], len(grads)) if per == "sample" else len(grads), dtype=torch.float64)
    out = mf.combine(grads, w, per, backend="triton")
    expected = mf.combine(grads, w, per, backend="reference")
    scale = sum(g.double().abs() for g in grads).max().item() * w.abs().max().item() if grads[0].numel() else 1
    assert out.shape == expected.shape and out.dtype == expected.dtype and out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=tolerance(out.dtype), atol=tolerance(out.dtype) * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_gram_and_combine_at_every_boundary(k, dtype):
    for n in [1, 31, 1025, 4095, 4096, 4097, 8193] if k in (2, 3) else [7, 4097]:
        grads = make(k, n, dtype)
        assert_gram(grads)
        assert_combine(grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [17, 64])
def test_many_rows_are_a_product_of_matrices(k, dtype):
    for n in [1, 4097] if k == 17 and dtype == torch.float32 else [33]:
        grads = make(k, n, dtype)
        assert_gram(grads)
        assert_combine(grads)


def test_several_chunks_to_a_slot(monkeypatch):
    """A chunk of 4096 elements, 1024 slots: as many as that are not interpreted, so a slot is made longer here."""
    assert slots_of(0, 3) == (0, 1) and slots_of(4096, 3) == (1, 1) and slots_of(4097, 3) == (2, 1)
    for k, most in ((8, 1024), (9, 512), (64, 256)):
        for n in (4096 * most, 4096 * most + 1, 2**31 + 5, 2**40):
            slots, each = slots_of(n, k)
            assert slots <= most and slots * each * 4096 >= n > (slots - 1) * each * 4096
    monkeypatch.setattr(gram, "slots_of", lambda n, k: (-(-n // 12288), 3))
    for k in (2, 9):
        assert_gram(make(k, 3 * 4096 + 4097))
        assert_gram(make(k, 6 * 4096))


@pytest.mark.parametrize("k", [1, 3, 8, 9])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_granularities_and_masks(k, per):
    """What a mask hides may hold anything."""
    for shape in [(3, 50), (2, 4097)] if k == 3 else [(3, 20)]:
        for mask in (None, torch.arange(k) % 3 != 1, torch.rand(shape[0], k) < 0.7):
            grads = make(k, shape)
            if mask is not None:
                hidden = ~mask if mask.dim() == 2 else (~mask).expand(shape[0], k)
                for i in range(k):
                    grads[i][hidden[:, i]] = torch.nan
            G = mf.gram(grads, per, mask=mask, backend="triton")
            torch.testing.assert_close(G, mf.gram(grads, per, mask=mask, backend="reference"), rtol=1e-5, atol=1e-3)
            norm = per == "sample"
            out = mf.resolve(grads, mf.PCGrad(order="fixed"), per, mask, preserve_norm=norm, backend="triton")
            expected = mf.resolve(grads, mf.PCGrad(order="fixed"), per, mask, preserve_norm=norm, backend="reference")
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_unaligned_expanded_and_empty(dtype):
    pool = torch.randn(3, 2, 5001).to(dtype)
    for cut in (lambda t: t[0, 1:], lambda t: t[:, ::2], lambda t: t[:, :70].T, lambda t: t[:1, :99].expand(2, 99)):
        grads = [cut(t) for t in pool]
        assert_gram(grads)
        assert_combine(grads)
        assert_combine(grads, "sample") if grads[0].dim() == 2 and grads[0].shape[0] == 2 else None
    for shape in ((0,), (0, 5), (5, 0)):
        grads = make(3, shape, dtype)
        for per in ("batch", "sample", "batch_sum"):
            assert mf.gram(grads, per, backend="triton").eq(0).all()
            for rule in (mf.MGDA(), mf.Mean(), mf.GradDrop(), mf.TrimmedMean(1)):
                assert mf.resolve(grads, rule, per, backend="triton").shape == shape
    assert mf.gram(make(2, ()), backend="triton").shape == (2, 2)


def test_missing_gradients_stand_at_their_places():
    grads = make(4, (3, 70))
    holes = [None, grads[0], grads[1], None, grads[2], None]
    mask = torch.tensor([True, True, False, True, True, True])
    for rule in (mf.MGDA(), mf.Mean(), mf.TrimmedMean(1), mf.GradDrop(), mf.Constant([1, 2, 3, 4, 5, 6])):
        for m, per in ((None, "batch"), (mask, "sample"), (mask.expand(3, 6), "batch"), (mask.expand(3, 6), "batch_sum")):
            if m is None or not isinstance(rule, mf.GradDrop):
                out = mf.resolve(holes, copy.deepcopy(rule), per, m, backend="triton")
                expected = mf.resolve(holes, copy.deepcopy(rule), per, m, backend="reference")
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    _, info = ops.resolve_info(holes, mf.MGDA(), backend="triton")
    _, expected = ops.resolve_info(holes, mf.MGDA(), backend="reference")
    torch.testing.assert_close(info, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make_rule", [mf.PCGrad, mf.GradVac, mf.GradNorm, lambda: mf.CRMOGM(mf.MGDA()), lambda: mf.Random()])
def test_state_and_random_stream_move_on(make_rule):
    ours = make_rule()
    theirs = copy.deepcopy(ours)
    for _ in range(3):
        grads = make(3, 300)
        out = mf.resolve(grads, ours, preserve_norm=True, backend="triton")
        torch.testing.assert_close(out, mf.resolve(grads, theirs, preserve_norm=True, backend="reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 9])
@pytest.mark.parametrize("each", [False, True])
def test_graddrop_decides_alike(k, dtype, each):
    """The same draws and comparisons: bit-equal results, element by element, in every sample, at every call."""
    ours = mf.GradDrop([0.1 * i for i in range(k)] if each else 0.25)
    theirs = copy.deepcopy(ours)
    for mask in (None, torch.rand(3, k) < 0.8):
        grads = make(k, (3, 700), dtype)
        grads[0][:, 5] = 0
        out = mf.resolve(grads, ours, mask=mask, backend="triton")
        assert torch.equal(out, mf.resolve(grads, theirs, mask=mask, backend="reference"))
    assert ours.rng[1] == theirs.rng[1] == 2


@pytest.mark.parametrize("k, trim", [(3, 1), (8, 2), (8, 0), (13, 6)])
def test_trimmed_mean(k, trim):
    for mask in (None, torch.arange(k) != 1, torch.rand(3, k) < 0.7):
        grads = make(k, (3, 90))
        grads[0] = torch.zeros_like(grads[0])
        grads[2] = grads[-1].clone()  # equal values
        out = mf.resolve(grads, mf.TrimmedMean(trim), mask=mask, backend="triton")
        torch.testing.assert_close(out, mf.resolve(grads, mf.TrimmedMean(trim), mask=mask, backend="reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_non_finite_gradients_stay_visible(bad):
    for n in (50, 4100):
        grads = make(3, n)
        grads[1][n // 2] = bad
        G, expected = (mf.gram(grads, backend=backend) for backend in ("triton", "reference"))
        torch.testing.assert_close(G, expected, rtol=1e-5, atol=1e-3, equal_nan=True)
        for rule in (mf.MGDA(), mf.Mean(), mf.GradDrop(), mf.TrimmedMean(1)):
            assert not mf.resolve(grads, rule, backend="triton").isfinite().all(), rule
        mask = torch.tensor([True, False, True])
        assert mf.resolve(grads, mf.MGDA(), mask=mask, backend="triton").isfinite().all()
    grads = make(3, 50)
    grads[1][3] = bad
    assert not mf.combine(grads, torch.tensor([1.0, 0.0, 1.0]), backend="triton").isfinite().all()  # asked to be read


def test_rows_of_weight_zero_are_not_read():
    """Poisoned after the Gramian was taken."""
    from mmfast.backends.triton.combine import combine

    grads = make(3, 200)
    held = rows.rows_of(grads)
    grads[1].fill_(torch.nan)
    w = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(combine(held, None, w, False, True), grads[0] + 2 * grads[2])


def test_a_users_own_resolver():
    class Shortest(mf.Resolver):
        def forward(self, G, mask=None):
            squares = G.diagonal(dim1=-2, dim2=-1)
            return torch.nn.functional.one_hot(torch.where(mask, squares, torch.inf).argmin(-1), G.shape[-1]).double()

    grads = [torch.full((2, 4), 3.0), None, torch.full((2, 4), 1.0), torch.full((2, 4), 2.0)]
    assert torch.equal(mf.resolve(grads, Shortest(), backend="triton"), grads[2])
    assert torch.equal(mf.resolve(grads, Shortest(), "sample", backend="triton"), grads[2])


def test_the_same_bits_again():
    for k, shape in ((3, (2, 5000)), (9, (3, 100))):
        grads = make(k, shape)
        for per in ("batch", "sample", "batch_sum"):
            assert torch.equal(mf.gram(grads, per, backend="triton"), mf.gram([g.clone() for g in grads], per, backend="triton"))


def test_a_sample_has_the_gramian_that_it_has_alone():
    grads = make(3, (3, 5000))
    G = mf.gram(grads, "sample", backend="triton")
    for b in range(3):
        assert torch.equal(G[b], mf.gram([g[b] for g in grads], backend="triton"))


def test_more_than_64_gradients_run_in_plain_torch():
    grads = make(65, 20)
    assert torch.equal(mf.gram(grads, backend="triton"), mf.gram(grads, backend="reference"))
    assert mf.explain(grads, mf.MGDA(), backend="triton").backend == "reference"
    out = mf.resolve(grads, mf.TrimmedMean(3), backend="triton")
    assert torch.equal(out, mf.resolve(grads, mf.TrimmedMean(3), backend="reference"))


def test_explain():
    found = mf.explain(make(3, 1000), mf.MGDA(), backend="triton")
    assert found.backend == "triton" and (found.read, found.written) == (24000, 4000)
    assert "plain torch" not in found.path and mf.explain(make(3, 1000), mf.MGDA()).backend != "triton"
    assert "plain torch" in mf.explain(make(3, 1000), mf.GradVac(), backend="triton").path


@pytest.mark.skipif(not LONG, reason="make long runs it")
def test_under_torch_compile():
    grads = make(3, 100)
    for make_rule in (mf.MGDA, mf.Mean, mf.GradDrop):
        one = make_rule()
        two = copy.deepcopy(one)
        step = torch.compile(lambda *g, rule=one: mf.resolve(g, rule, backend="triton"), fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(step(*grads), mf.resolve(grads, two, backend="triton"))
