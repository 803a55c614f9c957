"""What is changed after a block or a rule was made: it takes effect from then on, or is refused."""

import copy

import pytest
import torch
from torch import nn

import mmfast as mf


class Attached(nn.Module):
    """Two plain branches, with a block attached."""

    def __init__(self, **kwargs):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
        self.__dict__["handle"] = mf.attach(self.branches, mf.Sum(), **kwargs)

    def forward(self, y):
        return tuple(branch(y) for branch in self.branches)


MAKES = {
    "block": lambda **kwargs: mf.ImpartialityBlock([nn.Linear(4, 2) for _ in range(2)], mf.Sum(), **kwargs),
    "heads": lambda **kwargs: mf.LinearHeads(4, [2, 2], mf.Sum(), **kwargs),
    "attached": Attached,
}
every = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def scales(module, call=None):
    """By what each branch's bias finds its gradient multiplied."""
    y = torch.randn(3, 4, dtype=next(module.parameters()).dtype, requires_grad=True)
    module.zero_grad()
    sum(output.sum() for output in (module if call is None else call)(y)).backward()
    return (torch.cat([p.grad for name, p in module.named_parameters() if name.endswith("bias")])[::2] / 3).tolist()


@every
def test_the_local_step(make):
    given = torch.tensor([2.0, 3.0])
    module = make(local=given)
    block = getattr(module, "handle", module)
    given[0] = 7.0  # its numbers were copied
    assert scales(module) == [2.0, 3.0]
    with torch.no_grad():
        block.beta[1] = 0.5
    assert scales(module) == [2.0, 0.5] and "local=[2, 0.5]" in repr(block)
    for moved in (block.double(), block.bfloat16(), block.float()):
        assert moved.beta.dtype == torch.float64 and moved.beta.tolist() == [2.0, 0.5]
    block.to_empty(device="cpu")
    if hasattr(block, "reset_parameters"):
        block.reset_parameters()
    assert block.beta.tolist() == [2.0, 0.5]
    block.beta = torch.tensor([4.0, 0.25], dtype=torch.float64)
    assert scales(module) == [4.0, 0.25]
    if block is module:
        assert scales(copy.deepcopy(block)) == [4.0, 0.25]
    block.beta = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="beta has 3 numbers, expected 2, one per branch"):
        scales(module)
    block.beta = None
    assert scales(module) == [1.0, 1.0] and "local" not in repr(block)


@every
def test_a_local_step_that_comes_later(make):
    module = make()
    assert scales(module) == [1.0, 1.0]
    beta = torch.tensor([2.0, 3.0], dtype=torch.float64)
    if make is Attached:  # which has no hooks behind the branches then
        with pytest.raises(AttributeError, match="attach was called without local="):
            module.handle.beta = beta
        return
    module.beta = beta
    assert scales(module) == [2.0, 3.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:.*should not be instantiated")
@pytest.mark.parametrize("make", [MAKES["block"], MAKES["heads"]], ids=["block", "heads"])
def test_the_local_step_of_a_compiled_block(make):
    torch._dynamo.reset()
    block = make(local=[2.0, 3.0])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert scales(block, compiled) == [2.0, 3.0]
    block.beta.mul_(0.5)
    assert scales(block, compiled) == [1.0, 1.5]
    torch._dynamo.reset()


def test_leak():
    rule, grads = mf.GradDrop(leak=0.25), [torch.tensor([1.0, 8.0]), torch.tensor([-2.0, 4.0])]
    rule.leak = 1.0
    assert mf.resolve(grads, rule).tolist() == [-1.0, 12.0]
    rule.leak = (1, 0.0)
    dropped = mf.resolve(grads, rule)
    assert dropped.tolist() in ([1.0, 12.0], [-1.0, 12.0])


@pytest.mark.parametrize(
    "rule, name, value", [(mf.PCGrad(order="fixed"), "order", "random"), (mf.MGDA(every=2), "every", 4), (mf.MGDA(), "every", 4)]
)
def test_what_is_set_once(rule, name, value):
    before = repr(rule)
    with pytest.raises(AttributeError, match=name):
        setattr(rule, name, value)
    assert repr(rule) == before
