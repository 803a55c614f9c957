"""LinearHeads does what K nn.Linear behind an ImpartialityBlock do, without their gradients."""

import copy

import pytest
import torch
from rule_table import RULES
from torch import Tensor, nn

import mmfast as mf
from mmfast.backends import library, reference
from mmfast.ops.heads import heads as linear_heads

B, H = 6, 9
SIZES = [3, 1, 2, 4, 1]
K = len(SIZES)


def pair(rule="MGDA", dtype=torch.float64, sizes=SIZES, **kwargs):
    """A LinearHeads and an ImpartialityBlock with the same weights and their own resolvers of one kind and stream."""
    resolver = RULES[rule].make(len(sizes)) if isinstance(rule, str) else rule
    heads = mf.LinearHeads(H, sizes, resolver, **kwargs).to(dtype)
    block = mf.ImpartialityBlock([nn.Linear(H, n) for n in sizes], copy.deepcopy(resolver), **kwargs).to(dtype)
    with torch.no_grad():
        for branch, weight, bias in zip(block.branches, heads.weight.split(sizes), heads.bias.split(sizes), strict=True):
            branch.weight.copy_(weight)
            branch.bias.copy_(bias)
    return heads, block


def losses(outputs, weights):
    return [(out.double() * w).square().sum() * 10.0 ** (i - 2) for i, (out, w) in enumerate(zip(outputs, weights, strict=True))]


def gradients(module, y, mask, used, weights) -> tuple[Tensor, Tensor, Tensor]:
    y = y.clone().requires_grad_()
    module.zero_grad()
    terms = losses(module(y, mask), weights)
    sum(terms[i] for i in used).backward()
    if isinstance(module, mf.LinearHeads):
        return y.grad, module.weight.grad, module.bias.grad
    parts = [
        (torch.zeros_like(b.weight), torch.zeros_like(b.bias)) if b.weight.grad is None else (b.weight.grad, b.bias.grad)
        for b in module.branches
    ]
    return y.grad, torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts])


def same(heads, block, shape=(B, H), mask=None, used=range(K), rtol=1e-9, dtype=torch.float64):
    y = torch.randn(*shape, dtype=dtype)
    weights = [torch.randn(*shape[:-1], n, dtype=torch.float64) for n in heads.sizes]
    for ours, theirs in zip(gradients(heads, y, mask, used, weights), gradients(block, y, mask, used, weights), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())
    torch.testing.assert_close(heads.stats().weights, block.stats().weights, rtol=rtol, atol=rtol)
    torch.testing.assert_close(heads._info, block._info, rtol=rtol, atol=rtol * block._info.abs().max().item())


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("rule", list(RULES))
def test_equals_the_block(rule, per):
    heads, block = pair(rule, per=per)
    for _ in range(3):  # states and random streams advance alike
        same(heads, block)


@pytest.mark.parametrize("kind", ["[K]", "[B, K]"])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("preserve_norm", [True, False])
def test_masks_and_importance_samples(per, kind, preserve_norm):
    heads, block = pair("UPGrad", per=per, preserve_norm=preserve_norm, local=[1.0, 0.5, 2.0, 3.0, 0.1])
    mask = torch.tensor([True, False, True, True, True]) if kind == "[K]" else torch.rand(B, K) > 0.3
    same(heads, block, (B, 3, H), mask)
    same(heads, block, (B, H), mask, used=[0, 1, 3])


def test_a_masked_branch_may_hold_anything():
    heads, _ = pair("MGDA")
    y = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])
    out = heads(y, mask)
    (sum(o.sum() for o in out) + (out[2] * torch.nan).sum()).backward()
    assert y.grad.isfinite().all()
    assert heads.weight.grad.isnan().any()  # its own parameters get what it sent


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_a_branch_that_sends_nothing_may_have_any_weights(per, masked):
    heads, block = pair("MGDA", per=per)
    with torch.no_grad():
        heads.weight[4:6] = torch.nan  # branch 2
        block.branches[2].weight.fill_(torch.nan)
    mask = torch.tensor([True, True, False, True, True]) if masked else None
    same(heads, block, mask=mask, used=[0, 1, 3, 4])


