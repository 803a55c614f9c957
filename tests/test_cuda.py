"""The compiled CUDA operators on a GPU: the bits of the CPU, the same on every run, nothing that waits for the device."""

import copy

import pytest
import torch
from problems import gramian
from rule_table import RULES

import mmfast as mf
from benchmarks.gpu.cases import auto_takes
from mmfast import ops
from mmfast.backends import cuda

pytestmark = pytest.mark.skipif(cuda.why_not() is not None, reason=f"no GPU to test: {cuda.why_not()}")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LIBM = ("Random", "NashMTL", "FairGrad", "GradNorm", "ConFIG(geometric)", "Compose")  # exp, log and pow of the GPU round differently


def gradients(k, shape, dtype):
    return [torch.randn(shape).mul(10.0 ** float(torch.randint(-1, 2, ()))).to(dtype) for _ in range(k)]


def gpu(tensors):
    return [t.cuda() for t in tensors]


def twins(make, seed=0):
    """The same resolver twice, the second on the GPU."""
    torch.manual_seed(seed)
    one = make()
    torch.manual_seed(seed)
    return one, make().cuda()


def assert_resolved_alike(one, two, grads, per, mask, norm):
    """Bit for bit, with a last gradient that is missing."""
    m = None if mask is None else mask.cuda()
    ours = mf.resolve([*gpu(grads), None], two, per, m, preserve_norm=norm, backend="cuda")
    assert torch.equal(ours.cpu(), mf.resolve([*grads, None], one, per, mask, preserve_norm=norm)), (one, grads[0].shape, mask)


def in_cluster(k, n, dtype):
    """Whether k gradients beside a missing one take that path here, with the rule that keeps most."""
    return cuda.plan(0, dtype.itemsize, k, k + 1, 1, n, mf.PCD().state_size(k + 1), 0)[0] == "cluster"


def force(path, dtype, k, monkeypatch):
    if path != "two_pass" and (k == 8 or (dtype == torch.float64 and k > 4)):  # with the missing one, nine places
        pytest.skip("the plan does not take that path")
    if path == "cluster" and not in_cluster(1, 1, torch.float32):
        pytest.skip("this device has no clusters, or the library was built for older ones")
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9, 13, 29, 64])
def test_gram_and_combine_have_the_bits_of_the_cpu(k, dtype):
    for shape in [(1, 1), (3, 255), (1, 4097), (7, 5000), (2, 70001)]:
        grads = gradients(k, shape, dtype)
        mask = torch.rand(shape[0], k) < 0.7
        for per in ("batch", "sample", "batch_sum"):
            for m in (None, mask, mask[0]):
                G = ops.gram(grads, per, mask=m)
                theirs = ops.gram(gpu(grads), per, mask=None if m is None else m.cuda(), backend="cuda")
                assert torch.equal(theirs.cpu(), G), (shape, per, m)
            w = torch.randn((shape[0], k) if per == "sample" else (k,), dtype=torch.float64)
            assert torch.equal(ops.combine(gpu(grads), w.cuda(), per, backend="cuda").cpu(), ops.combine(grads, w, per))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_and_strided_gradients(dtype):
    pool = torch.randn(3, 2, 5001).to(dtype)
    for cut in (lambda t: t[:, 1:], lambda t: t[:, ::2], lambda t: t.T, lambda t: t[:1].expand(2, 5001), lambda t: t[:, :0]):
        grads = [cut(t) for t in pool]
        assert torch.equal(ops.gram([cut(t) for t in pool.cuda()], backend="cuda").cpu(), ops.gram(grads))


