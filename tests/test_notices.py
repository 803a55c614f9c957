"""What a backward pass says: branches that come apart, shards that are resolved apart; once, where it is meant, and nowhere else."""

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmfast as mf
from mmfast.blocks import notices

MAKES = {
    "fork": lambda rule, **kwargs: lambda y: mf.fork(y, 3, rule, **kwargs),
    "block": lambda rule, **kwargs: mf.ImpartialityBlock([nn.Linear(4, 2) for _ in range(3)], rule, **kwargs),
    "local": lambda rule, **kwargs: mf.ImpartialityBlock([nn.Linear(4, 2) for _ in range(3)], rule, local=[1.0, 2.0, 3.0], **kwargs),
    "heads": lambda rule, **kwargs: mf.LinearHeads(4, [2, 1, 3], rule, **kwargs),
    "local heads": lambda rule, **kwargs: mf.LinearHeads(4, [2, 1, 3], rule, local=[1.0, 2.0, 3.0], **kwargs),
}
every = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
APART = r"a second backward call went through .* sum\(losses\)\.backward\(\)"


def losses_of(make):
    return [output.square().sum() for output in make(torch.randn(5, 4, requires_grad=True) * 2)]


def told(step):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    return [str(warning.message) for warning in seen]


@every
@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
def test_one_backward_call_for_each_loss(make, per):
    block = make(mf.MGDA(), per=per)

    def step():
        losses = losses_of(block)
        for loss in losses[:-1]:
            loss.backward(retain_graph=True)
        losses[-1].backward()

    with pytest.warns(UserWarning, match=APART) as seen:
        step()
    assert len(seen) == 1 and seen[0].filename == __file__ and "(first 0; then 1)" in str(seen[0].message)
    assert told(step) == []  # once for a block


@every
def test_gradients_taken_for_each_loss_or_part_of_them(make):
    for step in (
        lambda y, losses: [torch.autograd.grad(loss, y, retain_graph=True) for loss in losses],
        lambda y, losses: [torch.stack(losses)[i].backward(retain_graph=True) for i in range(2)],  # the others send zeros
        lambda y, losses: [sum(some).backward(retain_graph=True) for some in (losses, losses[:2])],
        lambda y, losses: [loss.backward(inputs=[y], retain_graph=True) for loss in losses[:2]],
    ):
        y = torch.randn(5, 4, requires_grad=True)
        losses = [output.square().sum() for output in make(mf.MGDA())(y * 2)]
        with pytest.warns(UserWarning, match=APART):
            step(y, losses)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_other_kinds_of_gradients(kind):
    y = torch.randn(6, 3, dtype=torch.complex64 if kind == "complex" else torch.float32, requires_grad=True)
    one, other, _ = mf.fork(y * 2, 3, mf.MGDA())
    if kind == "sparse":
        one = nn.functional.embedding(torch.tensor([1, 2]), one, sparse=True)
    one.abs().square().sum().backward(retain_graph=True)
    with pytest.warns(UserWarning, match=APART):
        other.abs().sum().backward()


@every
def test_the_same_branches_again_are_fine(make):
    block = make(mf.Sum(), preserve_norm=False)

    def again():
        for some in (slice(3), slice(2)):
            loss = sum(losses_of(block)[some])
            loss.backward(retain_graph=True)
            (3 * loss).backward(retain_graph=True)
            loss.backward()

    def accumulate():
        for i in range(3):  # each has a forward pass of its own
            losses_of(block)[i].backward()

    def recompute():
        for reentrant in (False, True):
            y = torch.randn(5, 4, requires_grad=True)
            outputs = checkpoint(lambda y: tuple(block(y * 2)), y, use_reentrant=reentrant)
            sum(output.square().sum() for output in outputs).backward()

    def func():
        torch.func.jacrev(lambda y: torch.stack([output.sum() for output in block(y)]))(torch.randn(5, 4))

    for step in (again, accumulate, recompute, func):
        assert told(step) == [], step.__name__


@every
def test_numerical_checks_go_back_piecemeal_by_design(make):
    block = make(mf.Sum(), preserve_norm=False)
    y = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    if isinstance(block, nn.Module):
        block.double()
    assert told(lambda: torch.autograd.functional.jacobian(lambda y: tuple(block(y)), y)) == []
    if getattr(block, "beta", None) is None:  # a local step's gradient is that of no difference quotient
        assert told(lambda: torch.autograd.gradcheck(lambda y: tuple(block(y)), (y,))) == []


