"""torch.compile: blocks, operators and the reference models in one graph, once for all steps, with the results of eager mode."""

import copy

import pytest
import torch
from block_model import B, ByLength, H, K, Model, gradients, total
from torch import nn
from torch._dynamo import compiled_autograd, config
from torch._dynamo.utils import counters

import mmfast as mf
from mmfast.blocks.transforms import GRAD_IN_A_GRAPH
from mmfast.models.hivae import HIVAE
from mmfast.models.likelihoods import Bernoulli, Categorical, Joint, LogNormal, Normal, Poisson
from mmfast.models.vae import VAE
from mmfast.resolvers.elementwise import ElementwiseRule

# torch.compile itself uses what torch calls deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
    "ignore:.*should not be instantiated",
    "ignore:Profiler.*record_function",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)

traced = pytest.mark.skipif(
    not GRAD_IN_A_GRAPH, reason="torch 2.10's tracer mixes up what a function of autograd is given, see docs/compilers.md"
)

# samples with every branch, with some, and with none
SAMPLES = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
RULES = {
    "Sum": mf.Sum,
    "Mean": mf.Mean,
    "Constant": lambda: mf.Constant([1.0, 2.0, 3.0]),
    "Random": mf.Random,
    "PCGrad": mf.PCGrad,
    "GradVac": mf.GradVac,
    "MGDA": mf.MGDA,
    "CAGrad": mf.CAGrad,
    "UPGrad": mf.UPGrad,
    "DualProj": mf.DualProj,
    "PCD": mf.PCD,
    "NashMTL": mf.NashMTL,
    "FairGrad": mf.FairGrad,
    "IMTLG": mf.IMTLG,
    "AlignedMTL": mf.AlignedMTL,
    "ConFIG": mf.ConFIG,
    "GradNorm": lambda: mf.GradNorm(alpha=1.0, lr=0.1, update_at=2),
    "NSGD": lambda: mf.NSGD(update_at=2),
    "CRMOGM": lambda: mf.CRMOGM(mf.PCGrad()),
    "Compose": lambda: mf.Compose(mf.GradVac(), mf.Random(), mf.NSGD()),
    "GradDrop": lambda: mf.GradDrop(leak=[0.1, 0.0, 1.0]),
    "NashMTL every 2": lambda: mf.NashMTL(every=2),
    "TrimmedMean": lambda: mf.TrimmedMean(1),
    "own": ByLength,
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    with config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def x():
    return torch.randn(B, 4, dtype=torch.float64)


def whole(f, backend="aot_eager", dynamic=None):
    """f as one graph; where it breaks or is compiled a second time, it raises."""
    return torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)


def equal_buffers(one, two):
    for (name, a), (_, b) in zip(one.named_buffers(), two.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")


def same(ours, expected, rtol=1e-12, atol=1e-14):
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=rtol, atol=atol)


class Heads(nn.Module):
    def __init__(self, resolver, **kwargs):
        super().__init__()
        self.shared = nn.Linear(4, H, dtype=torch.float64)
        self.block = mf.LinearHeads(H, [2] * K, resolver, **kwargs).double()

    def forward(self, x, mask=None):
        return self.block(self.shared(x).tanh(), mask)


CASES = [(name, Model) for name in RULES] + [(name, Heads) for name in ("MGDA", "PCGrad", "GradVac", "PCD", "GradNorm", "Compose", "own")]


