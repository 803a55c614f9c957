"""resolve on every path through the kernels' PTX: the bits of the CPU operators, on devices of several sizes."""

import pytest
import torch
from test_cuda import DTYPES, gradients

import mmfast as mf
from ptx import device
from ptx.cases import LONG, assert_resolved_alike, cancelling, path_taken, twins

RULES = (mf.MGDA, mf.PCGrad, mf.PCD)  # none, a random stream, a state
# what a device has, that the plan looks at
H100, FEW, A100, L4, TINY = ("H100", {}), ("H100", {"processors": 4}), ("A100", {}), ("L4", {}), ("L4", {"processors": 2})


def turns(k, shape, dtype, per="batch", samples=False):
    """(gradients, mask, preserve norm) of three calls: some rows absent or masked, sums that cancel, then all."""
    mask = torch.rand(shape[0], k + 1) < 0.8 if samples else torch.arange(k + 1) != 1
    yield [*gradients(k, shape, dtype), None], None, True
    yield [None, *cancelling(k, shape, dtype)], mask if k > 1 else None, True
    yield gradients(k + 1, shape, dtype), None, False


def one_problem(path, dtype, k, n, chip, monkeypatch, rules=RULES):
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)
    name, changes = chip
    with device.chip(name, **changes):
        for make in rules:
            one, two = twins(make, n)
            device.launched()
            for grads, mask, norm in turns(k, (1, n), dtype):
                assert_resolved_alike(one, two, grads, mask=mask, norm=norm)
                assert path_taken() == path


def rows(dtype):
    """Gradients that are there beside one more: of each kind of kernel, with up to eight places, or four of float64."""
    few = (1, 3) if dtype == torch.float64 else (1, 3, 7)
    return range(1, few[-1] + 1) if LONG else few


@pytest.mark.parametrize(("dtype", "k"), [(dtype, k) for dtype in DTYPES for k in rows(dtype)])
@pytest.mark.parametrize("path", ["two_pass", "persistent", "cluster"])
def test_one_problem(path, dtype, k, monkeypatch):
    """A part of a chunk, and a few of them; all of it is kept in shared memory."""
    for n in (1, 513, 4096, 12_289, 40_003) if LONG else (4097 + 2 * k,):
        if path != "cluster" or (k + 1) * n * dtype.itemsize <= 2**20:
            one_problem(path, dtype, k, n, H100, monkeypatch)


@pytest.mark.parametrize("chip", [FEW, A100, L4, TINY] if LONG else [TINY], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_is_kept(chip, dtype, monkeypatch):
    """More slots than blocks; what has no room in shared memory is read again."""
    for k in (1, 3) if dtype == torch.float64 else (2, 7) if LONG else (3,):
        with device.chip(chip[0], **chip[1]):
            plans = {n: device.plan(k + 1, (1, n), dtype.itemsize, mf.PCD().state_size(k + 1)) for n in range(4097, 200_000, 4096)}
            n, read = max((n, read) for n, (path, read) in plans.items() if path == "persistent")
            assert read > (k + 1) * n * dtype.itemsize or chip not in (FEW, TINY) or k == 7
        one_problem("persistent", dtype, k, n, chip, monkeypatch, RULES if LONG else (mf.PCD,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_much_as_a_cluster_keeps(dtype, monkeypatch):
    """A megabyte by sixteen blocks, of several slots each; here half of it."""
    for k in (1, 3) if LONG else (3,):
        n = 2**20 // ((k + 1) * dtype.itemsize)
        one_problem("cluster", dtype, k, n if LONG else n // 2 - 5, H100, monkeypatch, RULES if LONG else (mf.PCGrad,))


@pytest.mark.skipif(not LONG, reason="make ptx runs it")
@pytest.mark.parametrize("path", ["two_pass", "persistent"])
def test_more_chunks_than_slots(path, monkeypatch):
    """A slot sums several."""
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)
    with device.chip("H100", processors=12):
        assert_resolved_alike(mf.MGDA(), mf.MGDA(), gradients(1, (1, 4096 * 1100 + 3), torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["two_pass", "per_sample"])
def test_a_problem_for_each_sample(path, dtype, monkeypatch):
    """Samples of half a chunk, of a few, and more than are kept; more of them than blocks."""
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)
    shapes = [((1, 2048), H100), ((20, 2101), FEW), ((3, 4097), FEW), ((3, 5000), A100), ((2, 12_289), L4)]
    taken = 0
    for k in rows(dtype) if LONG else (1, 3):
        for shape, (name, changes) in shapes if LONG else shapes[1:3]:
            with device.chip(name, **changes):
                if device.plan(k + 1, shape, dtype.itemsize, mf.PCD().state_size(k + 1), "sample")[0] != "per_sample":
                    continue
                taken += 1
                for make in RULES if LONG else RULES[1:]:
                    one, two = twins(make, shape[1])
                    device.launched()
                    for grads, mask, norm in turns(k, shape, dtype, "sample", samples=True):
                        assert_resolved_alike(one, two, grads, "sample", mask, norm)
                        assert path_taken() == path
    assert taken >= 2


@pytest.mark.parametrize("overlap", ["0", "1"])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_general_kernels(per, overlap, monkeypatch):
    """More rows than a block keeps, masks for each sample, batch sums; with launches that overlap and without."""
    monkeypatch.setenv("MMFAST_CUDA_OVERLAP", overlap)
    for dtype in DTYPES:
        for k in (8, 12, 33) if LONG else (8,):
            for make in (*RULES, mf.UPGrad, mf.GradVac) if LONG else (mf.PCGrad, mf.PCD):
                one, two = twins(make)
                for grads, mask, norm in turns(k, (5, 301), dtype, per, samples=True):
                    assert_resolved_alike(one, two, grads, per, mask, norm)


def test_without_a_gramian():
    """Rules that need none: which rows are there is all that is looked at."""
    for dtype in DTYPES:
        for per in ("batch", "sample", "batch_sum"):
            grads = gradients(4, (5, 301), dtype)
            grads[1][:] = 0
            for mask in (None, torch.rand(5, 4) < 0.7, torch.arange(4) != 2):
                for rule in (mf.Sum, mf.Mean):
                    assert_resolved_alike(rule(), rule(), grads, per, mask, info=False)


def test_numbers_that_are_none(monkeypatch):
    """Infinite and NaN gradients, in rows that count and in rows that do not."""
    for path in ("two_pass", "persistent", "cluster"):
        monkeypatch.setenv("MMFAST_CUDA_PATH", path)
        for bad in (torch.inf, torch.nan):
            grads = gradients(3, (1, 301), torch.float32)
            grads[1][0, 7] = bad
            for mask in (None, torch.tensor([True, False, True])):
                for rule in (mf.MGDA, mf.IMTLG):
                    assert_resolved_alike(rule(), rule(), grads, mask=mask)
