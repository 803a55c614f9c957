"""What a call costs before any data is touched: N from 1 to 64, so that microseconds are Python, dispatch and the K x K problem.

    pytest benchmarks/test_overhead.py --benchmark-compare=benchmarks/results/overhead-baseline.json --benchmark-compare-fail=median:50%

The baseline is made with --benchmark-json=benchmarks/results/overhead-baseline.json on a quiet machine.
"""

import pytest
import torch

import mmfast as mf

SIZES = [(3, 1), (3, 64), (8, 64), (50, 64)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=SIZES, ids=lambda size: f"K{size[0]}-N{size[1]}")
def grads(request):
    k, n = request.param
    return [torch.randn(n) for _ in range(k)]


@pytest.fixture
def timed(benchmark, request):
    """pytest-benchmark on a fixed number of rounds, so that a slow operator doesn't take longer to measure."""
    benchmark.group = request.node.originalname.removeprefix("test_")

    def run(call):
        call()
        return benchmark.pedantic(call, rounds=100, iterations=20, warmup_rounds=10)

    return run


def test_gram(timed, grads):
    assert timed(lambda: mf.gram(grads)).shape == (len(grads), len(grads))


@pytest.mark.parametrize("rule", ["Mean", "UPGrad", "MGDA", "PCGrad", "IMTLG"])
def test_weights(timed, grads, rule):
    G, resolver = mf.gram(grads), getattr(mf, rule)()
    assert timed(lambda: mf.weights(G, resolver)).shape == (len(grads),)


def test_combine(timed, grads):
    w = torch.ones(len(grads), dtype=torch.float64)
    assert timed(lambda: mf.combine(grads, w)).shape == grads[0].shape


def test_resolve(timed, grads):
    resolver = mf.MGDA()
    assert timed(lambda: mf.resolve(grads, resolver)).shape == grads[0].shape


def test_fork(timed, grads):
    y, resolver, k = torch.zeros_like(grads[0], requires_grad=True), mf.MGDA(), len(grads)
    (d,) = timed(lambda: torch.autograd.grad(mf.fork(y, k, resolver), y, grads))
    assert d.shape == y.shape
