"""gram, combine, lengths, the elementwise rules and linear branches through the kernels' PTX."""

import pytest
import torch
from test_cuda import DTYPES, gradients
from test_cuda_heads import PROBLEMS, problem

import mmfast as mf
from mmfast import ops
from mmfast.backends import compiled
from mmfast.ops.heads import heads
from ptx import device
from ptx.cases import LONG, count, twins


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 13, 29, 64] if LONG else [1, 4, 8, 13])
def test_gram_and_combine(k, dtype):
    """Every tile, around the ends of steps, chains and chunks; per sample, batch sums, masks."""
    for shape in [(1, 1), (3, 255), (1, 4097), (7, 5000), (2, 17_001)] if LONG else [(3, 255), (1, 4099)]:
        grads = gradients(k, shape, dtype)
        mask = torch.rand(shape[0], k) < 0.7
        for per in ("batch", "sample", "batch_sum"):
            for m in (None, mask, mask[0]):
                expected = ops.gram(grads, per, mask=m, backend="cpu")
                with device.serving():
                    assert torch.equal(ops.gram(grads, per, mask=m, backend="cpu"), expected), (shape, per, m)
                count()
            w = torch.randn((shape[0], k) if per == "sample" else (k,), dtype=torch.float64)
            w[..., -1] = 0
            expected = ops.combine(grads, w, per, backend="cpu")
            with device.serving():
                assert torch.equal(ops.combine(grads, w, per, backend="cpu"), expected), (shape, per)
            count()


def test_a_masked_row_has_no_product_with_an_infinite_one():
    grads, mask = [torch.full((1, 4), x) for x in (1.0, torch.inf, torch.nan)], torch.tensor([False, True, True])
    with device.serving():
        G = ops.gram(grads, mask=mask, backend="cpu")
    assert torch.equal(G.nan_to_num(nan=-1.0), ops.gram(grads, mask=mask).nan_to_num(nan=-1.0))


def test_more_samples_than_slots():
    grads, mask = gradients(3, (1300, 2), torch.float32), torch.rand(1300, 3) < 0.7
    for per, m in (("batch", mask), ("sample", None)):
        with device.serving():
            found = ops.gram(grads, per, mask=m, backend="cpu")
        assert torch.equal(found, ops.gram(grads, per, mask=m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_lengths(per, dtype):
    for k in (1, 5, 12):
        grads = gradients(k, (4, 1031), dtype)
        w = torch.randn((4, k) if per == "sample" else (k,), dtype=torch.float64)
        for mask in (None, torch.rand(4, k) < 0.7):
            found = device.functions().lengths(grads, (), mask, w, per)
            for ours, theirs in zip(found, compiled.lengths(grads, (), mask, w, per), strict=True):
                assert torch.equal(ours, theirs)
            count()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [lambda k: mf.GradDrop(leak=0.1), lambda k: mf.GradDrop(leak=[i / k for i in range(k)]), lambda k: mf.TrimmedMean(trim=1)],
                         ids=["GradDrop", "GradDrop each", "TrimmedMean"])  # fmt: skip
def test_elementwise_rules(make, dtype):
    """Sums in another order than on the CPU: within rounding."""
    for k in (3, 5, 20) if LONG else (5,):
        one, two = twins(lambda k=k: make(k))
        grads = gradients(k, (9, 333), dtype)
        mask = torch.rand(9, k) < 0.8
        for m in (None, mask, mask[0]):
            expected = mf.resolve(grads, one, mask=m, backend="cpu")
            with device.serving():
                found = mf.resolve(grads, two, mask=m, backend="cpu")
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found, expected, rtol=4 * eps, atol=4 * eps)
            count()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("masked", [None, "[K]", "[B, K]"])
def test_linear_branches(masked, per, dtype):
    """Weights and Gramian bit for bit; the matrix product behind them is torch's."""
    for case in PROBLEMS if LONG else [PROBLEMS[i] for i in (0, 1, 5)] + [(3, 17, [31, 1, 2], 12)]:
        delta, weight, head_of = problem(*case, dtype)
        k = len(case[2])
        mask = None if masked is None else torch.rand(k if masked == "[K]" else (case[0], k)) < 0.7
        if mask is not None:
            columns = mask[..., head_of]
            delta = torch.where(columns if masked == "[K]" else columns.unsqueeze(1), delta, torch.nan)
        one, two = twins(mf.PCGrad)
        for norm in (False, True):
            out, info = heads(delta, weight, head_of, one, k, per, mask, norm, "cpu")
            with device.serving():
                our_out, our_info = heads(delta, weight, head_of, two, k, per, mask, norm, "cpu")
            eps = torch.finfo(dtype).eps
            assert torch.equal(our_info, info), case
            torch.testing.assert_close(our_out, out, rtol=8 * eps, atol=64 * eps * out.abs().amax().item() if out.numel() else 0)
            count()
        assert torch.equal(one.rng, two.rng)