@pytest.mark.parametrize("name", RULES)
def test_rules_have_the_weights_of_the_cpu(name):
    row = RULES[name]
    for k in (row.min_k, row.min_k + 3, 34):
        one, two = twins(lambda k=k: row.make(k), k)
        if one.chain() is None:
            pytest.skip(f"{name} works element by element")
        mask = torch.ones(k, dtype=torch.bool)
        mask[-1] = row.min_k == k
        for m in (None, mask, None):  # state and random stream go on
            G = torch.stack([gramian(k, seed=s) for s in range(3)])
            a = ops.weights(G, one, m)
            b = ops.weights(G.cuda(), two, None if m is None else m.cuda(), backend="cuda").cpu()
            torch.testing.assert_close(a, b, rtol=1e-9 if name.startswith(LIBM) else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_resolve_has_the_bits_of_the_cpu(per, dtype):
    for make in (mf.UPGrad, mf.MGDA, mf.PCGrad, mf.CAGrad, mf.IMTLG, mf.Mean, mf.GradVac):
        one, two = twins(make)
        rows = torch.tensor([True, False, True, True, True])
        for norm, mask in ((False, None), (True, None), (False, rows), (True, torch.rand(6, 5) < 0.8)):
            grads = gradients(4, (6, 700), dtype)
            assert_resolved_alike(one, two, grads, per, mask, norm)


@pytest.mark.parametrize("path", ["two_pass", "persistent", "cluster"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8])
def test_all_paths_have_the_bits_of_the_cpu(path, dtype, k, monkeypatch):
    """All kept, some kept, several chunks to a slot; state and random stream of three calls; masked and absent rows, up to eight places."""
    force(path, dtype, k, monkeypatch)
    for n in (1, 4097, 60_001 // k, 2**20 // (k * dtype.itemsize)) if path == "cluster" else (1, 4097, 300_001, 3_000_001 // k):
        if path == "cluster" and not in_cluster(k, n, dtype):
            continue
        for make in (mf.MGDA, mf.PCGrad, mf.PCD):
            one, two = twins(make, n)
            for turn in range(3):
                assert_resolved_alike(one, two, gradients(k, (1, n), dtype), "batch", torch.arange(k + 1) != turn, turn == 1)


@pytest.mark.parametrize("path", ["two_pass", "per_sample"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_both_paths_per_sample(path, dtype, k, monkeypatch):
    """Samples of half a chunk up to what a block keeps a quarter of: others have one path only, and so do more of them than blocks."""
    force(path, dtype, k, monkeypatch)
    for batch, inner in [(1, 2048), (7, 4096), (60, 2100), (3, 5000), (2, 16_000)]:
        for make in (mf.MGDA, mf.PCGrad, mf.PCD):
            one, two = twins(make, inner)
            for turn in range(3):
                mask = torch.rand(batch, k + 1) < 0.8 if turn else torch.arange(k + 1) != 1
                assert_resolved_alike(one, two, gradients(k, (batch, inner), dtype), "sample", mask, turn == 1)


@pytest.mark.parametrize("path", ["persistent", "cluster", "per_sample", "unheard_of"])
def test_a_path_that_cannot_be_taken_is_refused(path, monkeypatch):
    grads = gpu(gradients(9, (1, 100), torch.float32))
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)
    with pytest.raises(RuntimeError, match="MMFAST_CUDA_PATH"):
        mf.resolve(grads, mf.MGDA(), backend="cuda")


def test_non_finite_gradients_and_many_rows():
    for k in (3, 100):
        grads = gradients(k, (2, 300), torch.float32)
        assert torch.equal(mf.resolve(gpu(grads), mf.IMTLG(), backend="cuda").cpu(), mf.resolve(grads, mf.IMTLG()))
        grads[1][0, 7] = torch.inf
        assert not mf.resolve(gpu(grads), mf.MGDA(), backend="cuda").isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_rules(dtype):
    for make in (lambda: mf.GradDrop(leak=0.1), lambda: mf.GradDrop(leak=[0.0, 0.1, 1.0, 0.5, 0.3]), lambda: mf.TrimmedMean(trim=1)):
        one, two = twins(make)
        grads = gradients(5, (9, 333), dtype)
        mask = torch.rand(9, 5) < 0.8
        for m in (None, mask, mask[0]):
            ours = mf.resolve(gpu(grads), two, mask=None if m is None else m.cuda(), backend="cuda").cpu()
            torch.testing.assert_close(ours, mf.resolve(grads, one, mask=m), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["two_pass", "persistent", "cluster"])
def test_twenty_runs_have_the_same_bits(path, monkeypatch):
    force(path, torch.float32, 6, monkeypatch)
    grads = gpu(gradients(6, (1, 10_003 if path == "cluster" else 1_000_003), torch.float32))
    results = [mf.resolve(grads, mf.UPGrad(), backend="cuda") for _ in range(20)]
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("path", ["two_pass", ""])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_nothing_waits_for_the_device(per, path, monkeypatch):
    """A capture in global mode ends in an error where anything waits, copies from the host or allocates past torch; torch cannot see our runtime."""
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)
    grads = gpu(gradients(3, (4, 3000), torch.float32))
    w = torch.ones((4, 3) if per == "sample" else 3, dtype=torch.float64, device="cuda")
    resolvers = [mf.PCGrad().cuda(), mf.PCD().cuda(), mf.UPGrad(), mf.GradDrop().cuda(), mf.TrimmedMean(trim=1)]
    calls = [
        lambda r=r, norm=norm: mf.resolve(grads, r, per, preserve_norm=norm, backend="cuda")
        for r in resolvers[:3]
        for norm in (False, True)
    ]
    calls += [lambda r=r: mf.resolve(grads, r, backend="cuda") for r in resolvers[3:]]
    calls += [lambda: ops.gram(grads, per, backend="cuda"), lambda: ops.combine(grads, w, per, backend="cuda")]
    calls += [lambda: ops.weights(ops.gram(grads, backend="cuda"), mf.MGDA(), backend="cuda")]
    for call in calls:
        call()  # kernels are loaded and states made before
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="global"):
            call()


def test_first_use_in_a_capture_is_refused():
    grads = gpu(gradients(3, (1, 100), torch.float32))
    mf.resolve(grads, mf.Mean(), backend="cuda")
    for make in (mf.PCD, mf.PCGrad):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            grads[0].neg()  # torch warns of an empty graph
            with pytest.raises(RuntimeError, match="call once before the capture"):
                mf.resolve(grads, make(), backend="cuda")


def test_launches_that_overlap_do_not_read_what_is_not_there_yet(monkeypatch):
    """Fold, solve and combine begin while the kernel before them ends; memory is used again at once."""
    monkeypatch.setenv("MMFAST_CUDA_PATH", "two_pass")
    pool = [gradients(9 if turn % 2 else 3, (1, 5000 + 997 * turn), torch.float32) for turn in range(10)]
    expected = [mf.resolve(grads, mf.MGDA()) for grads in pool]
    pool = [gpu(grads) for grads in pool]
    found = [(turn % 10, mf.resolve(pool[turn % 10], mf.MGDA(), backend="cuda")) for turn in range(1000)]
    for turn, result in found:
        assert torch.equal(result.cpu(), expected[turn])


@pytest.mark.parametrize("path", ["two_pass", ""])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("k", [4, 9])
@pytest.mark.parametrize("make", [mf.PCGrad, mf.PCD])
def test_capture_and_replay_move_state_and_random_stream_on(make, k, per, path, monkeypatch):
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)
    grads, rule = gpu(gradients(k, (2, 2999), torch.float32)), make().cuda()
    mf.resolve(grads, rule, per, backend="cuda")  # makes the state
    eager = copy.deepcopy(rule)
    start = copy.deepcopy(rule.state_dict())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mf.resolve(grads, rule, per, backend="cuda")
    torch.cuda.current_stream().wait_stream(side)
    with torch.no_grad():
        for name, value in rule.state_dict().items():
            value.copy_(start[name])  # in place: the graph holds these tensors
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mf.resolve(grads, rule, per, backend="cuda")
    for _ in range(5):
        graph.replay()
        assert torch.equal(out, mf.resolve(grads, eager, per, backend="cuda"))


