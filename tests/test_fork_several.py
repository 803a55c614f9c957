"""fork of several tensors: one problem over all of them, eager and compiled."""

import pytest
import torch

import mmfast as mf


def leaves(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, n, generator=generator).requires_grad_() for n in (3, 5)]


def losses(branches):
    """Branch i's loss; the second branch does not look at the second tensor."""
    (a1, b1), (a2, _), (a3, b3) = branches
    return a1.square().sum() + (b1 - 1).square().sum() + (a2 * torch.arange(3.0)).sum() + (a3.sin().sum() - 3 * b3.sum())


def gradients(ys):
    """The branches' gradients, taken apart."""
    found = []
    for i in range(3):
        apart = [[y.detach().requires_grad_() for y in ys] for _ in range(3)]
        losses(apart).backward()
        found.append([y.grad for y in apart[i]])
    return found


@pytest.mark.parametrize("per", ["batch", "sample", "batch_sum"])
@pytest.mark.parametrize("make", [mf.UPGrad, mf.PCGrad, mf.PCD, mf.GradDrop, lambda: mf.Compose(mf.GradVac(), mf.MGDA())])
def test_the_gradients_of_all_tensors_are_one_problem(make, per):
    if per == "batch_sum" and make is mf.GradDrop:
        pytest.skip("GradDrop has no batch sums")
    torch.manual_seed(0)
    one = make()
    torch.manual_seed(0)
    two = make()
    for turn in range(2):
        ys = leaves(turn)
        losses(mf.fork(ys, 3, one, per=per)).backward()
        wanted = mf.resolve(gradients(ys), two, per, preserve_norm=True)
        for y, g in zip(ys, wanted, strict=True):
            torch.testing.assert_close(y.grad, g)


def test_what_sends_no_gradient_takes_no_part():
    ys = leaves()
    (a1, b1), (_, _), (a3, _) = mf.fork(ys, 3, mf.UPGrad())
    (a1.square().sum() - 2 * a3.sum() + 0 * b1.detach().sum()).backward()
    wanted = mf.resolve([2 * ys[0].detach(), None, torch.full_like(ys[0], -2)], mf.UPGrad(), preserve_norm=True)
    torch.testing.assert_close(ys[0].grad, wanted)
    assert ys[1].grad is None  # no branch uses it
    frozen = [ys[0], ys[1].detach()]
    branches = mf.fork(frozen, 2, mf.UPGrad())
    assert all(b.requires_grad is wants for branch in branches for b, wants in zip(branch, (True, False), strict=True))
    assert torch.equal(branches[1][1], ys[1])


def test_masks_leave_branches_out():
    ys, mask = leaves(), torch.tensor([True, False, True])
    losses(mf.fork(ys, 3, mf.MGDA(), mask=mask)).backward()
    wanted = mf.resolve(gradients(ys), mf.MGDA(), mask=mask, preserve_norm=True)
    for y, g in zip(ys, wanted, strict=True):
        torch.testing.assert_close(y.grad, g)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 traces autograd functions so
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_compiled(per):
    def loss(a, b):
        return losses(mf.fork([a * 1.5, b], 3, rule, per=per))

    rule = mf.UPGrad()
    eager, compiled = leaves(), leaves()
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for x, y in zip(eager, compiled, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_refusals():
    ys = leaves()
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(losses(mf.fork(ys, 3, mf.MGDA())), ys, create_graph=True)
    with pytest.raises(RuntimeError, match="several tensors can't be forked inside a transformation of torch.func"):
        torch.func.grad(lambda a: losses(mf.fork([a, ys[1]], 3, mf.MGDA())))(ys[0])
    with pytest.raises(ValueError, match="y is an empty list"):
        mf.fork([], 2, mf.MGDA())
    with pytest.raises(TypeError, match=r"y\[1\] is a float, expected a tensor"):
        mf.fork([ys[0], 1.0], 2, mf.MGDA())
    with pytest.raises(TypeError, match=r"y\[1\] is torch.int64"):
        mf.fork([ys[0], torch.ones(4, dtype=torch.int64)], 2, mf.MGDA())
    (a, _), _ = mf.fork(ys, 2, mf.MGDA())
    with pytest.raises(RuntimeError, match="mmfast_fork_of_several"):
        a.add_(1)


def test_one_backward_call_for_each_loss_is_said():
    ys = leaves()
    (a, b), (c, _) = mf.fork(ys, 2, mf.UPGrad())
    (a.sum() + b.sum()).backward(retain_graph=True)
    with pytest.warns(UserWarning, match="a second backward call went through one forward pass"):
        c.square().sum().backward()
