"""Gradient modulation under torch.compile: the beta of a step is that of its own backward pass, wherever `update` is called."""

import copy

import pytest
import torch
from modulation_models import KINDS, Late, Shared, data, gradients, loss_of, step
from torch._dynamo import config

import mmfast as mf

# torch.compile itself uses what torch calls deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
    "ignore:.*should not be instantiated",
    "ignore:Profiler.*record_function",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def whole(f, backend="aot_eager"):
    return torch.compile(f, fullgraph=True, backend=backend)


def make(where, kind):
    torch.manual_seed(0)
    scale = KINDS[kind](2)
    return (Late(scale) if where == "encoders" else Shared(where, mf.UPGrad(), scale)), scale


def same(ours, theirs):
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


CASES = [("OGM", where, update) for where in ("encoders", "block", "heads") for update in ("outside", "inside")]
CASES += [("OGM", "encoders", "by itself"), ("AGM", "encoders", "inside"), ("CGGM", "encoders", "inside")]


@pytest.mark.parametrize("kind, where, update", CASES)
def test_three_steps(kind, where, update):
    """Every step has another beta; a graph that kept an earlier one would differ."""
    model, scale = make(where, kind)
    eager = copy.deepcopy(model)
    its = eager.scale if where == "encoders" else eager.block.modulation

    def forward_and_update(x, labels):
        logits = model(x)
        scale.update(logits, labels)
        return loss_of(logits, labels)

    forward, alone, joint = whole(model), whole(scale.update), whole(forward_and_update)
    betas = set()
    for seed in range(3):
        x, labels = data(seed)
        if update == "inside":
            model.zero_grad()
            joint(x, labels).backward()
            ours = gradients(model)
        elif update == "outside":
            ours = step(model, scale, x, labels, forward)
        else:
            model.zero_grad()
            logits = forward(x)
            alone(logits, labels)
            loss_of(logits, labels).backward()
            ours = gradients(model)
        same(ours, step(eager, its, x, labels))
        torch.testing.assert_close(scale.beta, its.beta)
        betas.add(tuple(scale.beta.tolist()))
    assert len(betas) > 1


def test_inductor():
    model, scale = make("encoders", "OGM")
    eager = copy.deepcopy(model)

    def forward_and_update(x, labels):
        logits = model(x)
        scale.update(logits, labels)
        return loss_of(logits, labels)

    joint = whole(forward_and_update, "inductor")
    for seed in range(2):
        model.zero_grad()
        joint(*data(seed)).backward()
        same(gradients(model), step(eager, eager.scale, *data(seed)))


@pytest.mark.skipif(not hasattr(config, "trace_autograd_ops"), reason="this torch traces no backward pass inside a graph")
def test_one_graph_with_the_backward_pass_is_refused():
    model, scale = make("encoders", "OGM")
    parameters = list(model.parameters())

    def everything(x, labels):
        logits = model(x)
        scale.update(logits, labels)
        return torch.autograd.grad(loss_of(logits, labels), parameters)

    with config.patch(trace_autograd_ops=True), pytest.raises(RuntimeError, match="one graph with its backward pass"):
        whole(everything)(*data())


def test_an_export_has_no_trace_of_it():
    model, _ = make("encoders", "OGM")
    x = data()[0]
    program = torch.export.export(model, (x,))
    assert "mmfast" not in str(program.graph)
    for a, b in zip(program.module()(x), model(x), strict=True):
        torch.testing.assert_close(a, b)
