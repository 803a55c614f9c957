"""Gradients of several tensors as one problem: what one long vector gives, for every rule, dtype and way of calling."""

import copy
import subprocess
import sys

import pytest
import torch
from rule_table import RULES

import mmfast as mf
from mmfast.ops.resolve import resolve_info

SHAPES = [(4, 3), (4,), (4, 2, 5), (4, 1)]


def lists(k, dtype=torch.float64, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes] for _ in range(k)]


def long(grads, per="batch"):
    """The same gradients as one tensor each, zero where one has none."""
    first = 0 if per == "batch" else 1
    like = next(g for g in grads if g is not None)
    shapes = [next(g[t] for g in grads if g is not None and g[t] is not None) for t in range(len(like))]
    return [
        None
        if g is None
        else torch.cat(
            [(torch.zeros_like(s) if x is None else x).reshape(*s.shape[:first], -1) for x, s in zip(g, shapes, strict=True)], -1
        )
        for g in grads
    ]


def assert_same(found, wanted, per="batch", **tolerance):
    parts = torch.cat([x.reshape(*x.shape[: 0 if per == "batch" else 1], -1) for x in found], -1)
    torch.testing.assert_close(parts.double(), wanted.double(), equal_nan=True, **tolerance)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_resolves_lists_as_one_vector(name, per, norm):
    row = RULES[name]
    torch.manual_seed(0)
    k = row.min_k + 2
    one = row.make(k)
    two = copy.deepcopy(one)
    for turn in range(3):  # state and random stream go on
        grads = lists(k, seed=turn)
        if turn == 1:
            grads[1] = None if row.min_k < 3 else grads[1]
            grads[0][2] = None
        found = mf.resolve(grads, one, per, preserve_norm=norm)
        assert [x.shape for x in found] == [torch.Size(s) for s in SHAPES]
        assert_same(found, mf.resolve(long(grads, per), two, per, preserve_norm=norm), per, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [lambda: mf.GradDrop(0.1), lambda: mf.TrimmedMean(1)])
