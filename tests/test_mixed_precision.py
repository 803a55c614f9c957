"""Mixed precision: autocast, the scale of a GradScaler, and gradients that are not finite."""

import copy

import pytest
import torch
from rule_table import RULES
from torch import nn

import mmfast as mf
from mmfast import ops
from mmfast.backends import direct, library
from mmfast.ops.heads import heads as linear_heads
from mmfast.resolvers.elementwise import ElementwiseRule

IN, H, SIZES, B, SCALE = 6, 8, (3, 1, 2, 4), 16, 2.0**10
K = len(SIZES)
HALVES = [torch.float16, torch.bfloat16]


class Model(nn.Module):
    """A shared layer and K linear branches: behind a block, or in one operator."""

    def __init__(self, kind, resolver, **kwargs):
        super().__init__()
        self.shared = nn.Linear(IN, H)
        if kind == "heads":
            self.block = mf.LinearHeads(H, SIZES, resolver, **kwargs)
        else:
            self.block = mf.ImpartialityBlock([nn.Linear(H, n) for n in SIZES], resolver, **kwargs)

    def forward(self, x):
        return self.block(self.shared(x).tanh())


kinds = pytest.mark.parametrize("kind", ["block", "heads"])


def loss_of(outputs):
    return sum((i + 1) * (o.float() - i).square().mean() for i, o in enumerate(outputs))


def gradients(model, x, dtype=None, scale=1.0, inside=False):
    """The parameters' gradients of the scaled loss; `inside` runs the backward pass under autocast too."""
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = loss_of(model(x)) * scale
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@kinds
def test_autocast_is_near_single_precision(kind, per, dtype, inside):
    model, x = Model(kind, mf.UPGrad(), per=per, local=[1.0, 2.0, 3.0, 4.0]), torch.randn(B, IN)
    expected = gradients(model, x)
    weights = model.block.stats().weights
    found = gradients(model, x, dtype, inside=inside)
    assert all(g.dtype == torch.float32 for g in found.values())
    eps = torch.finfo(dtype).eps
    if per != "sample":  # a sample whose gradients hardly conflict may change sides
        torch.testing.assert_close(model.block.stats().weights, weights, rtol=40 * eps, atol=40 * eps)
        for name, g in expected.items():
            assert (found[name] - g).norm() <= 40 * eps * g.norm(), name


