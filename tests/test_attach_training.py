"""attach in the loops of others: complex tensors, copies of the model, compiled models, checkpointing, objects, changes in place."""

import copy
import dataclasses
import pickle

import pytest
import torch
from test_attach import X, assert_same, built_in, grads, loss, model
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmfast as mf


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("also_real", [False, True])
def test_complex_tensors(per, also_real):
    """As a block that is built in: a complex number counts as a pair of real ones."""
    rule = lambda: mf.MGDA()
    x = torch.randn(6, 5, dtype=torch.complex128)

    def run(branches, z, real):
        a, b = (branch(z, real) for branch in branches)
        return (a.abs().square().sum() - 2 * b.real.sum() + b.imag.square().sum()).real

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2, dtype=torch.complex128)

        def forward(self, z, real):
            return self.layer(z * real)

    branches, gradients = [Branch(), Branch()], []
    for attached in (True, False):
        z, real = x.clone().requires_grad_(), x.real.clone().requires_grad_(also_real)
        if attached:
            with mf.attach(branches, rule(), per=per) as handle:
                run(branches, z * 1j, real * 2).backward()
            assert not handle.stats().missing.any()
        else:
            aliases = mf.fork([z * 1j, real * 2], 2, rule(), per=per) if also_real else None
            if aliases is None:
                aliases = [(a, real * 2) for a in mf.fork(z * 1j, 2, rule(), per=per)]
            calls = iter(aliases)
            run([lambda *_, branch=branch, calls=calls: branch(*next(calls)) for branch in branches], None, None).backward()
        gradients.append([z.grad, real.grad])
    for ours, wanted in zip(*gradients, strict=True):
        assert (ours is None) == (wanted is None) and (ours is None or torch.allclose(ours, wanted, 1e-12))
    plain = x.clone().requires_grad_()
    run(branches, plain * 1j, x.real * 2).backward()
    assert not torch.allclose(gradients[0][0], plain.grad, 1e-3)


