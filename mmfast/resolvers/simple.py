"""Rules that do not look at the Gramian: Sum, Mean, Constant, Random. Mirrors csrc/solvers/simple.h."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule, numbers


class Sum(Rule):
    """The plain sum of the gradients: what autograd does without a block."""

    method = 0
    needs_gram = False

    def rule(self, p: Problem) -> Tensor:
        return torch.ones_like(p.G[..., 0])


class Mean(Rule):
    """The mean of the gradients that are present."""

    method = 1
    needs_gram = False

    def rule(self, p: Problem) -> Tensor:
        return torch.ones_like(p.G[..., 0]) / p.count.unsqueeze(-1)


class Constant(Rule):
    """Fixed weights, one per gradient.

    Args:
        weights: K finite numbers.
    """

    method = 2
    needs_gram = False

    def __init__(self, weights: Sequence[float], *, every: int = 1) -> None:
        super().__init__(every=every)
        self.weights = tuple(float(w) for w in weights)
        for i, w in enumerate(self.weights):
            if not math.isfinite(w):
                raise ValueError(f"weights[{i}] is {w}, expected a finite number")

    def params(self) -> list[float]:
        return list(self.weights)

    def check(self, k: int) -> None:
        if len(self.weights) != k:
            raise ValueError(f"weights has {len(self.weights)} numbers, expected {k}, one per gradient")

    def rule(self, p: Problem) -> Tensor:
        return numbers(p.G, self.weights).expand(p.G.shape[:-1])

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class Random(Rule):
    """Random weights at every call, the softmax of standard normal draws (Lin et al., "Reasonable effectiveness of random weighting", 2022)."""

    method = 3
    random = True
    needs_gram = False

    def rule(self, p: Problem) -> Tensor:
        assert p.draw is not None
        e = p.draw.normal(torch.arange(p.G.shape[-1], device=p.G.device)).exp() * p.active
        return e / e.sum(-1, keepdim=True)