@pytest.mark.parametrize("rule, make", CASES, ids=[f"{name}-{make.__name__}" for name, make in CASES])
def test_every_rule_and_its_state(x, rule, make):
    """Three steps, a branch missing in the second: gradients, state and random stream are those of eager mode."""
    eager = make(RULES[rule]())
    model = copy.deepcopy(eager)
    step, missing = whole(model), whole(lambda x: total(model(x), (0, 2)))
    for scale in (1.0, -2.0, 3.0):
        same(gradients(model, scale * x, forward=step), gradients(eager, scale * x))
        equal_buffers(model, eager)
    model.zero_grad()
    missing(x).backward()
    expected = gradients(eager, x, (0, 2))
    for name, p in model.named_parameters():
        zero = torch.zeros_like(p)
        torch.testing.assert_close(zero if p.grad is None else p.grad, expected.get(name, zero), rtol=1e-12, atol=1e-14)
    equal_buffers(model, eager)
    if not isinstance(model.block.resolver, ElementwiseRule):
        assert torch.equal(model.block.stats().missing, eager.block.stats().missing)
    assert not counters["graph_break"]


MASKED = [
    ("mask per sample", mf.Mean, {}, SAMPLES),
    ("mask and local step", ByLength, {"local": [1.0, 2.0, 3.0]}, torch.tensor([True, False, True])),
    ("batch_sum", ByLength, {"per": "batch_sum"}, None),
    ("per sample", mf.MGDA, {"per": "sample"}, SAMPLES),
    ("random per sample", mf.PCGrad, {"per": "sample"}, SAMPLES),
    ("state per sample", mf.GradVac, {"per": "sample"}, SAMPLES),
]


@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
@pytest.mark.parametrize("rule, kwargs, mask", [c[1:] for c in MASKED], ids=[c[0] for c in MASKED])
def test_granularities_and_masks(x, rule, kwargs, mask, make):
    eager = make(rule(), **kwargs)
    if kwargs.get("per") == "sample":
        total(eager(x, mask)).backward()  # makes room for the statistics and state of this batch size
    model = copy.deepcopy(eager)
    step = whole(model)
    for scale in (1.0, -2.0, 3.0):
        same(gradients(model, scale * x, forward=lambda x: step(x, mask)), gradients(eager, scale * x, forward=lambda x: eager(x, mask)))
        one, two = eager.block.stats(), model.block.stats()
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(one.weights, two.weights, rtol=1e-12, atol=1e-14)
        assert torch.equal(one.missing, two.missing)
        equal_buffers(model, eager)


@traced
@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
@pytest.mark.parametrize("rule", ["MGDA", "PCGrad", "GradVac"])
def test_once_for_all_batch_sizes(x, rule, make):
    eager = make(RULES[rule]())
    model = copy.deepcopy(eager)
    step = whole(model, dynamic=True)
    for n in (6, 5, 3):
        same(gradients(model, x[:n].clone(), forward=step), gradients(eager, x[:n]))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_fork(per, dynamic):
    mask, rules = torch.tensor([True, True, False]), [mf.UPGrad(), mf.UPGrad()]

    def step(y, rule):
        a, b, c = mf.fork(y, 3, rule, per=per, mask=mask)
        return a.sin() * b + c.exp() - a

    compiled = whole(step, dynamic=dynamic)
    for n in (B, B - 2) if dynamic else (B, B):
        y = torch.randn(n, H, dtype=torch.float64, requires_grad=True)
        (expected,), (ours,) = (torch.autograd.grad(f(y, rule).sum(), y) for f, rule in zip((step, compiled), rules, strict=True))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rule", ["MGDA", "PCGrad", "GradVac", "Compose", "GradDrop", "TrimmedMean"])
def test_resolve_and_its_parts(rule, dynamic):
    """The operators themselves have the bits of eager mode, dispatcher or not."""
    one = RULES[rule]()
    mf.resolve([torch.randn(4, 6) for _ in range(3)], one)  # makes the state
    two = copy.deepcopy(one)

    def step(rule, *g):
        G = mf.gram(g, "sample")
        return mf.resolve(g, rule), mf.resolve([g[0], None, g[1]], rule), G, mf.weights(G, mf.MGDA()), mf.combine(g, G[0, 0])

    compiled = whole(step, dynamic=dynamic)
    for n in (8, 40) if dynamic else (8, 8):
        g = [torch.randn(n, 6) for _ in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(compiled(two, *g), step(one, *g), strict=True))
        equal_buffers(one, two)


