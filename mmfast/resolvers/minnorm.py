"""Rules that look for the shortest vector of the gradients' hull: MGDA, CAGrad. Mirrors csrc/solvers/minnorm.h by interior-point methods."""

import math

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule

# a squared length below this part of its summands' is what rounding left over: its direction means nothing
CANCELLED = 1e-12
ITERATIONS = 40


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _apply(C: Tensor, x: Tensor) -> Tensor:
    return (C @ x.unsqueeze(-1)).squeeze(-1)


def _longest_step(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The largest step <= 1 along which every (value, change) stays positive."""
    blocked = [torch.where(dx < 0, -x / dx, torch.inf) for x, dx in pairs]
    return torch.cat(blocked, -1).amin(-1, keepdim=True).mul(0.995).clamp(max=1)


class _Scaled:
    """A problem on cosines, where every row has length 1; a row that does not take part is fixed at no weight."""

    def __init__(self, p: Problem):
        self.norm = p.G.diagonal(dim1=-2, dim2=-1).sqrt()
        self.C = p.G / self.norm.unsqueeze(-1) / self.norm.unsqueeze(-2)
        self.active = p.active
        self.count = p.count.clamp(min=1).unsqueeze(-1)
        self.shortest = torch.where(p.active, self.norm, torch.inf).amin(-1, keepdim=True)
        self.a = torch.where(p.active, self.shortest / self.norm, 0)  # a'x = 1 says that the weights sum to one
        

def _factor(C: Tensor, diagonal: Tensor) -> Tensor:
    L, _ = torch.linalg.cholesky_ex(C + torch.diag_embed(diagonal), check_errors=False)
    return L