@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("norm", [False, True])
def test_elementwise_rules(make, per, norm):
    torch.manual_seed(1)
    one = make()
    two = copy.deepcopy(one)
    grads = lists(4)
    grads[0] = [torch.zeros_like(x) for x in grads[0]]  # zero over all tensors: missing
    grads[1][0] = torch.zeros(SHAPES[0], dtype=torch.float64)  # zero in one of them: there
    for mask in (None, torch.tensor([True, True, False, True])):
        grads[2][1] = None
        assert_same(
            mf.resolve(grads, one, per, mask, preserve_norm=norm), mf.resolve(long(grads, per), two, per, mask, preserve_norm=norm), per
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_that_of_the_coarsest_tensor(dtype):
    grads = lists(3, torch.float32)
    for g in grads:
        g[1] = g[1].to(dtype)
    found = mf.resolve(grads, mf.UPGrad())
    assert [x.dtype for x in found] == [torch.float32, dtype, torch.float32, torch.float32]
    assert_same(
        found,
        mf.resolve([x.double() for x in long([[t.double() for t in g] for g in grads])], mf.UPGrad()),
        rtol=4 * torch.finfo(dtype).eps,
        atol=2 * torch.finfo(dtype).eps,
    )


def test_the_norm_is_measured_where_the_gramian_cannot_tell():
    """Sums that cancel below the precision of float32, over tensors that cancel in turn."""
    for small in (1e-3, 1e-4, 1e-6):
        grads = [[torch.tensor([1.0, 0.0]), torch.tensor([2.0])], [torch.tensor([-1.0, small]), torch.tensor([-2.0])]]
        for rule in (mf.Sum(), mf.Mean()):
            found = mf.resolve(grads, rule, preserve_norm=True)
            torch.testing.assert_close(torch.cat(found), torch.tensor([0.0, small, 0.0]), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("left", [1e-2, 1e-3, 1e-4, 1e-5])
def test_what_is_left_of_sums_that_cancel(left, per):
    """Of float32 gradients whose sum is 1e-5 of them: its length, and its direction where the rule gives the plain sum's; in float32 alone it would be off by 4e-3."""
    generator = torch.Generator().manual_seed(0)
    first, second, noise = ([torch.randn(4, *shape, generator=generator) for shape in ((300,), (20, 30))] for _ in range(3))
    grads = [first, second, [left * n - (a + b) for a, b, n in zip(first, second, noise, strict=True)]]
    exact = long([[x.double() for x in g] for g in grads], per)
    plain = sum(exact)

    def rows(x):
        return x if per == "sample" else x.sum(0, keepdim=True) if per == "batch_sum" else x.reshape(1, -1)

    for rule in (mf.Mean(), mf.Constant([0.2, 0.3, 0.5])):
        found = mf.resolve(grads, rule, per, preserve_norm=True)
        parts = torch.cat([x.reshape(*x.shape[: per != "batch"], -1) for x in found], -1).double()
        wanted = mf.resolve(exact, rule, per, preserve_norm=True)
        torch.testing.assert_close(rows(parts).norm(dim=1), rows(plain).norm(dim=1), rtol=1e-6, atol=0)
        assert ((rows(parts) - rows(wanted)).norm(dim=1) / rows(plain).norm(dim=1)).max() < 1e-5


def test_gram_and_combine_and_masks():
    grads = lists(3)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(mf.gram(grads, mask=mask), mf.gram(long(grads), mask=mask))
    by_sample = torch.rand(4, 3) < 0.6
    torch.testing.assert_close(mf.gram(grads, "sample", mask=by_sample), mf.gram(long(grads, "sample"), "sample", mask=by_sample))
    w = torch.randn(3, dtype=torch.float64)
    assert_same(mf.combine(grads, w), mf.combine(long(grads), w))
    samples = torch.randn(4, 3, dtype=torch.float64)
    assert_same(mf.combine(grads, samples, "sample"), mf.combine(long(grads, "sample"), samples, "sample"), "sample")
    found = mf.resolve(grads, mf.MGDA(), "sample", by_sample)
    assert_same(found, mf.resolve(long(grads, "sample"), mf.MGDA(), "sample", by_sample), "sample")


def test_rules_of_the_users_own_and_by_name():
    class Shortest(mf.Resolver):
        def forward(self, G, mask=None):
            squares = torch.where(mask, G.diagonal(dim1=-2, dim2=-1), torch.inf)
            return torch.nn.functional.one_hot(squares.argmin(-1), G.shape[-1]).double()

    grads = lists(3)
    for norm in (False, True):
        assert_same(mf.resolve(grads, Shortest(), preserve_norm=norm), mf.resolve(long(grads), Shortest(), preserve_norm=norm))
    assert_same(mf.resolve(grads, "mgda"), mf.resolve(long(grads), mf.MGDA))
    info, wanted = resolve_info(grads, mf.MGDA())[1], resolve_info(long(grads), mf.MGDA())[1]
    torch.testing.assert_close(info, wanted)


def test_sparse_and_complex_tensors():
    sparse = [[torch.eye(3)[[i]].to_sparse(), torch.randn(2)] for i in range(2)]
    dense = [[x.to_dense() for x in g] for g in sparse]
    assert_same(mf.resolve(sparse, mf.MGDA()), mf.resolve(long(dense), mf.MGDA()))
    grads = [[torch.randn(3, dtype=torch.complex64), torch.randn(2)] for _ in range(2)]
    found = mf.resolve(grads, mf.UPGrad())
    assert found[0].dtype == torch.complex64
    real = [[torch.view_as_real(a).flatten(), b] for a, b in grads]
    assert_same([torch.view_as_real(found[0]), found[1]], mf.resolve(long(real), mf.UPGrad()))


@pytest.mark.parametrize(
    "grads, message",
    [
        ([[torch.ones(2)], torch.ones(2)], r"grads\[1\] is a Tensor, expected a list of tensors"),
        ([[torch.ones(2)], [torch.ones(2), torch.ones(2)]], r"grads\[1\] has 2 tensors, expected 1"),
        ([[], []], "lists without tensors"),
        ([[torch.ones(2), None], [torch.ones(2), None]], "tensor 1 is None in every gradient"),
        ([[torch.ones(2)], [torch.ones(3)]], r"tensor 0 of the lists: grads\[1\] has shape \(3,\)"),
        ([[torch.ones(2, dtype=torch.int64)], None], "tensor 0 of the lists: grads.0. is torch.int64"),
        ([[torch.ones(2), torch.ones(2, device="meta")]], "tensor 1 of the lists is on meta, expected cpu"),
    ],
)
def test_lists_that_do_not_fit(grads, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mf.resolve(grads, mf.MGDA())
    with pytest.raises((ValueError, TypeError), match=message):
        mf.gram(grads)


def test_samples_that_do_not_fit():
    with pytest.raises(ValueError, match="tensor 1 of the lists has 3 samples, expected 2"):
        mf.resolve([[torch.ones(2, 1), torch.ones(3, 1)]], mf.MGDA(), "sample")


def test_nothing_is_recorded():
    grads = [[x.requires_grad_() for x in g] for g in lists(2)]
    assert not any(x.requires_grad for x in mf.resolve(grads, mf.MGDA(), preserve_norm=True))
    assert not mf.gram(grads).requires_grad


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_a_mask_for_each_sample_of_elementwise_rules(per):
    """Each tensor by itself, for these rules look at elements."""
    grads = [[torch.randn(3, 4), torch.randn(3, 2, 5)] for _ in range(3)]
    mask = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
    found = mf.resolve(grads, mf.TrimmedMean(1), per, mask)
    for t, x in enumerate(found):
        assert torch.equal(x, mf.resolve([g[t] for g in grads], mf.TrimmedMean(1), per, mask))
    compiled = torch.compile(lambda g: mf.resolve(g, mf.MGDA(), per, mask), backend="eager", fullgraph=True)(grads)
    for x, y in zip(compiled, mf.resolve(grads, mf.MGDA(), per, mask), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


PEAK = """
import torch, mmfast as mf
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
mf.resolve([[torch.ones(9)] * 2] * 8, {rule})
grads = [[torch.randn(1000, 1000) for _ in range(4)] for _ in range(8)]
before = peak()
found = mf.resolve(grads, {rule}, preserve_norm={norm})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@pytest.mark.parametrize("rule, norm", [("mf.UPGrad()", False), ("mf.PCGrad()", True)])
def test_no_gradient_is_copied(rule, norm):
    """Eight gradients of 15 MB each: the memory grows by one result, not by eight of them."""
    done = subprocess.run([sys.executable, "-c", PEAK.format(rule=rule, norm=norm)], capture_output=True, text=True, check=True)
    assert 10 < float(done.stdout) < 24


@pytest.mark.parametrize("k", [1, 2, 4, 5, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_pass_over_all_tensors(k, dtype):
    """Sizes around a chunk, none, missing entries, strides, other dtypes beside: against float64, and the same bits by one thread."""
    shapes = [(4096,), (0,), (1,), (3, 4099), (20000,), (7, 2)]
    grads = lists(k, dtype, shapes=shapes)
    other = torch.float64 if dtype == torch.float64 else torch.float32
    for g in grads:
        g[3] = g[3].T.contiguous().T
        g[5] = g[5].to(other)
    if k > 2:
        grads[1][0] = grads[0][4] = grads[2][4] = grads[k - 1][1] = None
        grads[k - 2] = None
    exact = long([None if g is None else [None if x is None else x.double() for x in g] for g in grads])
    G, wanted = mf.gram(grads), mf.gram(exact if k < 3 else [torch.zeros_like(exact[0]) if g is None else g for g in exact])
    scale = wanted.diagonal().sqrt().clamp(min=1)
    assert ((G - wanted) / scale.outer(scale)).abs().max() < (1e-15 if dtype == torch.float64 else 1e-6)
    w = torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = mf.combine(grads, w)
    assert [x.dtype for x in out] == [dtype] * 5 + [other] and all(x.is_contiguous() for x in out)
    total = sum(w[i] * g for i, g in enumerate(exact) if g is not None)
    eps = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    assert_same(out, total, rtol=eps, atol=eps * float(w.abs().sum()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(mf.gram(grads), G) and all(torch.equal(a, b) for a, b in zip(mf.combine(grads, w), out, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("name", RULES)
def test_lengths_that_the_gramian_tells_are_not_measured(name, per, monkeypatch):
    grads = lists(6)
    rules = []
    for _ in range(2):
        torch.manual_seed(0)
        rules.append(RULES[name].make(6))
    with monkeypatch.context() as patch:
        patch.setattr("mmfast.ops.lists.lengths", None)  # would raise
        found = [mf.resolve(grads, rules[0], per, preserve_norm=True) for _ in range(3)]  # a state and a stream go on
    with monkeypatch.context() as patch:
        patch.setattr("mmfast.ops.lists.told", lambda *_: torch.tensor(False))
        wanted = [mf.resolve(grads, rules[1], per, preserve_norm=True) for _ in range(3)]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_lengths_that_the_gramian_does_not_tell_are_measured(monkeypatch):
    grads = lists(2, torch.float32)
    grads[1] = [-g + 1e-6 * torch.randn_like(g) for g in grads[0]]  # the sum is as small as what float32 knows of the Gramian
    monkeypatch.setattr("mmfast.ops.lists.lengths", None)
    with pytest.raises(TypeError, match="NoneType"):
        mf.resolve(grads, mf.GradNorm(), preserve_norm=True)