def test_inductor(x):
    eager = Model(mf.GradVac(), local=[1.0, 2.0, 3.0])
    model = copy.deepcopy(eager)
    step = whole(lambda x: total(model(x), (0, 2)), "inductor")
    for _ in range(2):
        expected = gradients(eager, x, (0, 2))
        model.zero_grad()
        step(x).backward()
        for name, p in model.named_parameters():
            zero = torch.zeros_like(p)
            torch.testing.assert_close(zero if p.grad is None else p.grad, expected.get(name, zero), rtol=1e-10, atol=1e-12)
    assert torch.equal(eager.block.stats().missing, model.block.stats().missing)
    equal_buffers(eager, model)


COLUMNS = [(Normal(), 0.5), (LogNormal(), 1.5), (Bernoulli(), 1.0), (Categorical(3), 1.0), (Poisson(), 1.0)]
ROWS = 12


def cells():
    x = torch.stack(
        [torch.randn(ROWS), torch.rand(ROWS) + 0.5, torch.arange(ROWS) % 2.0, torch.arange(ROWS) % 3.0, torch.arange(ROWS) % 4.0], 1
    )
    return x.double(), (torch.rand(ROWS, 5) < 0.9).double()


def reference_model(name, rule):
    joint = Joint([part for part, _ in COLUMNS], torch.tensor([w for _, w in COLUMNS]))
    blocks = 2 if name in ("dreg", "hivae") else 1
    rules = [RULES[rule]() for _ in range(blocks)]
    if name == "hivae":
        return HIVAE(joint, resolvers=rules).double()
    return VAE(joint, 16, 3, rules, name, 1 if name == "elbo" else 2).double()