def copied(net, how):
    return copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("local", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("make", [mf.GradVac, mf.PCGrad, mf.UPGrad])
def test_a_copy_of_the_model_has_a_block_of_its_own(make, local, how):
    """As with a block that is built in: teachers, clients of federated learning, models that are averaged."""
    net = model()
    handle = mf.attach(net.heads, make(), local=local)
    loss(net(X)).backward()  # it has met tensors, and has a state
    net(X)  # and meets some that never go back
    other = copied(net, how)
    kept = {name: value.clone() for name, value in handle.state_dict().items()}
    weights = handle.stats().weights
    results = []
    for _ in range(2):
        other.zero_grad()
        loss(other(2 * X)).backward()
        results.append(grads(other))
    assert all(torch.equal(kept[name], value) for name, value in handle.state_dict().items())  # nothing of it moved
    assert torch.equal(handle.stats().weights, weights)
    for expected in results:
        net.zero_grad()
        loss(net(2 * X)).backward()
        assert_same(grads(net), expected)  # which goes on as the copy did
    handle.remove()
    (copied_handle,) = {hook.handle for head in other.heads for hook in head._forward_pre_hooks.values()}
    assert copied_handle is not handle and not any(head._forward_pre_hooks for head in net.heads)
    copied_handle.remove()
    other.zero_grad(), net.zero_grad()
    loss(other(X)).backward(), loss(net(X)).backward()
    assert_same(grads(other), grads(net))


def test_a_copy_of_one_branch_meets_nobody():
    net = model()
    with mf.attach(net.heads, mf.UPGrad()):
        heads = [copy.deepcopy(net.heads[0]) for _ in range(3)]
        y = net.encoder(X)
        y.retain_grad()
        loss([head(y) for head in heads]).backward()
    plain = y.detach().requires_grad_()
    for head in heads:
        head._forward_pre_hooks.clear()
    loss([head(plain) for head in heads]).backward()
    torch.testing.assert_close(y.grad, plain.grad)


@pytest.mark.parametrize("kind", ["dataclass", "nested", "tensor beside it"])
def test_tensors_in_an_object_are_said(kind):
    """Where hooks do not look nothing is resolved."""

    @dataclasses.dataclass
    class Batch:
        x: object
        size: int = 3

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, batch, index=None):
            return self.layer(batch.x["h"][0] if isinstance(batch.x, dict) else batch.x)

    net, branches = model(), [Branch(), Branch()]
    rest = (torch.arange(3),) if kind == "tensor beside it" else ()

    def step():
        y = net.encoder(X)
        batch = Batch({"h": [y]} if kind == "nested" else y)
        (branches[0](batch, *rest).sum() - branches[1](batch, *rest).sum()).backward()

    with mf.attach(branches, mf.UPGrad()):
        with pytest.warns(
            UserWarning, match="branch 0 of mmfast.attach was called with a Batch, in which attach looks for no tensors"
        ) as seen:
            step()
        assert len(seen) == 1
        step()  # once
    with mf.attach(branches, mf.UPGrad()), torch.no_grad():  # nothing to resolve, nothing to say
        branches[0](Batch(net.encoder(X)))
    net.encoder.requires_grad_(False)
    with mf.attach(branches, mf.UPGrad()):
        branches[0](Batch(net.encoder(X)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_branches_that_are_checkpointed(reentrant):
    """One by one, the reentrant kind hands each a copy: that is said. All together, or not reentrant, it is the block that is built in."""
    net = model()

    def one_by_one():
        net.zero_grad()
        y = net.encoder(X)
        loss([checkpoint(head, y, use_reentrant=reentrant) for head in net.heads]).backward()
        return grads(net)

    def together():
        net.zero_grad()
        loss(checkpoint(lambda y: tuple(head(y) for head in net.heads), net.encoder(X), use_reentrant=reentrant)).backward()
        return grads(net)

    plain = one_by_one()
    with mf.attach(net.heads, mf.UPGrad()):
        for _ in range(2):
            assert_same(together(), built_in(mf.UPGrad()))
    with mf.attach(net.heads, mf.UPGrad()):
        if not reentrant:
            for _ in range(2):
                assert_same(one_by_one(), built_in(mf.UPGrad()))
            return
        with pytest.warns(UserWarning, match="are checkpointed one by one with use_reentrant=True") as seen:
            assert_same(one_by_one(), plain)
        assert len(seen) == 1
        one_by_one()  # once


def test_a_shared_parameter_of_which_a_pass_never_went_back():
    """Learned queries: a step that is left out, or an evaluation with gradients, and the optimizer's update behind it."""
    queries = nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    heads = model().heads
    wanted = queries.detach().clone().requires_grad_()

    def step(q, calls):
        return sum((i - 1) * call(x).square().sum() + call(x).sum() for i, (call, x) in enumerate(zip(calls, q, strict=True)))

    with mf.attach(heads, mf.MGDA()) as handle:
        for n in range(3):
            step([queries] * 3, heads)  # never goes back
            with torch.no_grad():
                for q in (queries, wanted):
                    q.sub_(0.1 * (n + 1))
                    q.grad = None
            step([queries] * 3, heads).backward()
            plain = [lambda x, head=head: nn.functional.linear(x, head.weight, head.bias) for head in heads]  # past the hooks
            step(mf.fork(wanted, 3, mf.MGDA()), plain).backward()
            torch.testing.assert_close(queries.grad, wanted.grad)
        assert len(handle._open) <= 1


def test_a_tensor_that_is_changed_between_two_branches():
    """What comes after the change is another tensor: each gets its own gradient, as without a block, and it is said that nothing was resolved."""

    class Sums(nn.Module):
        def forward(self, y):
            return y.sum(1)

    branches, found = [Sums(), Sums()], []
    for attached in (True, False):
        x = X.clone().requires_grad_()
        handle = mf.attach(branches, mf.UPGrad()) if attached else None
        y = x * 3
        first = branches[0](y)
        y.mul_(2)
        total = first.sum() - 5 * branches[1](y).square().sum()
        if attached:
            with pytest.warns(UserWarning, match="share no input"):
                total.backward()
            handle.remove()
        else:
            total.backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:.*should not be instantiated", "ignore:The .grad attribute"
)
def test_a_model_that_is_compiled_already():
    """torch.compile guards no hooks: what it compiled before attach, or before remove, must not go on."""
    mine = model()
    loss(mine(X)).backward()
    plain, block = grads(mine), built_in(mf.UPGrad())
    compiled = torch.compile(mine, backend="aot_eager")

    def step():
        mine.zero_grad()
        loss(compiled(X)).backward()
        return grads(mine)

    assert_same(step(), plain)
    for _ in range(2):
        handle = mf.attach(mine.heads, mf.UPGrad())
        assert_same(step(), block)
        handle.remove()
        assert_same(step(), plain)
    assert not torch.allclose(plain["encoder.0.weight"], block["encoder.0.weight"], 1e-3)
