"""Rules that look at the norms of the gradients alone. Mirrors csrc/solvers/magnitude.h, whose last rule, CRMOGM, is in compose.py."""

import math

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule
from mmfast.resolvers.units import to_one_unit


def _check_update_at(rule: str, update_at: int) -> int:
    if not isinstance(update_at, int) or update_at < 1:
        raise ValueError(f"{rule}: update_at is {update_at!r}, expected the number of a call, 1 or more")
    return update_at


class _Norms:
    """The norms, their change since the call update_at (since 1 before it), and what is kept: the norms of that call, their sets and units, the calls.

    A row that is missing at that call is kept at the first one after it that has it.
    """

    def __init__(self, p: Problem, first: Tensor, sets: Tensor, units: Tensor, calls: Tensor, update_at: int) -> None:
        self.norm = (p.G.diagonal(dim1=-2, dim2=-1) * p.scale.unsqueeze(-1)).sqrt()
        self.calls = calls + 1
        now = self.calls >= update_at
        self.first = torch.where(p.active & now & (first == 0), self.norm, first)
        change = self.norm / torch.where(self.first == 0, 1, self.first)
        self.sets, self.units = to_one_unit(p, change, sets, units, now)
        self.change = torch.where(now, change * self.units, change)


def _mean(x: Tensor, p: Problem) -> Tensor:
    return torch.where(p.active, x, 0).sum(-1, keepdim=True) / p.count.unsqueeze(-1)


class Unit(Rule):
    """Gives each gradient length 1: w_i = 1 / |g_i|. As a step before another rule, `Compose(Unit(), rule)`, the rule sees unit gradients.

    The result does not depend on the gradients' lengths: a loss scale must not be divided out of it again, or the rule must be used with
    `preserve_norm=True`, as blocks are.

        >>> mf.resolve([torch.tensor([3.0, 0.0]), torch.tensor([0.0, -0.5])], mf.Unit())
        tensor([ 1., -1.])
    """

    method = 20
    degree = -1.0

    def rule(self, p: Problem) -> Tensor:
        return 1 / (p.G.diagonal(dim1=-2, dim2=-1) * p.scale.unsqueeze(-1)).sqrt()


class DBMTL(Rule):
    """Makes all gradients as long as the longest, w_i = max_j |g_j| / |g_i| (Lin et al., "Dual-balancing for multi-task learning", 2023).

    This is the method's gradient-magnitude part. Its losses are logarithms: give it gradients of log(loss). Its running mean of the gradients is
    `EMA(DBMTL(), beta=0.9)`.

        >>> mf.weights(torch.tensor([[4.0, 0.0], [0.0, 25.0]]), mf.DBMTL())
        tensor([2.5000, 1.0000], dtype=torch.float64)
    """

    method = 21

    def rule(self, p: Problem) -> Tensor:
        norm = p.G.diagonal(dim1=-2, dim2=-1).sqrt()
        return torch.where(p.active, norm, 0).amax(-1, keepdim=True) / norm


class GradNorm(Rule):
    """Learns weights that balance the gradient norms (Chen et al., "GradNorm", ICML 2018, as modified by Javaloy et al., ICML 2022).

    Needs the Gramian alone: how far a branch has trained shows in its gradient norm, not in its loss. The weights sum to K. Norms are divided by their mean
    before Adam sees a gradient of them (the code of Javaloy et al. does not, and compares with its 21st call by default), and a loss scale that changes from
    call to call changes nothing; a branch that joins later counts as changed as much as the others in the mean.

    Args:
        alpha: how strongly branches whose norms fell less are favoured; 0 makes all norms equal.
        lr: learning rate of Adam, which takes one step on the weights' softmax logits at each call.
        update_at: number of the call whose norms later ones are compared with (until then with 1).
    """

    method = 16

    def __init__(self, alpha: float = 0.0, lr: float = 1e-3, update_at: int = 20, *, every: int = 1) -> None:
        for name, value in (("alpha", alpha), ("lr", lr)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"GradNorm: {name} is {value!r}, expected a finite number, 0 or more")
        super().__init__(every=every)
        self.alpha, self.lr, self.update_at = alpha, lr, _check_update_at("GradNorm", update_at)

    def params(self) -> list[float]:
        return [self.alpha, self.lr, float(self.update_at)]

    def state_size(self, k: int) -> int:
        return 7 * k + 1

    def rule(self, p: Problem) -> Tensor:
        assert p.state is not None
        k = p.G.shape[-1]
        logit, moment1, moment2, first, steps, sets, units, calls = p.state.split([k] * 7 + [1], -1)
        seen = _Norms(p, first, sets, units, calls, self.update_at)
        norm, change = seen.norm, seen.change
        a = p.count.unsqueeze(-1) * torch.where(p.active, logit, -torch.inf).softmax(-1)
        size = norm / _mean(norm, p)
        target = _mean(a * size, p) * (change / _mean(change, p)) ** self.alpha
        gap = a * size - target
        # norms that are equal but for rounding pull nowhere
        slope = torch.where(gap.abs() <= max(1e-12, 4 * p.precision) * (a * size + target), 0, size.copysign(gap))
        gradient = a * (slope - _mean(a * slope, p))
        next_steps = steps + 1
        next1, next2 = 0.9 * moment1 + 0.1 * gradient, 0.999 * moment2 + 0.001 * gradient.square()
        spread = (next2 / (1 - 0.999**next_steps)).sqrt()
        next_logit = logit - self.lr * next1 / (1 - 0.9**next_steps) / (spread + 1e-8)
        own = zip((next_logit, next1, next2, seen.first, next_steps), (logit, moment1, moment2, seen.first, steps), strict=True)
        p.next_state = torch.cat([*(torch.where(p.active, new, old) for new, old in own), seen.sets, seen.units, seen.calls], -1)
        return a

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, lr={self.lr}, update_at={self.update_at}"


class NSGD(Rule):
    """Gives all gradients one norm, the mean of theirs weighted by their change (the scaling part of RotoGrad, Javaloy and Valera, ICLR 2022).

    A loss scale that changes from call to call changes nothing; a branch that joins later counts as changed as much as the others in the mean.

    Args:
        update_at: number of the call whose norms later ones are compared with (until then with 1).
    """

    method = 17

    def __init__(self, update_at: int = 20, *, every: int = 1) -> None:
        super().__init__(every=every)
        self.update_at = _check_update_at("NSGD", update_at)

    def params(self) -> list[float]:
        return [float(self.update_at)]

    def state_size(self, k: int) -> int:
        return 3 * k + 1

    def rule(self, p: Problem) -> Tensor:
        assert p.state is not None
        sets, units, first, calls = p.state.split([p.G.shape[-1]] * 3 + [1], -1)
        seen = _Norms(p, first, sets, units, calls, self.update_at)
        p.next_state = torch.cat([seen.sets, seen.units, seen.first, seen.calls], -1)
        return _mean(seen.change * seen.norm, p) / _mean(seen.change, p) / seen.norm

    def extra_repr(self) -> str:
        return f"update_at={self.update_at}"
