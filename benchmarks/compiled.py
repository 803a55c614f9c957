"""The training step of tabular.py with its loss, and so its backward pass, compiled, against itself in eager mode and against the same compiled without a block."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mmfast as mf
from benchmarks.tabular import HIDDEN, Fused, Loop, Step
from benchmarks.timing import Call
from mmfast.models.likelihoods import Normal


class Blocked(nn.Module):
    """K linear heads behind a block, one after the other."""

    def __init__(self, k: int, resolver: mf.Resolver) -> None:
        super().__init__()
        self.block = mf.ImpartialityBlock([nn.Linear(HIDDEN, 2) for _ in range(k)], resolver)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return Normal().log_prob(torch.stack(self.block(y), -2), x).sum(-1)


# section -> heads of k branches, and the same without a block
HEADS: dict[str, tuple[Callable[[int, mf.Resolver], nn.Module], Callable[[int], nn.Module]]] = {
    "compile": (
        lambda k, resolver: Fused(mf.LinearHeads(HIDDEN, [2] * k, resolver), k),
        lambda k: Fused(nn.Linear(HIDDEN, 2 * k), k),
    ),
    "compile block": (Blocked, lambda k: Loop(k, lambda y: [y] * k)),
}


def steps(k: int, samples: int, heads: nn.Module, plain: nn.Module) -> tuple[dict[str, Call], float, bool]:
    """(the calls by provider, largest error of a parameter's gradient relative to its norm, whether they may be timed)."""
    eager, without = Step(k, samples, heads), Step(k, samples, plain)
    ours = copy.deepcopy(eager)
    torch._dynamo.reset()
    for step in (ours, without):
        step.loss = torch.compile(step.loss, fullgraph=True)  # type: ignore[method-assign]
    noise = eager.noise()
    for step in (eager, ours, without):  # which compiles
        step.loss(noise).backward()
    pairs = zip(*(step.optimizer.param_groups[0]["params"] for step in (ours, eager)), strict=True)
    error = float(torch.stack([(a.grad - b.grad).norm() / b.grad.norm() for a, b in pairs]).max())  # of which a NaN comes out as one
    return {"ours": ours, "eager": eager, "none": without}, error, error < 1e-3
