"""torch.compile over torch.func: the resolved gradient, or a refusal in words; never the plain sum, never a second derivative."""

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacrev, vjp, vmap

import mmfast as mf
from mmfast.blocks import transforms

# torch.compile itself uses what torch calls deprecated
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:torch",
        "ignore::FutureWarning:torch",
        "ignore:.*should not be instantiated",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
    )
]
traced = pytest.mark.skipif(not transforms.GRAD_IN_A_GRAPH, reason="this torch traces no torch.func.grad over a function of autograd")
x = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def branches():
    return [nn.Linear(5, 2, dtype=torch.float64) for _ in range(3)]


MAKES = {
    "fork": lambda rule, **kwargs: lambda y: mf.fork(y, 3, rule, **kwargs),
    "block": lambda rule, **kwargs: mf.ImpartialityBlock(branches(), rule, **kwargs),
    "local": lambda rule, **kwargs: mf.ImpartialityBlock(branches(), rule, local=[1.0, 2.0, 3.0], **kwargs),
    "heads": lambda rule, **kwargs: mf.LinearHeads(5, [2, 2, 2], rule, **kwargs).double(),
    "frozen heads": lambda rule, **kwargs: mf.LinearHeads(5, [2, 2, 2], rule, **kwargs).double().requires_grad_(False),
}
every = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss(block, behind):
    """The shared tensor is what is differentiated, or behind an operation on it."""
    return lambda y: sum((output - i).tanh().square().mean() * (i + 1) for i, output in enumerate(block((y * 1.5).tanh() if behind else y)))


def whole(f):
    return torch.compile(f, fullgraph=True, backend="aot_eager")


MAPPED = {
    "vmap(grad)": lambda f: vmap(grad(f)),
    "vmap(vjp)": lambda f: vmap(lambda y: vjp(f, y)[1](torch.ones((), dtype=y.dtype))[0]),
    "vmap over another": lambda f: lambda x: vmap(lambda s: grad(lambda y: f(y) * s)(x[0]))(x[:, 0, 0]),
}


@traced
@every
@pytest.mark.parametrize("behind", [False, True])
def test_vmap_of_a_gradient(make, behind):
    f = loss(make(mf.MGDA()), behind)
    for name, transform in MAPPED.items():
        with pytest.raises(RuntimeError, match="a block inside vmap can't be compiled"):
            whole(transform(f))(x)
        torch._dynamo.reset()
        if name == "vmap(grad)":  # where the graph may break, it does
            torch.testing.assert_close(torch.compile(transform(f), backend="aot_eager")(x), transform(f)(x))
            torch._dynamo.reset()


TWICE = {
    "grad(grad)": lambda f: grad(lambda y: grad(f)(y).square().sum()),
    "vjp(grad)": lambda f: lambda y: vjp(grad(f), y)[1](torch.ones_like(y))[0],
    "jacrev(grad)": lambda f: jacrev(grad(f)),
    "hessian": hessian,
}


@traced
@every
@pytest.mark.parametrize("transform", TWICE.values(), ids=TWICE.keys())
def test_second_derivatives(make, transform):
    for behind in (False, True):
        f = transform(loss(make(mf.MGDA()), behind))
        with pytest.raises(RuntimeError, match="has no gradient of its own"):
            whole(f)(x[0])
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="has no gradient of its own"):
            torch.compile(f, backend="aot_eager")(x[0])
        torch._dynamo.reset()


@traced
@every
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_one_gradient_is_the_resolved_one(make, per, behind):
    """Where the shared tensor itself is differentiated, no tensor says in the trace that it wants a gradient."""
    f = loss(make(mf.MGDA(), per=per), behind)
    for transform in (grad(f), jacrev(f)):
        torch.testing.assert_close(whole(transform)(x[0]), transform(x[0]), rtol=1e-9, atol=1e-12)
        torch._dynamo.reset()


@traced
@pytest.mark.parametrize("rule", [mf.TrimmedMean, lambda k: mf.GradVac(), lambda k: mf.GradDrop(), lambda k: mf.GradNorm(lr=0.1)])
def test_other_rules(rule):
    make = lambda: mf.ImpartialityBlock(branches(), rule(1))
    torch.manual_seed(2)
    one = loss(make(), False)
    torch.manual_seed(2)
    two = loss(make(), False)
    compiled = whole(grad(one))
    for _ in range(2):
        torch.testing.assert_close(compiled(x[0]), grad(two)(x[0]), rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="a block inside vmap can't be compiled"):
        whole(vmap(grad(one)))(x)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="has no gradient of its own"):
        whole(TWICE["grad(grad)"](one))(x[0])


@every
@pytest.mark.parametrize("name", ["GRAD_IN_A_GRAPH", "BREAKS_INSIDE_GRAD"])
def test_an_older_torch_ends_while_it_traces(make, name, monkeypatch):
    """With or without fullgraph: torch 2.10 and 2.11 give zeros for jacrev(grad) where the graph breaks inside, of any function."""
    monkeypatch.setattr(transforms, name, False)
    f = loss(make(mf.MGDA()), True)
    refused = [(jacrev(grad(f)), "has no gradient of its own")]
    if name == "GRAD_IN_A_GRAPH":
        refused += [
            (transform(f), "inside torch.compile, which torch .* can't trace; expected torch 2.11 or later") for transform in (grad, jacrev)
        ]
    for transform, text in refused:
        for fullgraph in (True, False):
            with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError, match=text):
                torch.compile(transform, fullgraph=fullgraph, backend="aot_eager")(x[0])
            torch._dynamo.reset()