def train(model, loss, data, seeds):
    """The parameters after a step for each seed, side by side."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        loss(*data).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name, rule", [("elbo", "MGDA"), ("iwae", "PCGrad"), ("dreg", "GradNorm"), ("hivae", "GradVac")])
def test_training_of_the_reference_models(name, rule):
    eager = reference_model(name, rule)
    model, data = copy.deepcopy(eager), cells()
    ours = train(model, whole(model.loss), data, range(3))
    same(ours, train(eager, eager.loss, data, range(3)), rtol=1e-9, atol=1e-12)
    equal_buffers(model, eager)


def test_inductor_trains_a_reference_model():
    from torch._inductor import config as inductor

    eager = reference_model("elbo", "GradVac")
    model, data = copy.deepcopy(eager), cells()
    with inductor.patch(fallback_random=True):  # the noise of eager mode
        ours = train(model, whole(model.loss, "inductor"), data, range(2))
    same(ours, train(eager, eager.loss, data, range(2)), rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not hasattr(config, "trace_autograd_ops"), reason="this torch traces no backward pass inside a graph")
@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
@pytest.mark.parametrize("rule", ["MGDA", "PCGrad", "GradVac"])
def test_backward_pass_inside_the_graph(x, rule, make):
    eager = make(RULES[rule]())
    model = copy.deepcopy(eager)
    names, parameters = zip(*model.named_parameters(), strict=True)
    step = whole(lambda x: torch.autograd.grad(total(model(x)), parameters))
    with config.patch(trace_autograd_ops=True):
        for scale in (1.0, -2.0):
            same(dict(zip(names, step(scale * x), strict=True)), gradients(eager, scale * x))
            equal_buffers(model, eager)


@traced
@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
@pytest.mark.parametrize("rule", ["MGDA", "GradVac"])
def test_func_grad_inside_the_graph(x, rule, make):
    eager = make(RULES[rule]())
    model = copy.deepcopy(eager)
    step = whole(torch.func.grad(lambda p, x: total(torch.func.functional_call(model, p, (x,)))))
    for scale in (1.0, -2.0):
        same(step(dict(model.named_parameters()), scale * x), gradients(eager, scale * x))
        equal_buffers(model, eager)


@pytest.mark.parametrize("dynamic", [False, True])
def test_vmap_inside_the_graph(dynamic):
    step = whole(torch.vmap(lambda *g: (mf.resolve(g, mf.MGDA()), mf.gram(g))), dynamic=dynamic)
    for n in (8, 40) if dynamic else (8, 8):
        g = [torch.randn(n, 6) for _ in range(3)]
        out, G = step(*g)
        assert torch.equal(out, mf.resolve(g, mf.MGDA(), "sample")) and torch.equal(G, mf.gram(g, "sample"))


@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
def test_a_block_in_a_compiled_vmap_is_refused(x, make):
    """Not its plain sum. Without fullgraph the graph breaks there; without gradients there is nothing to lose."""
    eager = make(mf.MGDA())
    model = copy.deepcopy(eager)
    every = lambda model: lambda x: torch.vmap(lambda x: total(model(x.unsqueeze(0))))(x)
    with pytest.raises(RuntimeError, match="a block inside vmap can't be compiled"):
        whole(every(model))(x)
    with pytest.raises(RuntimeError, match="a block inside vmap can't be compiled" if GRAD_IN_A_GRAPH else "which torch .* can't trace"):
        whole(torch.func.grad(lambda p, x: every(lambda x: torch.func.functional_call(model, p, x))(x).sum()))(
            dict(model.named_parameters()), x
        )
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(whole(every(model))(x), every(eager)(x))
    torch._dynamo.reset()
    broken = torch.compile(every(model), backend="aot_eager")
    same(gradients(model, x, (0,), lambda x: [broken(x).sum()]), gradients(eager, x, (0,), lambda x: [every(eager)(x).sum()]))


class Times(nn.Module):
    def forward(self, y, x):
        return y * x


def test_a_local_step_in_a_compiled_vmap_is_refused(x):
    """Where the shared tensor itself is not mapped."""
    block = mf.ImpartialityBlock([Times(), Times()], mf.MGDA(), local=[1.0, 2.0])
    with pytest.raises(RuntimeError, match="a block inside vmap can't be compiled"):
        whole(lambda y, x: torch.vmap(lambda x: sum(out.sum() for out in block(y, x=x)))(x).sum())(x[0], x)


@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
def test_double_backward_is_refused(x, make):
    x.requires_grad_()
    step = whole(lambda x: total(model(x)))
    model = make(mf.MGDA())
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(step(x), x, create_graph=True)


@pytest.mark.parametrize("make", [Model, Heads], ids=["block", "heads"])
@pytest.mark.parametrize("rule", ["MGDA", "PCGrad"])
def test_compiled_autograd_of_an_eager_forward_pass(x, rule, make):
    eager = make(RULES[rule]())
    model = copy.deepcopy(eager)
    for scale in (1.0, -2.0):
        expected = gradients(eager, scale * x)
        model.zero_grad()
        loss = total(model(scale * x))
        with config.patch(error_on_recompile=False), compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
            loss.backward()
        same({name: p.grad for name, p in model.named_parameters()}, expected)
        equal_buffers(model, eager)


def test_compiled_autograd_of_a_compiled_forward_pass_is_refused(x):
    for make in (Model, Heads):
        with config.patch(compiled_autograd=True), pytest.raises(RuntimeError, match="leave torch._dynamo.config.compiled_autograd off"):
            whole(make(mf.MGDA()))(x)


def test_a_forward_pass_alone_needs_no_state(x):
    model = Model(mf.GradVac(), per="sample").requires_grad_(False)
    with config.patch(compiled_autograd=True):
        assert all(torch.equal(a, b) for a, b in zip(whole(model)(x), model(x), strict=True))


def test_state_that_a_compiled_pass_cannot_create_is_refused():
    resolver, y = mf.GradVac(), torch.ones(3, requires_grad=True)
    compiled = torch.compile(lambda y: mf.fork(y, 2, resolver), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="run one step without torch.compile first"):
        compiled(y)
