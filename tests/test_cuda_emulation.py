"""The CUDA kernels' own code, run on the CPU thread by thread: it sums in the very order of the CPU operators."""

import pytest
import torch
from problems import gramian
from rule_table import RULES

from mmfast import ops
from mmfast.backends import library

host = pytest.importorskip("mmfast._host", reason="MMFAST_HOST=1 was not set when mmfast was built", exc_type=ImportError)
pytestmark = pytest.mark.skipif(not library.available, reason=f"nothing compiled to compare with: {library.missing_reason}")

DTYPES = [torch.float32, torch.float64, torch.float16]
# around one step (16 or 8), one chain (512 or 256), one chunk (4096); several chunks
LENGTHS = [1, 17, 255, 513, 4095, 4096, 4097, 12289]


def gradients(k, batch, inner, dtype):
    return [torch.randn(batch, inner, dtype=dtype) * 10.0 ** torch.randint(-3, 3, ()) for _ in range(k)]


def arrays(grads):
    return [g.numpy() for g in grads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 29])
def test_gram_has_the_bits_of_the_cpu(k, dtype):
    """Every tile shape, alone and beside others; what a tile does not write is NaN."""
    for n in LENGTHS if k < 9 else (255, 4097):
        grads = gradients(k, 1, n, dtype)
        assert torch.equal(torch.from_numpy(host.gpu_gram(arrays(grads)))[0], ops.gram(grads)), n


def test_a_masked_row_has_no_product_with_an_infinite_one():
    grads, mask = [torch.full((1, 4), x) for x in (1.0, torch.inf, torch.nan)], torch.tensor([False, True, True])
    G = torch.from_numpy(host.gpu_gram(arrays(grads), mask.numpy()))[0]
    assert torch.equal(G.nan_to_num(nan=-1.0), ops.gram(grads, mask=mask).nan_to_num(nan=-1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_many_chunks(dtype):
    """More chunks than slots, so that a slot sums several of them."""
    grads = gradients(2, 1, 4096 * 1100 + 3, dtype)
    assert torch.equal(torch.from_numpy(host.gpu_gram(arrays(grads)))[0], ops.gram(grads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 5, 300, 5000])
@pytest.mark.parametrize("k", [3, 10])
def test_gram_of_samples_and_masks(k, inner, dtype):
    """Per sample, masked rows, masked samples of rows; what a mask hides is not read."""
    batch = 7
    grads = gradients(k, batch, inner, dtype)
    assert torch.equal(torch.from_numpy(host.gpu_gram(arrays(grads), per_sample=True)), ops.gram(grads, per="sample"))
    mask = torch.rand(batch, k) < 0.6
    for row, present in zip(grads, mask.T, strict=True):
        row[~present] = torch.nan
    for per in ("batch", "sample"):
        ours = torch.from_numpy(host.gpu_gram(arrays(grads), mask.numpy(), per == "sample"))
        assert torch.equal(ours if per == "sample" else ours[0], ops.gram(grads, per=per, mask=mask))
    rows = torch.arange(k) % 3 != 1
    for row, present in zip(grads, rows, strict=True):
        row[:] = 1.5 if present else torch.nan
    assert torch.equal(torch.from_numpy(host.gpu_gram(arrays(grads), rows.numpy()))[0], ops.gram(grads, mask=rows))


def test_gram_of_more_samples_than_slots():
    grads = gradients(3, 1300, 2, torch.float32)
    mask = torch.rand(1300, 3) < 0.7
    assert torch.equal(torch.from_numpy(host.gpu_gram(arrays(grads), mask.numpy()))[0], ops.gram(grads, mask=mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 8, 9, 20])
def test_combine_has_the_bits_of_the_cpu(k, dtype):
    grads = gradients(k, 5, 77, dtype)
    for per in ("batch", "sample"):
        w = torch.randn(*((5, k) if per == "sample" else (k,)), dtype=torch.float64)
        w[..., 0] = 0
        ours = torch.from_numpy(host.gpu_combine(arrays(grads), w.numpy(), per_sample=per == "sample"))
        assert torch.equal(ours, ops.combine(grads, w, per))


def test_combine_reads_neither_masked_rows_nor_rows_of_weight_zero():
    grads = gradients(4, 3, 10, torch.float32)
    w, mask = torch.tensor([0.5, 0.0, 2.0, -1.0]).double(), torch.tensor([True, True, False, True])
    clean = torch.from_numpy(host.gpu_combine(arrays(grads), w.numpy(), mask.numpy(), skip=True))
    grads[1][:], grads[2][:] = torch.nan, torch.nan
    assert torch.equal(torch.from_numpy(host.gpu_combine(arrays(grads), w.numpy(), mask.numpy(), skip=True)), clean)
    assert torch.from_numpy(host.gpu_combine(arrays(grads), w.numpy(), mask.numpy())).isnan().all()


@pytest.mark.parametrize("name", RULES)
def test_a_team_of_32_solves_as_one_thread_does(name):
    """Weights and state, bit for bit: nobody reads what another member of the team has not finished writing."""
    row = RULES[name]
    for k in (row.min_k + 1, 7, 34):
        resolver = row.make(k)
        chain = resolver.chain()
        if chain is None:
            pytest.skip(f"{name} is not run by the compiled solver")
        steps = [n for rule in chain for n in (rule.method, len(rule.params()))]
        params = [x for rule in chain for x in rule.params()]
        mask = torch.ones(k, dtype=torch.bool)
        mask[1] = False
        one = two = None
        for counter, (rows, norm) in enumerate([(None, False), (mask, True), (None, False)]):
            G = gramian(k, seed=counter).numpy()
            more = {"mask": None if rows is None else rows.numpy(), "seed": 5, "counter": counter, "preserve_norm": norm}
            w, one = host.solve(G, steps, params, state=one, **more)
            shared, two = host.warp_solve(G, steps, params, state=two, **more)
            assert w.tolist() == shared.tolist() and one.tolist() == two.tolist(), k