@every
def test_a_process_group_is_up(make, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    step = lambda block: sum(losses_of(block)).backward()
    for ranks, per, expected in ((1, "batch", 0), (4, "sample", 0), (4, "batch", 1), (4, "batch_sum", 1)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None, ranks=ranks: ranks)
        block = make(mf.MGDA(), per=per)
        seen = told(lambda block=block: step(block)) + told(lambda block=block: step(block))
        assert len(seen) == expected and all("a process group of 4 ranks is up" in words for words in seen)


def test_parameters_of_a_process_group(monkeypatch):
    """DDP's hooks do not run in mf.backward: without group= the ranks would drift apart."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for ranks, low_memory in ((1, False), (3, False), (3, True)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None, ranks=ranks: ranks)
        rule, net = mf.MGDA(), nn.Linear(4, 2)

        def step(rule=rule, net=net, low_memory=low_memory):
            first, second = net(torch.randn(5, 4)).sum(0)
            mf.backward([first, second], rule, low_memory=low_memory)

        seen = told(step) + told(step)
        assert len(seen) == (ranks > 1) and all("a process group of 3 ranks is up: mmfast.backward" in words for words in seen)


RANK = """
import os, sys, warnings, torch, mmfast as mf
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
rule = mf.MGDA()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("default")
    for _ in range(3):
        y = torch.randn(4, 3, requires_grad=True)
        sum((a * i).sum() for i, a in enumerate(mf.fork(y, 3, rule))).backward()
print(len(seen), "process group of 2 ranks" in str(seen[0].message))
torch.distributed.barrier()  # the other one may still be connecting
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups")
def test_two_ranks(tmp_path):
    runs = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [run.communicate(timeout=120)[0].splitlines()[-1] for run in runs] == ["1 True"] * 2  # gloo may write before it


def test_branches_are_looked_at_a_few_times(monkeypatch):
    """Looking reads every gradient; a program that keeps its graphs pays for that at its start only."""
    from mmfast.blocks import notices

    calls, look = [], notices.present_branches
    monkeypatch.setattr(notices, "present_branches", lambda grads: calls.append(1) or look(grads))
    rule = mf.MGDA()
    for _ in range(3 * notices.LOOKS):
        y = torch.randn(5, requires_grad=True)
        sum(a.sum() for a in mf.fork(y, 2, rule)).backward(retain_graph=True)
    assert len(calls) == notices.LOOKS


@every
def test_a_checkpoint_whose_graph_is_kept(make):
    """Its tensors can be unpacked once in a backward pass: a look at the branches must not do it a second time."""
    block, y = make(mf.MGDA()), torch.randn(5, 4, requires_grad=True)
    loss = checkpoint(lambda y: sum(output.square().sum() for output in block(y * 2)), y, use_reentrant=False)
    assert told(lambda: loss.backward(retain_graph=True)) == [] and y.grad.isfinite().all()


HEADS = [nn.Linear(3, 1), nn.Linear(3, 1)]


@pytest.mark.parametrize("make", [lambda rule: mf.ImpartialityBlock(HEADS, rule), lambda rule: mf.LinearHeads(4, [1, 1], rule)])
@pytest.mark.parametrize("rule", [mf.GradNorm(), mf.Compose(mf.NSGD(), mf.PCGrad()), mf.CRMOGM(mf.MGDA()), mf.MoDo()], ids=repr)
def test_a_rule_with_state_serves_one_block(make, rule):
    """Said where a second block takes it; not of a copy, or of the block's successor."""
    rule = copy.deepcopy(rule)
    one = make(rule)
    assert "which keeps state from call to call and is another block's already" in told(lambda: make(rule))[0]
    one = make(copy.deepcopy(rule))
    assert not told(lambda: make(rule)) and one
    with mf.attach(HEADS, copy.deepcopy(rule)) as handle:
        assert told(lambda: make(handle.resolver))
    assert not told(lambda: mf.attach(HEADS, handle.resolver).remove())


def test_a_rule_without_state_serves_many():
    rule = mf.MGDA()
    assert not told(lambda: [mf.ImpartialityBlock(HEADS, rule), mf.LinearHeads(4, [1, 1], rule)])


class Waits(torch.autograd.Function):
    """Holds its backward pass back until it is told to go on."""

    @staticmethod
    def forward(ctx, x, arrived, go_on):
        ctx.events = arrived, go_on
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        arrived, go_on = ctx.events
        arrived.set()
        assert go_on.wait(60)
        return grad, None, None


@every
@pytest.mark.parametrize("other", ["backward", "low memory", "collect", "find_blocks"])
def test_a_model_in_another_thread(make, other):
    """While one thread differentiates its losses one by one, the blocks of another one resolve as ever, and afterwards too."""
    block = make(mf.MGDA())
    x = torch.randn(5, 4)

    def step():
        y = x.clone().requires_grad_()
        sum((i - 1) * output.square().sum() + output.sum() for i, output in enumerate(block(y))).backward()
        return y.grad

    alone, events = step(), (threading.Event(), threading.Event())
    p = nn.Parameter(torch.randn(3))

    def train():
        first, second = Waits.apply(p, *events).sum(), p.square().sum()
        if other == "collect":
            with mf.collect(2, mf.UPGrad(), [p]) as collected, collected(0):
                first.backward()
        elif other == "find_blocks":
            mf.find_blocks([first, second])
        else:
            mf.backward([first, second], mf.UPGrad(), low_memory=other == "low memory")

    thread = threading.Thread(target=train)
    thread.start()
    assert events[0].wait(60)
    meanwhile = step()
    events[1].set()
    thread.join()
    assert torch.equal(meanwhile, alone) and torch.equal(step(), alone)
    with notices.taking_apart():
        assert not torch.allclose(step(), alone)  # so that the test could fail
