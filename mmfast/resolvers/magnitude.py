"""Rules that look at the norms of the gradients alone. Mirrors csrc/solvers/magnitude.h, whose third rule, CRMOGM, is in compose.py."""

import math

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule


def _check_update_at(rule: str, update_at: int) -> int:
    if not isinstance(update_at, int) or update_at < 1:
        raise ValueError(f"{rule}: update_at is {update_at!r}, expected the number of a call, 1 or more")
    return update_at


def _observe(p: Problem, first: Tensor, calls: Tensor, update_at: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms, their change since the call update_at (since 1 before it), the norms kept from that call, the calls so far.

    A row that is missing at that call is kept at the first one after it that has it.
    """
    norm = (p.G.diagonal(dim1=-2, dim2=-1) * p.scale.unsqueeze(-1)).sqrt()
    calls = calls + 1
    first = torch.where(p.active & (calls >= update_at) & (first == 0), norm, first)
    return norm, norm / torch.where(first == 0, 1, first), first, calls


def _mean(x: Tensor, p: Problem) -> Tensor:
    return torch.where(p.active, x, 0).sum(-1, keepdim=True) / p.count.unsqueeze(-1)


class GradNorm(Rule):
    """Learns weights that balance the gradient norms (Chen et al., "GradNorm", ICML 2018, as modified by Javaloy et al., ICML 2022).

    Needs the Gramian alone: how far a branch has trained shows in its gradient norm, not in its loss. The weights sum to K. Norms are divided by their mean
    before Adam sees a gradient of them, so the scale of the loss changes nothing; the code of Javaloy et al. does not, and compares with its 21st call by default.

    Args:
        alpha: how strongly branches whose norms fell less are favoured; 0 makes all norms equal.
        lr: learning rate of Adam, which takes one step on the weights' softmax logits at each call.
        update_at: number of the call whose norms later ones are compared with (until then with 1).
    """

    method = 16

    def __init__(self, alpha: float = 0.0, lr: float = 1e-3, update_at: int = 20) -> None:
        for name, value in (("alpha", alpha), ("lr", lr)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"GradNorm: {name} is {value!r}, expected a finite number, 0 or more")
        super().__init__()
        self.alpha, self.lr, self.update_at = alpha, lr, _check_update_at("GradNorm", update_at)

    def params(self) -> list[float]:
        return [self.alpha, self.lr, float(self.update_at)]

    def state_size(self, k: int) -> int:
        return 5 * k + 1

    def rule(self, p: Problem) -> Tensor:
        assert p.state is not None
        k = p.G.shape[-1]
        logit, moment1, moment2, first, steps, calls = p.state.split([k, k, k, k, k, 1], -1)
        norm, change, first, calls = _observe(p, first, calls, self.update_at)
        a = p.count.unsqueeze(-1) * torch.where(p.active, logit, -torch.inf).softmax(-1)
        size = norm / _mean(norm, p)
        target = _mean(a * size, p) * (change / _mean(change, p)) ** self.alpha
        gap = a * size - target
        # norms that are equal but for rounding pull nowhere
        slope = torch.where(gap.abs() <= 1e-12 * (a * size + target), 0, size.copysign(gap))
        gradient = a * (slope - _mean(a * slope, p))
        next_steps = steps + 1
        next1, next2 = 0.9 * moment1 + 0.1 * gradient, 0.999 * moment2 + 0.001 * gradient.square()
        spread = (next2 / (1 - 0.999**next_steps)).sqrt()
        next_logit = logit - self.lr * next1 / (1 - 0.9**next_steps) / (spread + 1e-8)
        own = zip((next_logit, next1, next2, first, next_steps), (logit, moment1, moment2, first, steps), strict=True)
        p.next_state = torch.cat([*(torch.where(p.active, new, old) for new, old in own), calls], -1)
        return a

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, lr={self.lr}, update_at={self.update_at}"


class NSGD(Rule):
    """Gives all gradients one norm, the mean of theirs weighted by their change (the scaling part of RotoGrad, Javaloy and Valera, ICLR 2022).

    Args:
        update_at: number of the call whose norms later ones are compared with (until then with 1).
    """

    method = 17

    def __init__(self, update_at: int = 20) -> None:
        super().__init__()
        self.update_at = _check_update_at("NSGD", update_at)

    def params(self) -> list[float]:
        return [float(self.update_at)]

    def state_size(self, k: int) -> int:
        return k + 1

    def rule(self, p: Problem) -> Tensor:
        assert p.state is not None
        first, calls = p.state.split([p.G.shape[-1], 1], -1)
        norm, change, first, calls = _observe(p, first, calls, self.update_at)
        p.next_state = torch.cat([first, calls], -1)
        return _mean(change * norm, p) / _mean(change, p) / norm

    def extra_repr(self) -> str:
        return f"update_at={self.update_at}"