def bits(per, dtype):
    grads, mask = [g.to(dtype) for g in torch.randn(K, B, 5000)], torch.rand(B, K) < 0.7
    delta, weight, head_of = torch.randn(B, 5).to(dtype), torch.randn(5, 7).to(dtype), torch.tensor([0, 0, 1, 2, 3])
    return [
        mf.gram(grads, per, mask=mask, backend="reference"),
        *ops.resolve_info(grads, mf.UPGrad(), per, mask, preserve_norm=True, backend="reference"),
        linear_heads(delta, weight, head_of, mf.MGDA(), K, per, None, True, "reference")[1],  # weights and Gramian
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_autocast_does_not_reach_plain_torch(per, dtype):
    expected = bits(per, dtype)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        found = bits(per, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("inside", [False, True])
@kinds
def test_autocast_does_not_reach_a_compiled_backward_pass_in_plain_torch(kind, inside, monkeypatch):
    """What a graph on another device does: the Gramian of the branches' gradients, which autocast does round, is that of eager mode."""
    torch._dynamo.reset()
    monkeypatch.setattr(library, "available", False)
    monkeypatch.setattr(direct, "_direct", None)
    eager, x = Model(kind, mf.ConFIG()), torch.randn(B, IN)
    model = copy.deepcopy(eager)
    expected = gradients(eager, x, torch.bfloat16)
    step = torch.compile(lambda x: loss_of(model(x)), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(x)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    one, two = eager.block.stats(), model.block.stats()
    torch.testing.assert_close(two.gram, one.gram, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(two.weights, one.weights, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@kinds
def test_autocast_leaves_double_precision_alone(kind):
    """As it does in nn.Linear."""
    model, x = Model(kind, mf.UPGrad()).double(), torch.randn(B, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(out.dtype == torch.float64 for out in model(x))
    expected, found = gradients(model, x), gradients(model, x, torch.bfloat16, inside=True)
    assert all(torch.equal(found[name], g) for name, g in expected.items())


@pytest.fixture
def lowered():
    """Products of float32 matrices in as few bits as torch has for them, where the processor has units for that."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_setting_of_torch_lowers_a_gramian(backend, per, lowered):
    """TF32 and bfloat16 for products of float32 matrices: what is left of gradients that cancel would be below their rounding."""
    if backend == "cpu" and not library.available:
        pytest.skip(str(library.missing_reason))
    limit = 4e-7 if backend == "cpu" else 1.2e-7  # plain torch multiplies in double precision, and rounds once
    shared = 100 * torch.randn(3, 20_000)
    grads = [shared + torch.randn(3, 20_000) for _ in range(4)]
    J = torch.stack(grads).double()
    J = J.sum(1) if per == "batch_sum" else J.movedim(1, 0) if per == "sample" else J.flatten(1)
    torch.testing.assert_close(mf.gram(grads, per=per, backend=backend), J @ J.mT, rtol=limit, atol=0)
    delta, weight, head_of = torch.randn(200, 8), torch.randn(8, 300), torch.arange(4).repeat_interleave(2)
    J = torch.stack([delta[:, head_of == i].double() @ weight[head_of == i].double() for i in range(4)]).flatten(1)
    _, info = linear_heads(delta, weight, head_of, mf.MGDA(), 4, "batch", None, False, backend)
    assert ((info[4:].view(4, 4) - J @ J.T).abs() / J.norm(dim=1).outer(J.norm(dim=1))).max() < limit


def test_a_device_without_autocast():
    heads = mf.LinearHeads(4, [1, 2], mf.MGDA()).to("meta")
    assert [out.shape for out in heads(torch.randn(3, 4, device="meta"))] == [(3, 1), (3, 2)]


SCALED = {name: row for name, row in RULES.items() if row.power is not None}


@pytest.mark.parametrize("name", SCALED)
def test_the_scale_changes_no_weight_but_by_its_power(name):
    """A power of two changes no rounding either: the same bits where the rule is homogeneous of degree zero."""
    row, k = SCALED[name], max(K, SCALED[name].min_k)
    one = row.make(k)
    if isinstance(one, ElementwiseRule):
        pytest.skip("has no weights")
    two = copy.deepcopy(one)
    grads = [torch.randn(500) for _ in range(k)]
    for _ in range(3):  # state goes on alike
        a, b = (mf.weights(mf.gram([s * g for g in grads]), rule) for s, rule in ((1.0, one), (SCALE, two)))
        if row.power == 0:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(b, a * SCALE ** (2 * row.power), rtol=1e-9, atol=0)


@pytest.mark.parametrize("make", [lambda: mf.GradDrop(leak=0.1), lambda: mf.TrimmedMean(1)])
def test_the_scale_changes_no_choice_of_an_element(make):
    torch.manual_seed(0)
    one = make()
    two, grads = copy.deepcopy(one), [torch.randn(500) for _ in range(K)]
    assert torch.equal(mf.resolve(grads, one) * SCALE, mf.resolve([g * SCALE for g in grads], two))


def test_all_rules_are_here():
    """What the table calls invariant are all but these, whose weights go with the size of the gradients, as their papers have it."""
    assert {name for name, row in RULES.items() if row.power != 0} == {
        "NashMTL", "NashMTL(max_norm)", "NashMTL every 2", "FairGrad(0.5)", "FairGrad", "FairGrad(2)", "MGDA l2", "Unit",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [None, *HALVES])
@pytest.mark.parametrize(
    "rule", [mf.MGDA, mf.PCGrad, mf.GradVac, mf.UPGrad, mf.NashMTL, mf.FairGrad, mf.GradNorm], ids=lambda r: r.__name__
)
@kinds
def test_the_scale_of_the_loss_changes_no_direction(kind, rule, dtype):
    """A block keeps the norm of the plain sum, so that even rules whose weights know the scale give the scaled gradient."""
    one, x = Model(kind, rule()), torch.randn(B, IN)
    two = copy.deepcopy(one)
    for turn in range(3):
        a, b = gradients(one, x + turn, dtype), gradients(two, x + turn, dtype, SCALE)
        rtol = 1e-5 if dtype is None else 8 * torch.finfo(dtype).eps  # float16 keeps more of small numbers when they are scaled
        for name in a:
            assert (b[name] / SCALE - a[name]).norm() <= rtol * a[name].norm(), (turn, name)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rule", [mf.MGDA, mf.PCGrad, mf.GradVac, mf.GradNorm, mf.PCD], ids=lambda r: r.__name__)
@kinds
def test_grad_scaler_skips_a_step_that_is_not_finite(kind, rule, dtype, bad):
    model = Model(kind, rule())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def step(x, factor=0.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            outputs = model(x)
            loss = loss_of(outputs) + factor * outputs[1][3].sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def everything():
        return {name: t.clone() for name, t in model.state_dict().items() if not name.endswith("rng")}

    x = torch.randn(B, IN)
    before = everything()
    step(x)
    after = everything()
    assert any(not torch.equal(before[name], after[name]) for name in before) and scaler.get_scale() == SCALE
    step(x, bad)
    assert scaler.get_scale() == SCALE / 2
    assert all(torch.equal(t, after[name]) for name, t in everything().items())  # parameters, and what the rule keeps
    step(x)
    assert all(t.isfinite().all() for t in everything().values())


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", RULES)
def test_what_is_not_finite_arrives(name, bad, dtype):
    """No rule may zero it away, not even one that gives its gradient no weight: the scaler would not see it."""
    k = max(K, RULES[name].min_k)
    for i in range(k):
        grads = [torch.randn(300).to(dtype) for _ in range(k)]
        grads[i][7] = bad
        assert not mf.resolve(grads, RULES[name].make(k)).isfinite().all(), i


@pytest.mark.parametrize("rule", [lambda: mf.GradDrop(leak=0.1), lambda: mf.TrimmedMean(1)])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_arrives_element_by_element(rule, bad):
    grads = [torch.randn(300) for _ in range(K)]
    grads[1][7] = bad
    assert not mf.resolve(grads, rule())[7].isfinite()


@pytest.mark.parametrize("dtype", HALVES)
@kinds
def test_gradients_beyond_the_range_of_half_are_seen(kind, dtype):
    """A scale that overflows float16 in the branches is the scaler's business: it must see that."""
    model, x = Model(kind, mf.UPGrad()), torch.randn(B, IN)
    found = gradients(model, x, dtype, 2.0**24)
    assert all(g.isfinite().all() for g in found.values()) == (dtype == torch.bfloat16)