def test_cancelling_parts_leave_a_branch_in():
    """A gradient far smaller than its parts is neither missing nor negative in the Gramian."""
    heads = mf.LinearHeads(1, [2, 1], mf.GradNorm(), bias=False)
    with torch.no_grad():
        heads.weight.copy_(torch.tensor([[1000.0], [1000.1], [1.0]]))
    for _ in range(30):
        y = torch.ones(1, 1, requires_grad=True)
        heads.joint(y).backward(torch.tensor([[0.5, -0.5, 1.0]]))
        assert y.grad.isfinite().all()
    assert (heads.stats().norms > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_step_of_16_bit_gradients_is_rounded_once(dtype):
    heads = mf.LinearHeads(1, [1, 1], mf.Mean(), local=[1e-8, 1e5]).to(dtype)
    y = torch.ones(1, 1, dtype=dtype)
    heads.joint(y).backward(torch.tensor([[1000.0, 0.01]], dtype=dtype))
    torch.testing.assert_close(heads.bias.grad.float(), torch.tensor([1e-5, 1e3]), rtol=1e-2, atol=6e-8)


def test_deferred_initialisation():
    with torch.device("meta"):
        heads = mf.LinearHeads(H, SIZES, mf.MGDA())
    heads = heads.to_empty(device="cpu")
    heads.reset_parameters()
    y = torch.randn(B, H, requires_grad=True)
    sum(o.square().sum() for o in heads(y)).backward()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
def test_other_dtypes(dtype, rtol):
    heads, block = pair("GradNorm", dtype=dtype)
    same(heads, block, dtype=dtype, rtol=rtol, shape=(64, H))


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_output_gradients_of_any_strides(per):
    heads, _ = pair("MGDA", per=per)
    y = torch.randn(B, 3, 4, H, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(4, 3, B, sum(SIZES), dtype=torch.float64).transpose(0, 2)
    (strided,) = torch.autograd.grad(heads.joint(y), y, delta)
    (plain,) = torch.autograd.grad(heads.joint(y), y, delta.contiguous())
    torch.testing.assert_close(strided, plain)


def test_many_rows_in_pieces(monkeypatch):
    """Per-sample Gramians of the plain-torch form do not depend on how many are made at once."""
    delta, weight, head_of, k = problem((7, 2), [3, 1, 7], torch.float64)
    whole = reference.heads_gram(delta, weight, head_of, k, "sample")
    monkeypatch.setattr(reference, "_SAMPLES_AT_ONCE", 2 * head_of.shape[0] ** 2)
    torch.testing.assert_close(reference.heads_gram(delta, weight, head_of, k, "sample"), whole)


def problem(shape, sizes, dtype):
    """Output gradients, weights and places of linear branches; one branch sends nothing and has weights that must not be read."""
    delta, weight = torch.randn(*shape, sum(sizes)).to(dtype), torch.randn(sum(sizes), 11).to(dtype)
    head_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    delta[..., head_of == 1] = 0
    weight[head_of == 1] = torch.nan
    return delta, weight, head_of, len(sizes)


SHAPES = [((3,), [1, 1]), ((4, 5), [3, 1, 7]), ((2, 130), [5, 2, 20, 6]), ((17, 3), [2] * 50), ((2, 1500), [40, 1, 60]), ((0, 3), [2, 1])]


@pytest.mark.skipif(not library.available, reason=str(library.missing_reason))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [None, "[K]", "[B, K]"])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("shape, sizes", SHAPES, ids=[f"{shape} {len(sizes)}" for shape, sizes in SHAPES])
def test_compiled_equals_reference(shape, sizes, per, masked, dtype, monkeypatch):
    """The Gramian, and what is made of the same Gramian. Fewer and more rows than a chain (128) and than are packed at once; every width of the last tile."""
    delta, weight, head_of, k = problem(shape, sizes, dtype)
    mask = None
    if masked:
        mask = torch.rand(k if masked == "[K]" else (shape[0], k)) < 0.7
        columns = mask[..., head_of]
        hidden = ~columns if masked == "[K]" else ~columns.view(shape[0], *[1] * (len(shape) - 1), -1) if shape[0] else None
        delta = delta if hidden is None else torch.where(hidden, torch.nan, delta)

    def run(backend):
        rule = mf.MGDA() if k < 50 else mf.PCGrad(order="fixed")  # fifty in 33 dimensions have no one MGDA, and two solvers find two
        return linear_heads(delta, weight, head_of, mf.Compose(mf.GradNorm(), rule), k, per, mask, True, backend)

    (out, info), (_, expected_info), gram_of = run("cpu"), run("reference"), reference.heads_gram
    found = info[..., k:].unflatten(-1, (k, k))  # lengths are measured on a Gramian in double precision
    monkeypatch.setattr(reference, "heads_gram", lambda d, *args: found if d.dtype == dtype else gram_of(d, *args))
    expected, _ = run("reference")
    assert out.dtype == dtype and out.isfinite().all()
    rtol = max(8 * torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(
        info[..., k:], expected_info[..., k:], rtol=rtol, atol=rtol * info.abs().amax().item() if info.numel() else 0
    )
    torch.testing.assert_close(out, expected, rtol=rtol, atol=10 * rtol * out.abs().amax().item() if out.numel() else 0)


@pytest.mark.skipif(not library.available, reason=str(library.missing_reason))
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_same_bits_for_every_number_of_threads(per):
    delta, weight, head_of, k = problem((20, 160), [2] * 50, torch.float32)
    threads, infos = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            infos.append(linear_heads(delta, weight, head_of, mf.MGDA(), k, per, None, True)[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(infos[0], infos[1]) and torch.equal(infos[0], infos[2])


def test_autocast():
    """Under autocast, outputs are 16-bit and the Gramian is not, even where the backward pass runs inside it."""
    heads = mf.LinearHeads(H, SIZES, mf.UPGrad())
    y = torch.randn(B, H, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = heads(y)
        assert all(o.dtype == torch.bfloat16 for o in out)
        sum(o.float().square().sum() for o in out).backward()
    assert y.grad.dtype == heads.weight.grad.dtype == torch.float32
    info = heads._info
    with torch.no_grad():
        rounded = mf.LinearHeads(H, SIZES, mf.UPGrad()).double()
        rounded.load_state_dict({name: value.bfloat16().double() for name, value in heads.state_dict().items()})
    z = y.detach().bfloat16().double().requires_grad_()
    outs = rounded(z)
    deltas = [2 * o.detach().double() for o in out]
    torch.autograd.backward(list(outs), deltas)
    torch.testing.assert_close(info, rounded._info, rtol=1e-2, atol=1e-2 * rounded._info.abs().max().item())


@pytest.mark.parametrize("frozen", ["weight", "y", "nothing"])
def test_asks_only_for_what_is_needed(frozen):
    heads, _ = pair("MGDA", local=[2.0] * K)
    heads.weight.requires_grad_(frozen != "weight")
    y = torch.randn(B, H, dtype=torch.float64, requires_grad=frozen != "y")
    sum(o.sum() for o in heads(y)).backward()
    assert (y.grad is None) == (frozen == "y")
    assert (heads.weight.grad is None) == (frozen == "weight")
    torch.testing.assert_close(heads.bias.grad, torch.full((sum(SIZES),), 2.0 * B, dtype=torch.float64))  # beta reaches the parameters


def test_a_resolver_of_the_user():
    class Shortest(mf.Resolver):
        def forward(self, G, mask=None):
            squares = torch.where(mask, G.diagonal(dim1=-2, dim2=-1), torch.inf)
            return nn.functional.one_hot(squares.argmin(-1), G.shape[-1]).double()

    same(*pair(Shortest()))


def test_double_backward_is_refused():
    heads, _ = pair()
    y = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(sum(o.square().sum() for o in heads(y)), y, create_graph=True)


def test_copies_and_checkpoints():
    heads, _ = pair("GradVac")
    y = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    sum(o.square().sum() for o in heads(y)).backward()
    other = mf.LinearHeads(H, SIZES, mf.GradVac()).double()
    other.load_state_dict(heads.state_dict())
    twin = copy.deepcopy(heads)
    for module in (other, twin):
        torch.testing.assert_close(module.resolver.state, heads.resolver.state)
        torch.testing.assert_close(module.joint(y), heads.joint(y))
    assert heads.joint(y).shape == (B, sum(SIZES))
    with torch.no_grad():
        assert not heads(y)[0].requires_grad


def test_empty_batch():
    for per in ("batch", "sample"):
        heads, _ = pair("UPGrad", per=per)
        y = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
        sum(o.sum() for o in heads(y)).backward()
        assert y.grad.shape == (0, H)
        assert (heads.weight.grad == 0).all()


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: mf.LinearHeads(0, [1], mf.Mean()), ValueError, "in_features is 0"),
        (lambda: mf.LinearHeads(3, [], mf.Mean()), ValueError, r"out_features is \[\]"),
        (lambda: mf.LinearHeads(3, [1, 0], mf.Mean()), ValueError, r"out_features\[1\] is 0"),
        (lambda: mf.LinearHeads(3, [1, 2], mf.GradDrop()), TypeError, "ImpartialityBlock over nn.Linear"),
        (lambda: mf.LinearHeads(3, [1, 2], mf.Constant), TypeError, "the class Constant, .* needs arguments"),
        (lambda: mf.LinearHeads(3, [1, 2], mf.Mean(), local=[1.0]), ValueError, "local has 1 numbers"),
        (lambda: mf.LinearHeads(3, [1, 2], mf.Mean())(torch.ones(2, 4)), ValueError, r"y has shape \(2, 4\), expected \[..., 3\]"),
        (lambda: mf.LinearHeads(3, [1, 2], mf.Mean(), per="sample")(torch.ones(3)), ValueError, "leading batch dimension"),
        (lambda: mf.LinearHeads(3, [1, 2], mf.Mean())(torch.ones(2, 3), torch.ones(3, dtype=torch.bool)), ValueError, "mask has shape"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
