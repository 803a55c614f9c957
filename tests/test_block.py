"""fork and ImpartialityBlock: what they compute, what they refuse, what their statistics say."""

from collections import defaultdict, namedtuple

import pytest
import torch
from block_model import LOSSES, B, ByLength, H, K, Model, gradients, make_branches, materialised, total
from torch import Tensor, nn

from mmfast.blocks.block import ImpartialityBlock
from mmfast.blocks.fork import fork
from mmfast.blocks.scaling import DimRatio
from mmfast.resolvers.elementwise import GradDrop
from mmfast.resolvers.projection import GradVac
from mmfast.resolvers.simple import Constant, Mean, Sum


@pytest.fixture
def x():
    return torch.randn(B, 4, dtype=torch.float64)


def by_hand(grads, weigh, per, mask=None, preserve_norm=True) -> Tensor:
    """sum_i w_i g_i in float64 by loops; weigh(rows) gives the weights of the rows [present, n] of one problem."""
    like = next(g for g in grads if g is not None)
    if per == "sample":
        rows = []
        for b in range(like.shape[0]):
            m = mask[b] if mask is not None and mask.dim() == 2 else mask
            rows.append(by_hand([None if g is None else g[b] for g in grads], weigh, "batch", m, preserve_norm))
        return torch.stack(rows)
    if mask is not None and mask.dim() == 2:
        grads = [torch.where(mask[:, i].view(-1, *[1] * (like.dim() - 1)), g, 0) for i, g in enumerate(grads)]
        mask = mask.any(0)
    there = [i for i, g in enumerate(grads) if g is not None and (mask is None or mask[i])]
    out = torch.zeros_like(like, dtype=torch.float64)
    if not there:
        return out
    problem = torch.stack([(grads[i].sum(0) if per == "batch_sum" else grads[i]).double().flatten() for i in there])
    w = weigh(problem)
    if preserve_norm:
        w = w * problem.sum(0).norm() / (w @ problem).norm()
    return out + sum(w[n] * grads[i].double() for n, i in enumerate(there))


def unit(problem):
    return 1 / problem.norm(dim=1)