class Trained(torch.nn.Module):
    """A shared layer and three linear branches, behind a block or in one operator."""

    def __init__(self, kind, rule):
        super().__init__()
        self.shared = torch.nn.Linear(6, 32)
        branches = [torch.nn.Linear(32, n) for n in (2, 1, 4)]
        self.block = mf.ImpartialityBlock(branches, rule) if kind == "block" else mf.LinearHeads(32, [2, 1, 4], rule)

    def loss(self, x):
        return sum((i + 1) * (o - i).square().mean() for i, o in enumerate(self.block(self.shared(x).tanh())))


@pytest.fixture
def auto_takes_cuda():
    with auto_takes("cuda"):
        yield


@pytest.mark.usefixtures("auto_takes_cuda")
@pytest.mark.parametrize("rule", [mf.MGDA, mf.PCGrad, mf.GradVac, mf.PCD, lambda: mf.GradNorm(alpha=1.0, lr=0.1, update_at=2), mf.Random])
@pytest.mark.parametrize("kind", ["block", "heads"])
def test_a_captured_training_step_is_the_eager_one(kind, rule):
    """The recipe of docs/compilers.md; parameters, state, random stream and record move on with every replay."""
    model = Trained(kind, rule()).cuda()
    eager = copy.deepcopy(model)
    data = torch.randn(10, 16, 6, device="cuda")
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2, capturable=True) for m in (model, eager)]

    def step(m, optimizer, x):
        optimizer.zero_grad()
        m.loss(x).backward()
        optimizer.step()

    x = data[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            x.copy_(data[i])
            step(model, optimizers[0], x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizers[0], x)
    for i in range(len(data)):
        step(eager, optimizers[1], data[i])
        if i < 3:
            continue
        x.copy_(data[i])
        graph.replay()
        for (name, a), (_, b) in zip(model.state_dict().items(), eager.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda m, name=name, i=i: f"step {i}, {name}: {m}")
        torch.testing.assert_close(model.block.stats().weights, eager.block.stats().weights, rtol=1e-4, atol=1e-6)
    for a, b in zip(model.block.resolver.buffers(), eager.block.resolver.buffers(), strict=True):
        assert a.dtype.is_floating_point or torch.equal(a, b)  # the random stream has made the same number of draws


def test_two_streams_at_once():
    a, b = gpu(gradients(3, (1, 300_000), torch.float32)), gpu(gradients(3, (1, 300_000), torch.float32))
    expected = [mf.resolve(g, mf.MGDA(), backend="cuda") for g in (a, b)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(50):
        found = []
        for grads, stream in zip((a, b), streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(mf.resolve(grads, mf.MGDA(), backend="cuda"))
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 17
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip("too little memory")
    g = torch.zeros(n, dtype=torch.float16, device="cuda")
    g[-1] = 3
    assert ops.gram([g], backend="cuda").item() == 9
