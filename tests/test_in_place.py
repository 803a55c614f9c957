"""Changes in place around a block: refused in words where other branches would see them, right where nobody else can."""

import contextlib

import pytest
import torch
from torch import nn

import mmfast as mf

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:.*should not be instantiated"
)


class Through(nn.Module):
    """A head that changes its input by `change`."""

    def __init__(self, change):
        super().__init__()
        self.change, self.linear = change, nn.Linear(3, 2)

    def forward(self, x):
        self.change(x)
        return self.linear(x)


def set_first(x):
    x[0] = 0


def set_through_a_view(x):
    x.view(-1)[1:].mul_(2)


def without_recording(x):
    with torch.no_grad():
        x.add_(1)


CHANGES = {
    "ReLU": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.LeakyReLU(0.1, inplace=True)), nn.Linear(3, 2)),
    "add_": lambda: Through(lambda x: x.add_(1)),
    "an item": lambda: Through(set_first),
    "a view": lambda: Through(set_through_a_view),
    "detached": lambda: Through(lambda x: x.detach().add_(1)),
    "no_grad": lambda: Through(without_recording),
}


@pytest.mark.parametrize("recorded", [True, False, "frozen"])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_branch_that_changes_its_input_is_named(kind, as_dict, recorded):
    branches = [nn.Linear(3, 2), CHANGES[kind](), nn.Linear(3, 2)]
    block = mf.ImpartialityBlock(nn.ModuleDict(dict(zip("abc", branches, strict=True))) if as_dict else branches, "mgda")
    y = torch.randn(4, 3, requires_grad=recorded != "frozen") * 1
    name = "b" if as_dict else "1"
    message = rf"branch {name} of an mmfast\.ImpartialityBlock changes its input.*inplace=False.*clone\(\)"
    with torch.set_grad_enabled(bool(recorded)), pytest.raises(RuntimeError, match=message):
        block(y)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_clone_is_the_cure(kind):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = CHANGES[kind]()

        def forward(self, x):
            return self.head(x.clone())

    y = torch.randn(4, 3, requires_grad=True)
    one, two = mf.ImpartialityBlock([First(), nn.Identity()], "mgda")(y)
    assert torch.equal(two, y)
    (one.sum() + two.sum()).backward()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("kind", CHANGES)
def test_inference_mode(kind):
    """Such tensors do not count their changes: a block's first call looks at the numbers."""
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="branch 0 of an mmfast.ImpartialityBlock changes its input"):
            mf.ImpartialityBlock([CHANGES[kind](), nn.Identity()], "mgda")(torch.randn(4, 3))
        block = mf.ImpartialityBlock([nn.Tanh(), nn.Identity()], "mgda")
        for y in (torch.tensor([[1.0, torch.nan]]), torch.randn(4, 3)):
            one, two = block(y)
            torch.testing.assert_close(one, y.tanh(), equal_nan=True)
            assert two.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("recorded", [True, False])
def test_compiled(recorded):
    """Without a gradient a change is right; with one torch refuses it while it traces."""
    block = mf.ImpartialityBlock([CHANGES["ReLU"](), nn.Linear(3, 2)], "mgda")
    y = torch.randn(4, 3)
    before, forward = y.clone(), torch.compile(block, backend="aot_eager", fullgraph=True)
    if recorded:
        with pytest.raises(RuntimeError, match="modified inplace"):
            forward(y.requires_grad_())
        return
    with torch.no_grad():
        assert torch.equal(forward(y)[1], block.branches[1](before)) and torch.equal(y, before)


def test_other_errors_of_a_branch_stay_theirs():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="^its own$"):
        mf.ImpartialityBlock([Broken()], "mgda")(torch.ones(2, 3))


def test_an_alias_that_is_changed_names_mmfast_and_the_branch():
    for place in (0, 1):
        aliases = mf.fork(torch.randn(4, 3, requires_grad=True) * 1, 2, "mgda")
        with pytest.raises(RuntimeError, match=rf"Output {place} of mmfast_fork\w* is a view .* modified inplace.* out-of-place"):
            aliases[place].add_(1)
        with pytest.raises(RuntimeError, match="modified inplace"):
            set_first(aliases[place])
    (out,) = mf.ImpartialityBlock([nn.Linear(3, 2)], "mgda", local=[2.0])(torch.ones(4, 3))
    with pytest.raises(RuntimeError, match=r"Output 0 of mmfast_local_step\w* is a view .* cloning the output"):
        out.add_(1)


def test_an_alias_of_a_transformation_is_its_own():
    def loss(y):
        a, b = mf.fork(y, 2, mf.Sum(), preserve_norm=False)
        return a.mul_(2).sum() + (b * b).sum()

    y = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.func.grad(loss)(y), 2 + 2 * y) and torch.equal(y, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "change", [lambda x: x.add_(1), lambda x: x.mul_(3), set_first, torch.relu_], ids=["add_", "mul_", "item", "relu_"]
)
@pytest.mark.parametrize("local", [None, [0.5, 2.0]])
@pytest.mark.parametrize("mode", ["eager", "compiled", "frozen", "no_grad"])
def test_outputs_of_linear_heads_may_be_changed(change, local, mode):
    torch.compiler.reset()  # one function for all of these would be compiled too often
    heads = mf.LinearHeads(3, [2, 2], mf.MGDA(), local=local)

    def outputs(y, own):
        a, b = heads(y)
        a = a.clone() if own else a
        change(a)
        return a, b

    found = []
    for own in (True, False):
        y = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_(mode != "frozen")
        call = torch.compile(outputs, backend="aot_eager", fullgraph=True) if mode == "compiled" else outputs
        with torch.no_grad() if mode == "no_grad" else contextlib.nullcontext():
            a, b = call(y, own)
        heads.zero_grad()
        if mode != "no_grad":
            (a.square().sum() + b.square().sum()).backward()
        found.append([a, b, y.grad, *(p.grad for p in heads.parameters())])
    for theirs, ours in zip(*found, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_a_block_of_one_branch_may_change_its_input():
    block = mf.ImpartialityBlock([nn.ReLU(inplace=True)], "mgda")
    with torch.no_grad():
        assert torch.equal(block(torch.tensor([-1.0, 2.0]))[0], torch.tensor([0.0, 2.0]))
