"""Linear branches as the CUDA kernels form their Gramian, run on the CPU thread by thread; and the operator itself where there is a GPU."""

import pytest
import torch

import mmfast as mf
from mmfast.backends import cuda
from mmfast.ops.heads import heads as linear_heads

DTYPES = [torch.float32, torch.float64]


def problem(batch, rows, sizes, inputs, dtype):
    """Output gradients, weights and places of linear branches; the second branch sends nothing and has weights that must not be read."""
    delta, weight = torch.randn(batch, rows, sum(sizes)).to(dtype), torch.randn(sum(sizes), inputs).to(dtype)
    head_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if len(sizes) > 2:
        delta[..., head_of == 1] = 0
        weight[head_of == 1] = torch.nan
    return delta, weight, head_of


PROBLEMS = [
    (1, 1, [1], 1),
    (3, 1, [3, 1, 7], 129),  # more inputs than a chain has rows
    (2, 65, [5, 2, 20, 6], 11),  # two squares of columns, part of a second chain
    (17, 60, [31, 1, 1, 32], 40),  # a whole square, and one more column
    (4, 128, [2] * 50, 256),  # whole chains
    (0, 3, [2, 1], 5),
    (5, 0, [2, 1], 5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PROBLEMS)
def test_gramian_has_the_bits_of_the_cpu(case, dtype):
    host = pytest.importorskip("mmfast._host", reason="MMFAST_HOST=1 was not set when mmfast was built", exc_type=ImportError)
    delta, weight, head_of = problem(*case, dtype)
    k = len(case[2])
    for per in ("batch", "sample"):
        info = linear_heads(delta, weight, head_of, mf.Mean(), k, per, None, False, "cpu")[1]
        G = host.gpu_heads(delta.numpy(), weight.numpy(), head_of.tolist(), per == "sample", torch.finfo(dtype).eps)
        assert torch.equal(torch.from_numpy(G).reshape(info[..., k:].shape), info[..., k:]), per


def test_many_chains_share_slots():
    """Then the order of the sums is another one, and nothing but rounding differs."""
    host = pytest.importorskip("mmfast._host", reason="MMFAST_HOST=1 was not set when mmfast was built", exc_type=ImportError)
    delta, weight, head_of = problem(1, 128 * 1100 + 3, [2, 1, 3], 7, torch.float32)
    info = linear_heads(delta, weight, head_of, mf.Mean(), 3, "batch", None, False, "cpu")[1]
    G = torch.from_numpy(host.gpu_heads(delta.numpy(), weight.numpy(), head_of.tolist(), False, torch.finfo(torch.float32).eps))
    torch.testing.assert_close(G.flatten(), info[3:], rtol=1e-12, atol=0)


needs_gpu = pytest.mark.skipif(cuda.why_not() is not None, reason=f"no GPU to test: {cuda.why_not()}")


def seeded(backend):
    torch.manual_seed(7)
    return mf.PCGrad() if backend == "cpu" else mf.PCGrad().cuda()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("masked", [None, "[K]", "[B, K]"])
def test_operator_on_a_gpu(masked, per, dtype):
    for case in PROBLEMS:
        delta, weight, head_of = problem(*case, dtype)
        k = len(case[2])
        mask = None if masked is None else torch.rand(k if masked == "[K]" else (case[0], k)) < 0.7
        if mask is not None:
            columns = mask[..., head_of]
            delta = torch.where(columns if masked == "[K]" else columns.unsqueeze(1), delta, torch.nan)
        results = []
        for backend, move in (("cpu", lambda t: t), ("cuda", lambda t: t.cuda())):
            rule = seeded(backend)
            out, info = linear_heads(
                move(delta), move(weight), move(head_of), rule, k, per, None if mask is None else move(mask), True, backend
            )
            results.append((out.cpu(), info.cpu()))
        (expected, expected_info), (out, info) = results
        assert torch.equal(info, expected_info), case
        eps = torch.finfo(dtype).eps
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=8 * eps, atol=64 * eps * expected.abs().amax().item() if out.numel() else 0)


@needs_gpu
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_capture_and_replay_on_a_gpu(per):
    delta, weight, head_of = (t.cuda() for t in problem(17, 60, [31, 1, 1, 32], 40, torch.float32))
    rule, eager = seeded("cuda"), seeded("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        linear_heads(delta, weight, head_of, rule, 4, per, None, True, "cuda")
    torch.cuda.current_stream().wait_stream(side)
    linear_heads(delta, weight, head_of, eager, 4, per, None, True, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, info = linear_heads(delta, weight, head_of, rule, 4, per, None, True, "cuda")
    for _ in range(3):
        graph.replay()
        expected, expected_info = linear_heads(delta, weight, head_of, eager, 4, per, None, True, "cuda")
        assert torch.equal(info, expected_info)
        torch.testing.assert_close(out, expected)
