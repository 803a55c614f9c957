"""The block as it is usually written: the K gradients in memory, side by side, and loops in Python. Here for the comparison of speed only."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Aggregate = Callable[[Tensor], Tensor]  # [K, N] gradients -> [N]


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, k: int, aggregate: Aggregate) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.aggregate = aggregate
        return tuple(y.view_as(y) for _ in range(k))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.aggregate(torch.stack(grads).flatten(1)).view_as(grads[0]), None, None


class Materialised(nn.Module):
    """Branches of one input whose gradients are stacked to [K, N] and aggregated by a function."""

    def __init__(self, branches: nn.ModuleList, aggregate: Aggregate) -> None:
        super().__init__()
        self.branches, self.aggregate = branches, aggregate

    def forward(self, y: Tensor) -> list[Tensor]:
        copies = _Copies.apply(y, len(self.branches), self.aggregate)
        return [branch(copy) for branch, copy in zip(self.branches, copies, strict=True)]


def keep_norm(resolved: list[Tensor], g: Tensor) -> Tensor:
    """The sum of the resolved gradients at the length of the plain sum."""
    total = sum(resolved[1:], resolved[0])
    return total * (g.sum(0).norm() / total.norm().clamp_min(1e-10))


def pcgrad(g: Tensor) -> Tensor:
    """Every gradient projected off the others it conflicts with, in random order (Yu et al., 2020)."""
    resolved = []
    for i in range(len(g)):
        v = g[i].clone()
        for j in random.sample(range(len(g)), len(g)):
            if j != i and torch.cosine_similarity(v, g[j], dim=0) < 0:
                v -= v.dot(g[j]) / g[j].dot(g[j]).clamp_min(1e-15) * g[j]
        resolved.append(v)
    return keep_norm(resolved, g)


class GradNorm:
    """Weights learnt by a gradient step of their own that evens out the norms (Chen et al., 2018)."""

    def __init__(self, k: int) -> None:
        self.theta = torch.ones(k, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.theta], lr=1e-3)

    def __call__(self, g: Tensor) -> Tensor:
        norms = torch.stack([row.norm() for row in g])
        with torch.enable_grad():
            a = len(g) * self.theta.softmax(0)
            weighted = torch.stack([a_i * n for a_i, n in zip(a, norms, strict=True)])
            self.optimiser.zero_grad()
            (weighted - weighted.mean().detach()).abs().sum().backward()
        self.optimiser.step()
        return keep_norm([a_i * row for a_i, row in zip(a.detach(), g, strict=True)], g)


def rules(k: int) -> dict[str, Aggregate]:
    """The rules that are written out here, by name."""
    return {"PCGrad": pcgrad, "GradNorm": GradNorm(k)}
