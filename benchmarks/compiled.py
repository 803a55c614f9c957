"""The training step of tabular.py with its loss, and so its backward pass, compiled; the optimizer is eager on both sides."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mmfast as mf
from benchmarks.tabular import HIDDEN, Fused, Step
from benchmarks.timing import Call
from mmfast.models.likelihoods import Normal


class Blocked(nn.Module):
    """K linear heads behind a block, one after the other."""

    def __init__(self, k: int, resolver: mf.Resolver) -> None:
        super().__init__()
        self.block = mf.ImpartialityBlock([nn.Linear(HIDDEN, 2) for _ in range(k)], resolver)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return Normal().log_prob(torch.stack(self.block(y), -2), x).sum(-1)


# section -> heads of k branches
HEADS: dict[str, Callable[[int, mf.Resolver], nn.Module]] = {
    "compile": lambda k, resolver: Fused(mf.LinearHeads(HIDDEN, [2] * k, resolver), k),
    "compile block": Blocked,
}


def steps(k: int, samples: int, heads: Callable[[], nn.Module]) -> tuple[dict[str, Call], float, bool]:
    """(the calls by provider, largest error of a parameter's gradient relative to its norm, whether they may be timed)."""
    eager = Step(k, samples, heads())
    ours = copy.deepcopy(eager)
    torch._dynamo.reset()
    ours.loss = torch.compile(ours.loss, fullgraph=True)  # type: ignore[method-assign]
    noise, error = eager.noise(), 0.0
    for step in (eager, ours):
        step.loss(noise).backward()
    for a, b in zip(*(step.optimizer.param_groups[0]["params"] for step in (ours, eager)), strict=True):
        error = max(error, float((a.grad - b.grad).norm() / b.grad.norm()))
    return {"ours": ours, "eager": eager}, error, error < 1e-3