@pytest.mark.parametrize("preserve_norm", [True, False])
@pytest.mark.parametrize("kind", ["no mask", "[k]", "[B, k]"])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_gradient_is_the_resolved_one(per, kind, preserve_norm):
    mask = {"no mask": None, "[k]": torch.tensor([True, False, True]), "[B, k]": torch.rand(B, K) > 0.4}[kind]
    branches, y = make_branches(), torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    aliases = fork(y, K, ByLength(), per=per, mask=mask, preserve_norm=preserve_norm)
    sum(loss(branch(a)) for loss, branch, a in zip(LOSSES, branches, aliases, strict=True)).backward()
    expected = by_hand(materialised(y, branches, LOSSES), unit, per, mask, preserve_norm)
    torch.testing.assert_close(y.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_and_shape_of_the_tensor(dtype):
    for shape in [(), (7,), (2, 3, 4), (0, 4)]:
        y = torch.randn(shape, dtype=dtype, requires_grad=True)
        a, b = fork(y, 2, Mean(), preserve_norm=False)
        (a.sum() * 2 + (b * 4).sum()).backward()
        assert y.grad.dtype == dtype and torch.equal(y.grad, torch.full(shape, 3.0, dtype=dtype))


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_sum_is_plain_autograd_exactly(k, per):
    """Gradients are small integers, so that every order of summation gives the same bits."""
    y = torch.randint(-8, 9, (B, H)).float().requires_grad_()
    factors = torch.randint(-8, 9, (k, B, H)).float()
    for aliases in (fork(y, k, Sum(), per=per), (y,) * k):
        y.grad = None
        sum((f * a).sum() for f, a in zip(factors, aliases, strict=True)).backward()
        if aliases[0] is not y:
            ours = y.grad
    assert torch.equal(ours, y.grad)


def test_sum_passes_gradcheck():
    def model(y):
        a, b, c = fork(y, 3, Sum())
        return a.sin() * b + c.square()

    assert torch.autograd.gradcheck(model, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_preserve_norm_keeps_the_length_of_the_plain_sum():
    y, factors = torch.randn(B, H, dtype=torch.float64, requires_grad=True), torch.randn(K, B, H, dtype=torch.float64)
    for preserve_norm in (True, False):
        y.grad = None
        aliases = fork(y, K, Constant([1.0, 20.0, 300.0]), preserve_norm=preserve_norm)
        sum((f * a).sum() for f, a in zip(factors, aliases, strict=True)).backward()
        plain = (factors * torch.tensor([1.0, 20.0, 300.0]).view(-1, 1, 1)).sum(0)
        expected = plain * factors.sum(0).norm() / plain.norm() if preserve_norm else plain
        torch.testing.assert_close(y.grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("how", ["unused", "zero", "masked"])
def test_missing_branch_is_left_out(how):
    y = torch.ones(4, requires_grad=True)
    mask = torch.tensor([True, True, False]) if how == "masked" else None
    a, b, c = fork(y, 3, Mean(), mask=mask, preserve_norm=False)
    third = {"unused": 0, "zero": (0 * c).sum(), "masked": 100 * c.sum()}[how]
    (2 * a.sum() + 4 * b.sum() + third).backward()
    assert torch.equal(y.grad, torch.full((4,), 3.0))  # the mean of two, not of three


def test_no_branch_has_a_gradient():
    x = torch.ones(3, requires_grad=True)
    y = 2 * x
    fork(y, 2, Mean())
    (y.detach() * x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x.grad = None
    Silent.apply(fork(2 * x, 2, Mean())[0]).sum().backward()
    assert x.grad is None


def test_mask_of_nothing_gives_zero():
    y = torch.ones(3, requires_grad=True)
    a, b = fork(y, 2, Mean(), mask=torch.tensor([False, False]))
    (a + b).sum().backward()
    assert torch.equal(y.grad, torch.zeros(3))


def test_non_finite_gradients_stay_non_finite():
    y = torch.ones(3, requires_grad=True)
    a, b = fork(y, 2, Mean())
    (a * float("inf") + b).sum().backward()
    assert not y.grad.isfinite().any()


def test_without_gradients_the_aliases_are_plain_views():
    leaf = torch.randn(2, 3, requires_grad=True)
    with torch.no_grad():
        silent = fork(leaf, 3, Mean())
    for aliases, y in ((silent, leaf), (fork(leaf.detach(), 3, Mean()), leaf)):
        assert len(aliases) == 3 and len({id(a) for a in aliases}) == 3
        for a in aliases:
            assert a.grad_fn is None and a.data_ptr() == y.data_ptr() and a.shape == y.shape


def test_aliases_share_memory_and_refuse_in_place_changes():
    y = torch.randn(2, 3, requires_grad=True)
    a, b = fork(y, 2, Mean())
    assert a.data_ptr() == b.data_ptr() == y.data_ptr() and a is not b
    with pytest.raises(RuntimeError, match="modified inplace"):
        a.add_(1)


def test_mask_changed_before_the_backward_pass_is_noticed():
    y, mask = torch.ones(3, requires_grad=True), torch.tensor([True, True])
    a, b = fork(y, 2, Mean(), mask=mask)
    mask[0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (a + b).sum().backward()


def test_double_backward_is_refused():
    y = torch.randn(3, requires_grad=True)
    a, b = fork(y, 2, Mean())
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad((a * b).sum(), y, create_graph=True)
    a, b = fork(y, 2, Mean())
    loss = (a * b).sum()
    loss.backward(retain_graph=True)  # going back twice is another thing, and fine
    once = y.grad.clone()
    loss.backward()
    assert torch.equal(y.grad, 2 * once)


ERRORS = [
    (lambda y: fork(y, 0, Mean()), ValueError, "k is 0"),
    (lambda y: fork(y, 257, Mean()), ValueError, "k is 257"),
    (lambda y: fork(y, 2.0, Mean()), TypeError, "k is a float"),
    (lambda y: fork(y, 2, nn.Linear(2, 2)), TypeError, "resolver is a Linear"),
    (lambda y: fork(y, 2, Mean()(torch.eye(2))), TypeError, "resolver is a Tensor"),
    (lambda y: fork(y, 2, Constant), TypeError, r"resolver is the class Constant, .* mf\.Constant\(weights\)"),
    (lambda y: fork(y, 2, GradVac), ValueError, "resolver is the class GradVac, which keeps state"),
    (lambda y: fork(y, 2, Mean(), per="row"), ValueError, "per is 'row'"),
    (lambda y: fork([1.0], 2, Mean()), TypeError, r"y\[0\] is a float"),
    (lambda y: fork(torch.arange(4), 2, Mean()), TypeError, "y is torch.int64"),
    (lambda y: fork(y.detach().to_sparse(), 2, Mean()), TypeError, r"y has layout torch.sparse_coo.* y\.to_dense\(\)"),
    (lambda y: fork(y.sum(), 2, Mean(), per="sample"), ValueError, "leading batch dimension"),
    (lambda y: fork(y, 2, Mean(), mask=[True, False]), TypeError, "mask is a list"),
    (lambda y: fork(y, 2, Mean(), mask=torch.ones(2)), TypeError, "mask is torch.float32"),
    (lambda y: fork(y, 2, Mean(), mask=torch.ones(3, dtype=torch.bool)), ValueError, r"mask has shape \(3,\), expected \(2,\) or \(4, 2\)"),
    (lambda y: fork(y, 2, Mean(), per="sample", mask=torch.ones(3, 2, dtype=torch.bool)), ValueError, r"expected \(2,\) or \(4, 2\)"),
    (lambda y: fork(y, 2, Constant([1.0, 2.0, 3.0])), ValueError, "3"),
    (lambda y: fork(y, 2, "pcgard"), ValueError, "did you mean PCGrad"),
    (lambda y: fork(y, 2, Mean(), mask=torch.ones(2, dtype=torch.bool, device="meta")), ValueError, "mask is on meta"),
    (lambda y: ImpartialityBlock([], Mean()), ValueError, "branches has 0 modules"),
    (lambda y: ImpartialityBlock(nn.Linear(2, 2), Mean()), TypeError, "branches is a Linear"),
    (lambda y: ImpartialityBlock([nn.Linear(2, 2), len], Mean()), TypeError, r"branches\[1\] is a builtin"),
    (lambda y: ImpartialityBlock([nn.Linear(2, 2)], Mean(), local=[1.0, 2.0]), ValueError, "local has 2 numbers, expected 1"),
    (lambda y: ImpartialityBlock([nn.Linear(2, 2)], Mean(), local=[0.0]), ValueError, r"local\[0\] is 0.0"),
    (lambda y: ImpartialityBlock([nn.Linear(2, 2)], Mean(), local=torch.tensor([float("nan")])), ValueError, r"local\[0\] is nan"),
    (lambda y: ImpartialityBlock([nn.Linear(2, 2)], Mean(), local=2.0), TypeError, "local is a float"),
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors_come_in_the_forward_pass(call, error, message, grad):
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        call(torch.randn(4, 3, requires_grad=True))


@pytest.mark.parametrize("local", [None, [2.0, 1.0, 0.25], torch.tensor([2.0, 1.0, 0.25]), DimRatio([1, 2, 8])])
def test_heads_get_beta_and_the_shared_tensor_gets_the_resolver(x, local):
    model = Model(Constant([1.0, 10.0, 100.0]), local=local, preserve_norm=False)
    beta = [1.0] * K if local is None else [float(b) for b in getattr(local, "beta", local)]
    ours = gradients(model, x)
    y = model.shared(x).tanh().detach()
    expected = torch.zeros_like(y)
    for i, branch in enumerate(model.block.branches):
        leaf = y.clone().requires_grad_()
        branch.zero_grad()
        LOSSES[i](branch(leaf)).backward()
        expected += 10.0**i * beta[i] * leaf.grad
        for name, p in branch.named_parameters():
            torch.testing.assert_close(ours[f"block.branches.{i}.{name}"], beta[i] * p.grad, rtol=1e-14, atol=0)
    model.zero_grad()
    model.shared(x).tanh().backward(expected)
    torch.testing.assert_close(ours["shared.weight"], model.shared.weight.grad, rtol=1e-12, atol=1e-14)


Pair = namedtuple("Pair", "mean scale")


class Structured(nn.Module):
    """Returns tensors in a container of the given kind, with an integer tensor among them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(H, 2, dtype=torch.float64)

    def forward(self, y):
        out = self.linear(y)
        index = out.argmax(-1)
        return {
            "tuple": lambda: (out, index),
            "list": lambda: [out, None, index],
            "named": lambda: Pair(out, index),
            "dict": lambda: defaultdict(list, {"mean": out, "more": [index, 3]}),
            "integers": lambda: index,
            "distribution": lambda: torch.distributions.Normal(out, 1),
        }[self.kind]()


def test_branches_may_return_containers():
    y = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    kinds = {kind: Structured(kind) for kind in ("tuple", "list", "named", "dict", "integers")}
    block = ImpartialityBlock(nn.ModuleDict(kinds), Sum(), local=[2.0, 3.0, 4.0, 5.0, 6.0])
    out = block(y)
    assert list(out) == list(kinds) == list(block.names)
    assert (
        isinstance(out["named"], Pair) and isinstance(out["dict"], defaultdict) and out["list"][1] is None and out["dict"]["more"][1] == 3
    )
    assert out["integers"].dtype == torch.int64 and out["tuple"][1].dtype == torch.int64
    (out["tuple"][0] + out["list"][0] + out["named"].mean + out["dict"]["mean"]).sum().backward()
    for beta, kind in zip((2.0, 3.0, 4.0, 5.0), ("tuple", "list", "named", "dict"), strict=False):
        assert torch.equal(kinds[kind].linear.bias.grad, torch.full((2,), B * beta, dtype=torch.float64))
    assert block.stats().missing.tolist() == [False] * 4 + [True]


def test_output_that_the_local_step_cannot_reach_is_refused():
    y = torch.randn(B, H, dtype=torch.float64, requires_grad=True)
    branch = {"a": Structured("distribution")}
    assert isinstance(ImpartialityBlock(nn.ModuleDict(branch), Sum())(y)["a"], torch.distributions.Normal)
    with pytest.raises(TypeError, match="branch a returned a Normal"):
        ImpartialityBlock(nn.ModuleDict(branch), Sum(), local=[2.0])(y)


def test_arguments_reach_every_branch():
    class Shift(nn.Module):
        def forward(self, y, by):
            return y + by

    one, two = ImpartialityBlock([Shift(), Shift()], Sum())(torch.zeros(3), by=2.0)
    assert torch.equal(one, torch.full((3,), 2.0)) and torch.equal(two, one)


def test_frozen_branches_and_inputs(x):
    model = Model()
    everything = gradients(model, x)
    model.block.branches[1].requires_grad_(False)
    some = gradients(model, x)
    assert set(everything) - set(some) == {name for name in everything if name.startswith("block.branches.1.")}
    assert all(torch.equal(some[name], everything[name]) for name in some)
    model.shared.requires_grad_(False)  # nobody asks for the shared gradient: the heads train on
    assert all(torch.equal(grad, everything[name]) for name, grad in gradients(model, x).items())


def test_eval_and_no_grad_change_nothing_but_the_graph(x):
    model = Model(local=[1.0, 2.0, 3.0])
    outputs = model(x)
    model.eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(outputs, model(x), strict=True))
    assert model.block.resolver.calls == 0


def test_stats_are_those_of_the_gradients(x):
    model = Model(local=[1.0, 2.0, 3.0])
    y = model.shared(x).tanh()
    model.block(y)
    gradients(model, x, used=(0, 2))
    stats = model.block.stats()
    g = materialised(y, model.block.branches, LOSSES)
    g = [g[0].flatten(), None, 3 * g[2].flatten()]
    assert stats.missing.tolist() == [False, True, False] and stats.names == ("0", "1", "2")
    torch.testing.assert_close(stats.norms, torch.stack([g[0].norm(), torch.zeros_like(g[0][0]), g[2].norm()]))
    cosine = torch.cosine_similarity(g[0], g[2], dim=0)
    torch.testing.assert_close(stats.cosines[0, 2], cosine)
    assert stats.cosines[1].isnan().all() and stats.conflict_rate == float(cosine < 0)
    d = g[0] / g[0].norm() + g[2] / g[2].norm()
    d = d * (g[0] + g[2]).norm() / d.norm()
    torch.testing.assert_close(stats.weights[0] * g[0] + stats.weights[2] * g[2], d)
    assert stats.weights[1] == 0
    torch.testing.assert_close(stats.cosine_to_direction[2], torch.cosine_similarity(g[2], d, dim=0))
    assert stats.cosine_to_direction[1].isnan() and stats.magnitude_similarity[0, 1].isnan()
    assert all(name in str(stats) for name in ("weight", "missing", "conflicting"))


def test_masked_branch_does_not_count_in_stats(x):
    model = Model()
    total(model(x, torch.tensor([True, False, True]))).backward()
    masked = model.block.stats()
    gradients(model, x, used=(0, 2))
    unused = model.block.stats()
    for field in ("gram", "weights", "missing", "norms", "cosines", "conflict_rate", "cosine_to_direction"):
        torch.testing.assert_close(getattr(masked, field), getattr(unused, field), equal_nan=True)


def test_stats_per_sample(x):
    model = Model(per="sample")
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[2] = torch.tensor([False, True, False])
    total(model(x, mask)).backward()
    stats = model.block.stats()
    g = torch.stack(materialised(model.shared(x).tanh(), model.block.branches, LOSSES), 1)  # [B, K, H]
    torch.testing.assert_close(stats.gram[0], g[0] @ g[0].mT)
    assert torch.equal(stats.missing, ~mask) and stats.weights.shape == (B, K) and stats.cosines.shape == (B, K, K)
    assert stats.conflict_rate.shape == (B,) and stats.conflict_rate[2].isnan() and not stats.conflict_rate[0].isnan()
    assert "conflicting" in str(stats)


def test_stats_need_a_backward_pass_and_a_gramian(x):
    model = Model()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no backward pass has reached this block yet"):
            model.block.stats()
        model(x)
    model = Model(GradDrop())
    gradients(model, x)
    with pytest.raises(RuntimeError, match="GradDrop works on each element by itself"):
        model.block.stats()


def test_resolver_by_name(x):
    model = Model("grad-vac")
    assert isinstance(model.block.resolver, GradVac)
    y = torch.ones(2, requires_grad=True)
    sum(a.sum() for a in fork(y, 3, "mean", preserve_norm=False)).backward()
    assert y.grad.tolist() == [1, 1]
