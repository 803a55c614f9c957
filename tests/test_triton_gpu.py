"""The Triton kernels on a GPU: as plain torch has it, the same bits on every run, nothing that waits for the device."""

import copy

import pytest
import torch

import mmfast as mf
from mmfast import ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or torch.xpu.is_available()) or not mf.backends()["triton"][0], reason="no GPU to test, or no Triton"
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gradients(k, shape, dtype):
    device = torch.accelerator.current_accelerator()
    return [torch.randn(shape).mul(10.0 ** float(torch.randint(-1, 2, ()))).to(dtype).to(device) for _ in range(k)]


# each is some six kernels to compile, the more rows the longer: in several processes, the longest first
@pytest.mark.parametrize(
    ("k", "dtype"), [(64, DTYPES[1]), (17, DTYPES[2]), (8, DTYPES[0]), (5, DTYPES[3]), (3, DTYPES[2]), (3, DTYPES[1]), (1, DTYPES[2])]
)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_gram_and_combine(per, k, dtype):
    for shape in [(1, 1), (7, 5000), (2, 70001), (1, 5_000_000 // k)]:
        grads = gradients(k, shape, dtype)
        mask = torch.rand(shape[0], k, device=grads[0].device) < 0.7
        for m in (None, mask, mask[0]):
            G = ops.gram(grads, per, mask=m, backend="triton")
            exact = ops.gram([g.double() for g in grads], per, mask=m, backend="reference")
            size = exact.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-30)
            scale = size.unsqueeze(-1) * size.unsqueeze(-2)
            limit = 1e-13 if dtype == torch.float64 else 2e-6
            assert ((G - exact).abs() / scale).max() < limit, (shape, per)
            assert torch.equal(G, ops.gram(grads, per, mask=m, backend="triton"))
        w = torch.randn((shape[0], k) if per == "sample" else (k,), dtype=torch.float64, device=grads[0].device)
        out, expected = (ops.combine(grads, w, per, backend=backend) for backend in ("triton", "reference"))
        bound = sum(g.double().abs() for g in grads).max().item() * w.abs().max().item() * torch.finfo(dtype).eps * 4
        torch.testing.assert_close(out, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_and_strided_gradients(dtype):
    pool = torch.stack(gradients(3, (2, 5001), dtype))
    for cut in (
        lambda t: t[:, 1:],
        lambda t: t[:, ::2],
        lambda t: t.T,
        lambda t: t[:1].expand(2, 5001),
        lambda t: t[:, :0],
        lambda t: t[0, 3:],
    ):
        grads = [cut(t) for t in pool]
        found, copied = ops.gram(grads, backend="triton"), ops.gram([g.clone().contiguous() for g in grads], backend="triton")
        torch.testing.assert_close(
            found, copied, rtol=0, atol=1e-5 * copied.abs().max().item() if copied.numel() else 0
        )  # lanes meet in other trees


def test_capture_and_replay():
    """Hyper-parameters travel with the launch; the random stream moves on with every replay."""
    if not torch.cuda.is_available():
        pytest.skip("a CUDA graph")
    grads = gradients(4, (2, 9000), torch.float32)
    for make in (mf.PCGrad, mf.CAGrad, mf.UPGrad, mf.GradDrop):
        rule, eager = make().cuda(), make().cuda()
        eager.load_state_dict(rule.state_dict())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mf.resolve(grads, rule, backend="triton")
        torch.cuda.current_stream().wait_stream(side)
        mf.resolve(grads, eager, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mf.resolve(grads, rule, backend="triton")
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, mf.resolve(grads, eager, backend="triton"))


def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    grads = [g.to("cuda:1") for g in gradients(3, (2, 900), torch.float32)]
    torch.testing.assert_close(
        mf.resolve(grads, mf.MGDA(), backend="triton"), mf.resolve(grads, mf.MGDA(), backend="reference"), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("make", [mf.MGDA, mf.UPGrad, mf.PCGrad, mf.GradVac, mf.Mean, mf.Random, mf.GradDrop, lambda: mf.TrimmedMean(1)])
def test_resolve_as_plain_torch_has_it(make, per):
    for norm, mask in ((False, None), (True, torch.tensor([True, False, True, True, True]).to(torch.accelerator.current_accelerator()))):
        grads = gradients(4, (6, 700), torch.float32)
        one = make().to(grads[0].device)
        two = copy.deepcopy(one)
        for _ in range(2):
            ours = mf.resolve([*grads, None], one, per, mask, preserve_norm=norm, backend="triton")
            theirs = mf.resolve([*grads, None], two, per, mask, preserve_norm=norm, backend="reference")
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_graddrop_has_the_bits_of_plain_torch():
    for k in (2, 5, 12):
        grads = gradients(k, (3, 10_007), torch.float32)
        one = mf.GradDrop(0.25).to(grads[0].device)
        two = copy.deepcopy(one)
        kept, expected = mf.resolve(grads, one, backend="triton"), mf.resolve(grads, two, backend="reference")
        torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6) if k > 8 else None
        assert k > 8 or torch.equal(kept, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_nothing_waits_for_the_device():
    """A capture in global mode ends in an error where anything waits, copies from the host or allocates past torch."""
    grads = gradients(3, (4, 9000), torch.float32)
    rules = [mf.MGDA(), mf.Mean(), mf.GradDrop().cuda(), mf.TrimmedMean(1)]
    for per in ("batch", "sample", "batch_sum"):
        for rule in rules if per != "sample" else rules[:2]:
            mf.resolve(grads, rule, per, backend="triton")  # compiled
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="global"):
                mf.resolve(grads, rule, per, backend="triton")


def test_more_than_two_to_the_31_elements():
    n, device = 2**31 + 17, torch.accelerator.current_accelerator()
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip("too little memory")
    g = torch.zeros(n, dtype=torch.float16, device=device)
    g[-1] = 3
    assert ops.gram([g], backend="triton").item() == 9
    out = ops.combine([g], torch.tensor([2.0], device=device), backend="triton")
    assert out[-1] == 6 and not out[:-1].any()
